"""Load two models with transformers and compare their outputs; run by its path in a fresh process.

Reads a JSON request on stdin and prints one line of JSON. This file must not import mpoe_convert, and it
hides the package, so that the artifact cannot import it either.
"""

from __future__ import annotations

import inspect
import json
import math
import random
import re
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import torch


class _Absent:
    """An import hook that hides this package, which a Hub user does not have."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] in ("mpoe_convert", "tensorly"):
            raise ModuleNotFoundError(f"No module named {name!r} (hidden while verifying)", name=name)
        return None


def main() -> dict:
    """Carry out the request that stdin holds.

    It is a `verify.ChildRequest` as JSON.

    Returns:
        The fields of `verify.Verification` that are measured here, or {"error": message}.
    """
    request = json.load(sys.stdin)
    sys.meta_path.insert(0, _Absent())
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # An export is compared with its artifact, an artifact with the dense model.
    names = ("artifact", "export") if request["is_export"] else ("dense model", "artifact")
    reference, found = Reference(), {}
    try:
        reference.run(request)
    except Exception as error:  # here and below: custom code may raise anything, and the caller tells it
        if not request["is_trained"]:
            return {"error": f"the {names[0]} {request['against']} does not load or run: {_line(error)}"}
        reference.outputs, found["reference_error"] = None, request["absent"] or _line(error)
    try:
        found |= compare_with(reference, request, names[1])
    except Exception as error:
        return {"error": f"the {names[1]} does not load or run: {_line(error)}"}
    if "error" in found:
        return found
    try:
        return found | compare_tokenizers(request)
    except Exception as error:
        return {"error": f"the tokenizer of the {names[1]} does not load: {_line(error)}"}


def load(request: dict, name: str, revision: str | None, trusted: bool, **options: Any) -> tuple[Any, dict]:
    """(a model in float32, what transformers says of its loading), by the request's Auto class."""
    import torch
    import transformers

    auto = getattr(transformers, request["auto_class"])
    options |= {"dtype": torch.float32, "output_loading_info": True, "token": request["token"]}
    return auto.from_pretrained(name, revision=revision or "main", trust_remote_code=trusted, **options)


class Reference:
    """The model to compare with, as far as it came.

    Attributes:
        made_up: weights that its checkpoint lacks; None: it did not load.
        inputs / described: what it ran on, and in words; None: it did not run.
        outputs: one result of `run` for each comparison; None: they cannot be compared.
    """

    def __init__(self) -> None:
        self.made_up: dict[str, torch.Tensor] | None = None
        self.inputs: dict | None = None
        self.described = ""
        self.outputs: list[tuple] | None = None

    def run(self, request: dict) -> None:
        """Load the model and run it. Raises whatever its code raises."""
        if request["absent"]:
            raise FileNotFoundError(request["absent"])
        trusted = request["trust_remote_code"][0]
        names_on_disk = {"key_mapping": request["key_mapping"]} if request["key_mapping"] else {}
        model, info = load(request, request["against"], request["revision"], trusted, **names_on_disk)
        self.made_up = values_of(model, info["missing_keys"])
        self.inputs, self.described = make_inputs(model)
        if request["kept"]:
            model = with_experts(model, request["kept"], request["small"])
            self.described += ", the source without the experts that were left out"
        self.outputs = [run(each.eval(), self.inputs) for each in by_expert(model, request["experts"])]
        if nan := sorted(damaged_outputs(self.outputs, None)):
            raise ValueError(f"its outputs {nan} hold NaN")


def compare_with(reference: Reference, request: dict, name: str) -> dict:
    """Load and run the other model, and compare it with the reference.

    Args:
        name: what messages call it.

    Returns:
        The fields of `verify.Verification` that are measured of it, or {"error": message}.
    """
    trusted = request["trust_remote_code"][1]
    model, info = load(request, request["artifact"], request["artifact_revision"], trusted)
    missing = lacking(info["missing_keys"], reference.made_up) or sorted(map(str, info["mismatched_keys"]))
    if missing:
        return {"error": f"the {name} loads with missing or mismatched weights: {missing[:3]}"}
    found, expected = {}, reference.outputs
    new = set(reference.made_up or ()) - set(info["missing_keys"])
    if new and request["is_trained"]:  # such as the classes of a classifier
        found["reference_error"] = f"its checkpoint lacks {sorted(new)[:3]}, which training added"
        expected = None
    fill(model, reference.made_up or {}, info["missing_keys"])
    found["model_class"] = type(model).__name__
    found["damaged_weights"] = damaged_weights(model)
    inputs, found["inputs"] = reference.inputs, reference.described
    if inputs is None:
        inputs, found["inputs"] = make_inputs(model)
    ours = [run(each.eval(), inputs) for each in by_adapter(model, request["adapters"])]
    found["generates"] = None if ours[0][1] is None else True
    found["damaged_outputs"] = damaged_outputs(ours, expected)
    if expected is not None:
        pairs = zip(ours, expected, strict=True)
        found |= worst([compare(one[0], other[0], one[1], other[1]) for one, other in pairs])
    return found


