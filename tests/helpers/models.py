"""Models in pairs: dense and converted, loaded as users do, and compared."""

from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

from helpers import vision_language
from helpers.tiny import VARIANTS, VOCAB, make_inputs, outputs
from mpoe_convert.source.architecture import heads
from mpoe_convert.source.families import FAMILY_OF


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors in the weight files."""
    return {k: t for file in sorted(folder.glob("*.safetensors")) for k, t in load_file(file).items()}


def token_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def load(folder, model_type: str):
    auto = getattr(transformers, generative(model_type))
    return auto.from_pretrained(folder, trust_remote_code=True).eval()


def logits(model, model_type: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**make_inputs(model, generative(model_type))).logits


# Vision-language models have tests of their own, tests/source/test_vision_language.py.
MODEL_TYPES = [model_type for model_type in FAMILY_OF if model_type not in vision_language.CONFIGS]
HEADS = [(model_type, auto) for model_type in MODEL_TYPES for auto in heads(model_type)]


VARIANT_CASES = [(t, v) for t, variants in VARIANTS.items() for v in range(len(variants))]


def generative(model_type: str) -> str:
    """The head that the type is best known for."""
    known = heads(model_type)
    order = (
        "AutoModelForImageTextToText",
        "AutoModelForSeq2SeqLM",
        "AutoModelForCausalLM",
        "AutoModelForMaskedLM",
    )
    return next((auto for auto in order if auto in known), "AutoModelForImageClassification")


def load_pair(folder, out, auto_class, **options):
    """(stock model, converted model), loaded as users do, with nothing missing or left over."""
    auto = getattr(transformers, auto_class)
    dense = auto.from_pretrained(folder, **options).eval()
    model, info = auto.from_pretrained(out, trust_remote_code=True, output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return dense, model.eval()


def assert_same_outputs(dense, model, inputs, tolerance=2e-5):
    expected, found = outputs(dense, inputs), outputs(model, inputs)
    assert expected.keys() == found.keys() and expected
    for name, tensor in expected.items():
        scale = tensor.abs().max().item()
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=tolerance * scale, msg=name)


def break_one_ffn(model) -> None:
    """Double the largest shared core of the first mixture."""
    names = [name for name, _ in model.named_parameters() if ".central_" in name]
    with torch.no_grad():
        model.get_parameter(names[0]).mul_(2)


def router_name(model) -> str:
    return next(name for name, _ in model.named_parameters() if name.endswith("router.weight"))
