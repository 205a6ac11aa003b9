"""Runs alone, by path, in a fresh process: loads two models by transformers and compares their outputs.

Reads a JSON request on stdin, prints one JSON line. Must not import mpoe_convert, and makes sure that the
artifact cannot either.
"""

import inspect
import json
import math
import sys


class _Absent:
    """An import hook under which a package does not exist, as on a Hub user's machine."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("mpoe_convert", "tensorly"):
            raise ModuleNotFoundError(f"No module named {name!r} (hidden while verifying)", name=name)
        return None


def main() -> dict:
    request = json.load(sys.stdin)
    sys.meta_path.insert(0, _Absent())
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    auto = getattr(transformers, request["auto_class"])
    options = {"dtype": torch.float32, "output_loading_info": True}
    try:
        dense, _ = auto.from_pretrained(
            request["against"],
            revision=request["revision"] or "main",
            token=request["token"],
            **options,
        )
        inputs, text = make_inputs(dense)
        expected, expected_tokens = run(dense.eval(), inputs)
    except Exception as error:
        return {"error": f"the dense model {request['against']} does not load or run: {_line(error)}"}
    del dense
    try:
        model, info = auto.from_pretrained(request["artifact"], trust_remote_code=True, **options)
        if info["missing_keys"] or info["mismatched_keys"]:
            missing = sorted(info["missing_keys"])[:3] or sorted(info["mismatched_keys"])[:3]
            return {"error": f"the artifact loads with missing or mismatched weights: {missing}"}
        found, found_tokens = run(model.eval(), inputs)
        differences = compare(found, expected, found_tokens, expected_tokens)
    except Exception as error:
        return {"error": f"the artifact does not load or run: {_line(error)}"}
    return {"model_class": type(model).__name__, "inputs": text} | differences


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


def make_inputs(model) -> tuple[dict, str]:
    """Seeded random inputs of the kind that the head takes, and what they are in words."""
    import torch

    config, head = model.config, type(model).__name__
    generator = torch.Generator().manual_seed(0)
    text_config = config.get_text_config()
    vocabulary = getattr(text_config, "vocab_size", None)
    if vocabulary is None:
        size = (2, config.num_channels, config.image_size, config.image_size)
        return {"pixel_values": torch.randn(size, generator=generator)}, f"{size} pixels"
    longest = getattr(text_config, "max_position_embeddings", None) or 48
    size = (2, min(48, longest - 4))
    if head.endswith("ForMultipleChoice"):
        size = (2, 3, size[1])  # (batch, choices, length)
    elif head.endswith("ForSequenceClassification") and text_config.pad_token_id is None:
        size = (1, size[1])  # without a pad token decoders cannot find where each row of a batch ends
    ids = torch.randint(min(4, vocabulary - 1), vocabulary, size, generator=generator)
    inputs = {"input_ids": _end_rows(ids, text_config), "attention_mask": torch.ones_like(ids)}
    derives = head.endswith(("ForSequenceClassification", "ForQuestionAnswering"))
    if "decoder_input_ids" in inspect.signature(model.forward).parameters and not derives:
        inputs["decoder_input_ids"] = ids[:, : size[1] // 2]
    return inputs, f"{' x '.join(map(str, size))} random tokens"


def _end_rows(ids, config):
    """The ids with one end-of-sequence token per row, at its end: BART and T5 classify the state there."""
    eos = config.eos_token_id
    eos = eos[0] if isinstance(eos, (list, tuple)) else eos
    if eos is not None and 0 <= eos < config.vocab_size:
        ids[ids == eos] = (eos + 1) % config.vocab_size
        ids[..., -1] = eos
    return ids


def run(model, inputs):
    """(floating-point outputs of the model by name, greedily generated tokens or None)."""
    import torch

    with torch.no_grad():
        outputs = model(**inputs, return_dict=True).items()  # caches and the like are not tensors
        tensors = {k: v for k, v in outputs if isinstance(v, torch.Tensor) and v.is_floating_point()}
        tokens = None
        if model.can_generate() and "input_ids" in inputs:
            prompt = {k: v[:, :8] for k, v in inputs.items() if not k.startswith("decoder")}
            limits = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "num_beams": 1}
            tokens = model.generate(**prompt, **limits, pad_token_id=0)[:, -8:]
    return tensors, tokens


def compare(found, expected, found_tokens, expected_tokens) -> dict:
    """The differences, in float64: the largest of any output. NaN counts as infinitely different."""
    import torch

    relative, absolute, same = [], [], []
    for name, tensor in expected.items():
        theirs, ours = tensor.double(), found[name].double()
        difference = theirs - ours
        norm = torch.linalg.vector_norm(difference)
        relative.append((norm / torch.linalg.vector_norm(theirs) if norm else norm).item())
        absolute.append(difference.abs().max().item())
        if name.endswith("logits"):
            same.append((ours.argmax(-1) == theirs.argmax(-1)).flatten().double())
    greedy = None
    if expected_tokens is not None:
        greedy = (found_tokens == expected_tokens).double().mean().item()
    return {
        "relative_difference": _largest(relative),
        "max_difference": _largest(absolute),
        "top1_agreement": torch.cat(same).mean().item() if same else None,
        "greedy_agreement": greedy,
    }


def _largest(numbers: list) -> float:
    return max(number if math.isfinite(number) else sys.float_info.max for number in numbers)


if __name__ == "__main__":
    print(json.dumps(main()))
