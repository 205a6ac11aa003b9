"""Every row of the family table, by every head of its Auto classes, against the stock model."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from helpers.models import (
    HEADS,
    MODEL_TYPES,
    VARIANT_CASES,
    assert_same_outputs,
    break_one_ffn,
    generative,
    load_pair,
    router_name,
)
from helpers.selection import quick
from helpers.tiny import LAYERS, make_inputs, outputs, save_tiny

from mpoe_convert import Recipe, convert
from mpoe_convert.source.architecture import heads

SMALL = {"experts": 3, "bond_dim": 4}


def check_gradients(model, model_type: str, inputs: dict) -> None:
    """They reach every expert tensor."""
    model(**inputs).logits.square().mean().backward()
    experts = [(n, p) for n, p in model.named_parameters() if ".aux_" in n or ".central_" in n]
    assert len(experts) >= 3 * 2 * LAYERS or model_type == "albert"
    assert [name for name, parameter in experts if parameter.grad is None] == []


def check_config(model, model_type: str, out: Path) -> None:
    """It names our types and all heads, and the model has it."""
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == f"mpoe_{model_type}"
    assert set(config["auto_map"]) == {"AutoConfig", *heads(model_type)}
    assert model.config.mpoe == config["mpoe"]


# Of most families one head every time; all heads of three wirings.
ALL_HEADS = ("gpt2", "bert", "t5")
QUICK_HEADS = quick(HEADS, lambda model_type, auto: auto == generative(model_type) or model_type in ALL_HEADS)


@pytest.mark.parametrize(("model_type", "auto_class"), QUICK_HEADS)
def test_every_head_computes_and_learns_as_the_stock_head(model_type, auto_class, tmp_path):
    folder = save_tiny(model_type, auto_class, tmp_path / "dense")
    convert(Recipe(str(folder), noise=0.0, **SMALL), tmp_path / "out")
    dense, model = load_pair(folder, tmp_path / "out", auto_class)
    inputs = make_inputs(dense, auto_class)
    assert_same_outputs(dense, model, inputs)
    if auto_class == generative(model_type):
        check_gradients(model, model_type, inputs)
        check_config(model, model_type, tmp_path / "out")
    break_one_ffn(model)
    with pytest.raises(AssertionError):
        assert_same_outputs(dense, model, inputs)


@pytest.mark.parametrize(("model_type", "variant"), [case for case in VARIANT_CASES if case[1]])
def test_variants_of_a_family(model_type, variant, tmp_path):
    auto_class = generative(model_type)
    folder = save_tiny(model_type, auto_class, tmp_path / "dense", variant)
    convert(Recipe(str(folder), noise=0.0, **SMALL), tmp_path / "out")
    dense, model = load_pair(folder, tmp_path / "out", auto_class)
    assert_same_outputs(dense, model, make_inputs(dense, auto_class))


def keeps_float32(model_type: str) -> bool:
    """Whether transformers loads a part of the stock model in float32 where float16 is asked for."""
    stock = getattr(transformers, heads(model_type)[generative(model_type)])
    return bool(stock._keep_in_fp32_modules)


# float16 differs from bfloat16 where stock models keep a part in float32; of the others three stand for all.
HALVES = [(model_type, torch.bfloat16) for model_type in MODEL_TYPES]
HALVES += [(t, torch.float16) for t in MODEL_TYPES if keeps_float32(t) or t in ("gpt2", "llama", "bert")]


@pytest.mark.parametrize(("model_type", "dtype"), HALVES)
def test_half_precision_is_as_close_to_float32_as_the_stock_model(model_type, dtype, tmp_path):
    """Rounding the cores costs no more than a small multiple of what the dtype costs the stock model."""
    auto_class = generative(model_type)
    folder = save_tiny(model_type, auto_class, tmp_path / "dense", dtype=dtype)
    convert(Recipe(str(folder), noise=0.0, **SMALL), tmp_path / "out")
    dense, model = load_pair(folder, tmp_path / "out", auto_class, dtype=dtype)
    exact = getattr(transformers, auto_class).from_pretrained(folder, dtype=torch.float32).eval()
    inputs = make_inputs(exact, auto_class)
    truth = outputs(exact, inputs)["logits"]
    half = inputs | {k: v.to(dtype) for k, v in inputs.items() if v.is_floating_point()}

    def distance(other):
        return (outputs(other, half)["logits"].float() - truth).norm() / truth.norm()

    assert model.get_parameter(router_name(model)).dtype == torch.float32
    assert distance(model) < 4 * distance(dense) + torch.finfo(dtype).eps
