"""Runs alone, by path, in a fresh process: loads two models by transformers and compares their outputs.

Reads a JSON request on stdin, prints one JSON line. Must not import mpoe_convert, and makes sure that the
artifact cannot either.
"""

import json
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
    except Exception as error:
        return {"error": f"the dense model {request['against']} does not load: {_line(error)}"}
    inputs, text = make_inputs(dense.config)
    expected, expected_tokens = run(dense.eval(), inputs)
    del dense
    try:
        model, info = auto.from_pretrained(request["artifact"], trust_remote_code=True, **options)
        if info["missing_keys"] or info["mismatched_keys"]:
            missing = sorted(info["missing_keys"])[:3] or sorted(info["mismatched_keys"])[:3]
            return {"error": f"the artifact loads with missing or mismatched weights: {missing}"}
        found, found_tokens = run(model.eval(), inputs)
    except Exception as error:
        return {"error": f"the artifact does not load or run: {_line(error)}"}
    return {"model_class": type(model).__name__, "inputs": text} | compare(
        found, expected, found_tokens, expected_tokens
    )


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


def make_inputs(config) -> tuple[dict, str]:
    """Seeded random inputs of the kind that the model takes, and what they are in words."""
    import torch

    generator = torch.Generator().manual_seed(0)
    text_config = config.get_text_config()
    vocabulary = getattr(text_config, "vocab_size", None)
    if vocabulary is None:
        size = (2, config.num_channels, config.image_size, config.image_size)
        return {"pixel_values": torch.randn(size, generator=generator)}, f"{size} pixels"
    longest = getattr(text_config, "max_position_embeddings", None) or 48
    size = (2, min(48, longest - 4))
    inputs = {"input_ids": torch.randint(min(4, vocabulary - 1), vocabulary, size, generator=generator)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = inputs["input_ids"][:, : size[1] // 2]
    return inputs, f"{size[0]} x {size[1]} random tokens"


def run(model, inputs):
    """(first output of the model, greedily generated tokens or None)."""
    import torch

    with torch.no_grad():
        outputs = model(**inputs)
        logits = outputs.logits if "logits" in outputs else outputs[0]
        tokens = None
        if model.can_generate() and "input_ids" in inputs:
            prompt = {k: v[:, :8] for k, v in inputs.items() if not k.startswith("decoder")}
            limits = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "num_beams": 1}
            tokens = model.generate(**prompt, **limits, pad_token_id=0)[:, -8:]
    return logits, tokens


def compare(found, expected, found_tokens, expected_tokens) -> dict:
    """The differences, in float64. NaN outputs count as infinitely different."""
    import math

    import torch

    found, expected = found.double(), expected.double()
    relative = torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected)
    numbers = {
        "relative_difference": relative.item(),
        "max_difference": (found - expected).abs().max().item(),
    }
    numbers = {k: v if math.isfinite(v) else sys.float_info.max for k, v in numbers.items()}
    same = (found.argmax(-1) == expected.argmax(-1)).double().mean().item()
    greedy = None
    if expected_tokens is not None:
        greedy = (found_tokens == expected_tokens).double().mean().item()
    return numbers | {"top1_agreement": same, "greedy_agreement": greedy}


if __name__ == "__main__":
    print(json.dumps(main()))