def with_experts(model: Any, kept: dict[str, list[int]], config: dict) -> Any:
    """A mixture with some of its experts alone, as a model of its class.

    Args:
        kept: by the paths of layers, the numbers of those that stay.
        config: of the smaller model.
    """
    import torch

    small = type(model)._from_config(type(model.config).from_dict(config), dtype=model.dtype)
    state = model.state_dict()
    for name, empty in small.state_dict().items():
        tensor = state[name]
        for dim, size in enumerate(empty.shape):
            if size != tensor.shape[dim]:  # what stands behind the experts stays
                own = max((path for path in kept if f".{path}." in f".{name}"), key=len)
                entries = [*kept[own], *range(len(kept[own]) + tensor.shape[dim] - size, tensor.shape[dim])]
                tensor = tensor.index_select(dim, torch.tensor(entries))
        state[name] = tensor
    small.load_state_dict(state)
    return small


def values_of(model: Any, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Weights of a model that its checkpoint lacks: transformers made them up when it loaded it."""
    state = model.state_dict()
    return {name: state[name].clone() for name in names if name in state}


def lacking(missing: Iterable[str], made_up: dict[str, torch.Tensor] | None) -> list[str]:
    """The weights that a model may not lack.

    They are those of layers, whose paths hold numbers, and those that its reference has: neither may have a
    pooler, for example. Without a reference (None) only the layers are known to be needed.
    """
    return sorted(
        name
        for name in missing
        if re.search(r"\.\d+\.", name) or (made_up is not None and name not in made_up)
    )


def fill(model: Any, made_up: dict[str, torch.Tensor], names: Iterable[str]) -> None:
    """Give a model the reference's values where both have made some up, so that they can be compared."""
    state = model.state_dict()
    for name in made_up.keys() & set(names) & state.keys():
        if state[name].shape == made_up[name].shape:
            state[name].copy_(made_up[name])


def damaged_weights(model: Any) -> list[str]:
    """Names of the parameters that hold NaN or infinities."""
    return [name for name, parameter in model.named_parameters() if not parameter.isfinite().all()]


def damaged_outputs(found: list[tuple], expected: list[tuple] | None) -> dict[str, float]:
    """{name of an output: largest share of NaN in it, and of infinities in one of the two alone}."""
    shares: dict[str, float] = {}
    for number, (tensors, _) in enumerate(found):
        for name, tensor in tensors.items():
            broken = tensor.isnan()
            if expected is not None and name in expected[number][0]:
                other = expected[number][0][name]
                broken |= (tensor != other) & ~(tensor.isfinite() & other.isfinite())
            if share := broken.double().mean().item():
                shares[name] = max(share, shares.get(name, 0.0))
    return shares


# Of several scripts, with accents, composed and decomposed, digits, code, emoji and other signs.
WORDS = (  # parted by a broken bar
    "The¦quick¦brown fox¦jumps¦don't¦I'LL¦O'Neill¦e.g.¦U.S.A.¦naïve¦café¦cafe\u0301¦Straße¦ĐỘC LẬP"
    "¦привет¦Ελληνικά¦שלום¦مرحبا¦हिन्दी¦ภาษาไทย¦日本語¦中文¦한국어¦ｆｕｌｌ¦ﬁ¦①¦½¦x²¦0¦7¦42¦1984¦12345¦1,234,567.89¦3.14¦٣٤¦2e-5"
    "¦...¦!?¦--¦—¦“”¦def f(x):¦return x[0]¦a+=b¦!=¦=>¦snake_case¦camelCase¦C:\\dir¦https://a.b/c?d=e¦#1¦@me¦$5¦50%"
    "¦a_b¦<b>¦</s>¦<s>¦[MASK]¦<|endoftext|>¦<unk>¦##ing¦▁¦Ġ¦🙂¦👩\u200d👩\u200d👧¦🇫🇷¦ABC¦Zz¦\x00¦\ufffd"
)
SPACES = ("\n", "\n\n", "\r\n", "\t", "  ", "    ", "\u00a0", "\u200b", "\u3000", "\u2028")
PIECES = (*WORDS.split("¦"), *SPACES, "é" * 3, "a" * 40)
NUM_MIXED = 60


def make_texts(tokens: list[str]) -> list[str]:
    """Texts that tokenizers split differently; the same ones at every call.

    Args:
        tokens: special ones of the tokenizer, which then stand in some of the texts.
    """
    draw = random.Random(0)
    alone = ["", " ", *PIECES, *(f" {piece}" for piece in PIECES), *(f"{piece} " for piece in PIECES)]
    around = [text for token in tokens for text in (token, f"a{token}b", f"a {token} b", token * 2)]
    pieces = [*PIECES, *tokens]
    joined = ("", " ", "  ", "\n")
    mixed = [draw.choice(joined).join(draw.choices(pieces, k=draw.randint(2, 12))) for _ in range(NUM_MIXED)]
    return alone + around + mixed


def compare_tokenizers(request: dict) -> dict:
    """How many texts both tokenizers encode alike, and the shortest that they do not.

    Returns:
        Two fields of `verify.Verification`; None where the request asks for no comparison, or where the first
        model has no tokenizer that loads.
    """
    nothing = {"tokenizer_agreement": None, "tokenizer_difference": None}
    if not request["has_tokenizer"] or request["absent"]:
        return nothing
    from transformers import AutoTokenizer

    trusted, token = request["trust_remote_code"], request["token"]
    try:
        theirs = AutoTokenizer.from_pretrained(
            request["against"],
            revision=request["revision"] or "main",
            trust_remote_code=trusted[0],
            token=token,
        )
    except Exception:  # a dense model without a tokenizer, or whose tokenizer needs what is not here
        return nothing
    ours = AutoTokenizer.from_pretrained(request["artifact"], trust_remote_code=trusted[1])
    texts = make_texts([*map(str, theirs.all_special_tokens), *map(str, theirs.get_added_vocab())][:20])
    differing = [text for text in texts if encode(ours, text) != encode(theirs, text)]
    return {
        "tokenizer_agreement": 1 - len(differing) / len(texts),
        "tokenizer_difference": min(differing, key=len) if differing else None,
    }


def encode(tokenizer: Any, text: str) -> dict | str:
    """All that a tokenizer gives for a text, or the kind of error that it raises."""
    try:
        return dict(tokenizer(text, verbose=False))
    except Exception as error:  # the other tokenizer has to refuse the text in the same way
        return type(error).__name__


def by_expert(model: Any, experts: list[int] | None) -> Iterator[Any]:
    """Yield the model; if experts are given, once per expert, with all tokens routed to that expert.

    Where experts have parts of an FFN's neurons, the number is that of a copy of all parts.
    """
    if experts is None:
        yield model
        return
    import torch

    for expert in experts:

        def choose(router: Any, args: tuple, routing: Any, expert: int = expert) -> Any:
            tokens = torch.arange(len(routing.logits), device=routing.logits.device)
            parts = getattr(router, "parts", 1)
            experts = torch.arange(expert * parts, (expert + 1) * parts, device=tokens.device)
            tokens, experts = tokens.repeat_interleave(parts), experts.repeat(len(tokens))
            weights = torch.ones_like(tokens, dtype=torch.float32)
            choices = getattr(routing, "choices", None)
            if choices is None:  # from the code of an earlier release: weights and experts (T, k)
                return routing._replace(weights=weights[:, None], experts=experts[:, None])
            alone = choices._replace(tokens=tokens, experts=experts, weights=weights, per_token=parts)
            return routing._replace(choices=alone, room=None)

        routers = [ffn.router for _, ffn in model.mixtures()]
        handles = [router.register_forward_hook(choose) for router in routers]
        for router in routers:
            router.by_task = False
        yield model
        for handle in handles:
            handle.remove()


def by_adapter(model: Any, adapters: list[str] | None) -> Iterator[Any]:
    """Yield the model; if folders of PEFT adapters are given, once with each adapter active."""
    if adapters is None:
        yield model
        return
    from peft import PeftModel

    for number, folder in enumerate(adapters):
        if number == 0:
            model = PeftModel.from_pretrained(model, folder, adapter_name="0")
        else:
            model.load_adapter(folder, adapter_name=str(number))
        model.set_adapter(str(number))
        yield model


def worst(comparisons: list) -> dict:
    """The largest differences and the smallest agreements of several comparisons."""
    pick = {"relative_difference": max, "max_difference": max, "top1_agreement": min, "greedy_agreement": min}
    values = {name: [c[name] for c in comparisons if c[name] is not None] for name in pick}
    found = {name: pick[name](each) if each else None for name, each in values.items()}
    if any(c["relative_difference"] is None for c in comparisons):  # NaN in one is the worst
        found |= {"relative_difference": None, "max_difference": None}
    return found


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


def make_inputs(model: Any) -> tuple[dict, str]:
    """(seeded random inputs that the model's head takes, their description)."""
    import torch

    config, head = model.config, type(model).__name__
    generator = torch.Generator().manual_seed(0)
    if reads_images(model):
        with suppress(Exception):  # a model may want images in a form of its own: then text alone
            return make_inputs_with_image(model, generator)
    text_config = config.get_text_config()
    vocabulary = getattr(text_config, "vocab_size", None)
    if vocabulary is None:
        size = (2, config.num_channels, config.image_size, config.image_size)
        return {"pixel_values": torch.randn(size, generator=generator)}, f"{size} pixels"
    longest = getattr(text_config, "max_position_embeddings", None) or 48
    size = (2, min(48, longest - 4))
    if head.endswith("ForMultipleChoice"):
        size = (2, 3, size[1])  # (batch, choices, length)
    elif head.endswith("ForSequenceClassification") and getattr(text_config, "pad_token_id", None) is None:
        size = (1, size[1])  # without a pad token decoders cannot find where each row of a batch ends
    ids = torch.randint(min(4, vocabulary - 1), vocabulary, size, generator=generator)
    inputs = {"input_ids": _end_rows(ids, text_config), "attention_mask": torch.ones_like(ids)}
    derives = head.endswith(("ForSequenceClassification", "ForQuestionAnswering"))
    if "decoder_input_ids" in inspect.signature(model.forward).parameters and not derives:
        inputs["decoder_input_ids"] = ids[:, : size[1] // 2]
    return inputs, f"{' x '.join(map(str, size))} random tokens"


def reads_images(model: Any) -> bool:
    """Whether the model reads texts with images in them."""
    return {"input_ids", "pixel_values"} <= _parameters(model) and _image_token(model.config) is not None


def make_inputs_with_image(model: Any, generator: torch.Generator) -> tuple[dict, str]:
    """(inputs of one text with an image in it, their description); random words and pixels."""
    import torch

    image, token, takes = make_image(model, generator), _image_token(model.config), _parameters(model)
    assert token is not None
    numbers = model.config.to_dict().items()
    special = {value for key, value in numbers if "token" in key and isinstance(value, int)}
    words = torch.tensor([w for w in range(4, model.config.get_text_config().vocab_size) if w not in special])
    ids = words[torch.randint(len(words), (1, 24), generator=generator)]
    places = torch.full((1, _count_places(model, image)), token)
    ids = torch.cat([ids[:, :4], places, ids[:, 4:]], dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | image
    if "mm_token_type_ids" in takes:
        inputs["mm_token_type_ids"] = (ids == token).long()
    if "cross_attention_mask" in takes:  # (batch, tokens, images, tiles): text sees images before it
        seen = (ids == token).cumsum(1) > 0
        inputs["cross_attention_mask"] = seen[..., None, None].long() * image["aspect_ratio_mask"][:, None]
    return inputs, f"{ids.shape[1]} random tokens, {places.shape[1]} of them in place of an image"


def make_image(model: Any, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """One image of random pixels, as the model's processor would give it: a square of its usual size."""
    import torch

    config, vision, takes = model.config, model.config.vision_config, _parameters(model)
    channels = getattr(vision, "num_channels", None) or getattr(vision, "in_channels", 3)
    patch = _side(vision.patch_size)
    merge = getattr(config, "spatial_merge_size", None) or getattr(vision, "spatial_merge_size", 1)
    if "image_grid_thw" in takes:  # Qwen-VL: a list of patches
        size = (4 * merge**2, channels * vision.temporal_patch_size * patch**2)
        grid = torch.tensor([[1, 2 * merge, 2 * merge]])
        return {"pixel_values": torch.randn(size, generator=generator), "image_grid_thw": grid}
    any_size = vision.model_type == "pixtral"
    side = 2 * patch * merge if any_size else _side(vision.image_size)
    size, rest = (channels, side, side), {}
    if any_size:
        rest["image_sizes"] = torch.tensor([[side, side]])
    if tiled := getattr(config, "image_grid_pinpoints", None):  # LLaVA-NeXT: the whole, and tiles
        size = (1 + (tiled[0][0] // side) * (tiled[0][1] // side), *size)
        rest["image_sizes"] = torch.tensor([tiled[0]])
    elif "pixel_attention_mask" in takes:  # Idefics: several images for each text
        size = (1, *size)
    elif "aspect_ratio_ids" in takes:  # Mllama: images as tiles, of which the first is used
        size = (1, vision.max_num_tiles, *size)
        rest["aspect_ratio_ids"] = torch.ones(1, 1, dtype=torch.long)
        rest["aspect_ratio_mask"] = (torch.arange(vision.max_num_tiles) == 0).long()[None, None]
    return {"pixel_values": torch.randn(1, *size, generator=generator)} | rest


def _count_places(model: Any, image: dict) -> int:
    """Tokens that stand in a text for an image; one for models that attend to images elsewhere (Mllama)."""
    import torch

    read = getattr(model, "get_image_features", None) or getattr(model.base_model, "get_image_features", None)
    if read is None:
        return 1
    takes = inspect.signature(read).parameters
    with torch.no_grad():
        found = read(**{key: value for key, value in image.items() if key in takes})
    found = getattr(found, "pooler_output", found)
    parts = found if isinstance(found, (list, tuple)) else [found]
    return sum(part.numel() for part in parts) // model.config.get_text_config().hidden_size


def _parameters(model: Any) -> set[str]:
    return set(inspect.signature(model.forward).parameters)


def _side(size: int | list[int] | tuple[int, ...]) -> int:
    return size if isinstance(size, int) else size[0]


def _image_token(config: Any) -> int | None:
    """The number of the token that stands for an image in a text; None: the config names none."""
    found = (getattr(config, name, None) for name in ("image_token_id", "image_token_index"))
    return next((token for token in found if isinstance(token, int)), None)


def _end_rows(ids: torch.Tensor, config: Any) -> torch.Tensor:
    """The ids (..., length), with the end-of-sequence token at the end alone: BART and T5 classify there."""
    eos = getattr(config, "eos_token_id", None)  # a custom config need not have one
    eos = eos[0] if isinstance(eos, (list, tuple)) else eos
    if eos is not None and 0 <= eos < config.vocab_size:
        ids[ids == eos] = (eos + 1) % config.vocab_size
        ids[..., -1] = eos
    return ids


def run(model: Any, inputs: dict) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """(floating-point outputs of the model by name, 8 greedily generated tokens per row or None)."""
    import torch

    with torch.no_grad():
        outputs = model(**inputs, return_dict=True).items()  # some, such as caches, are not tensors
        tensors = {k: v for k, v in outputs if isinstance(v, torch.Tensor) and v.is_floating_point()}
        tokens = None
        if model.can_generate() and "input_ids" in inputs:
            prompt = {k: v[:, :8] for k, v in inputs.items() if not k.startswith("decoder")}
            prompt = inputs if "pixel_values" in inputs else prompt
            limits = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "num_beams": 1}
            tokens = model.generate(**prompt, **limits, pad_token_id=0)[:, -8:]
    return tensors, tokens


def compare(
    found: dict[str, torch.Tensor],
    expected: dict[str, torch.Tensor],
    found_tokens: torch.Tensor | None,
    expected_tokens: torch.Tensor | None,
) -> dict:
    """Differences of two results of `run`, in float64, the largest of any output; None: it is not finite."""
    import torch

    relative, absolute, same = [], [], []
    for name, tensor in expected.items():
        theirs, ours = tensor.double(), found[name].double()
        difference = torch.where(theirs == ours, 0.0, theirs - ours)  # infinities may be equal
        norm = torch.linalg.vector_norm(difference)
        relative.append((norm / torch.linalg.vector_norm(theirs) if norm else norm).item())
        absolute.append(difference.abs().max().item())
        if name.endswith("logits"):
            same.append((ours.argmax(-1) == theirs.argmax(-1)).flatten().double())
    greedy = None
    if expected_tokens is not None:
        assert found_tokens is not None  # of the same class of models
        greedy = (found_tokens == expected_tokens).double().mean().item()
    return {
        "relative_difference": _largest(relative),
        "max_difference": _largest(absolute),
        "top1_agreement": torch.cat(same).mean().item() if same else None,
        "greedy_agreement": greedy,
    }


def _largest(values: list[float]) -> float | None:
    return max(values) if all(map(math.isfinite, values)) else None


if __name__ == "__main__":
    print(json.dumps(main()))
