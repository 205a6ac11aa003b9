"""What the stock class says of modules by name, on a model whose dense FFNs are gone."""

import inspect
import re

import pytest
import torch
import transformers
from helpers.models import generative, load
from helpers.selection import every
from transformers import GenerationMixin

from mpoe_convert.runtime.modeling_mpoe import subclass
from mpoe_convert.source.architecture import heads
from mpoe_convert.source.families import FAMILY_OF

PLANS = ("_tp_plan", "_ep_plan", "_pp_plan", "_fsdp_plan")
LISTS = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")


# An adapter stands beside whatever the FFN is; three wirings stand for all.
KINDS = [(t, "mpo") for t in FAMILY_OF] + [(t, "adapter") for t in ("gpt2", "llama", "t5")]


@pytest.mark.parametrize(("model_type", "kind"), every(3, KINDS))
def test_they_name_what_is_there_and_nothing_else(model_type, kind, artifact):
    folder, out = artifact(model_type, kind=kind)
    model = load(out, model_type)
    stock = getattr(transformers, generative(model_type)).from_pretrained(folder)
    names = [*dict(model.named_modules()), *model.state_dict()]
    for attribute in PLANS:
        plan, whole = (getattr(m, attribute, None) or {} for m in (model, stock))
        there = {
            pattern
            for pattern in whole
            if any(re.fullmatch(re.escape(pattern).replace(r"\*", r"\d+"), name) for name in names)
        }
        assert plan == {pattern: whole[pattern] for pattern in there}, attribute
    for attribute in LISTS:
        for part in getattr(model, attribute):
            assert any(part in name.split(".") for name in names), (attribute, part)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_router_is_declared_to_stay_in_float32(dtype, artifact):
    _, out = artifact("t5")
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(out, trust_remote_code=True, dtype=dtype)
    kept = model._keep_in_fp32_modules_strict | (
        model._keep_in_fp32_modules if dtype == torch.float16 else set()
    )
    for name, tensor in model.state_dict().items():
        expected = torch.float32 if kept & set(name.split(".")) else dtype
        assert tensor.dtype == expected, name
    assert "router" in kept


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "t5", "bert"])
def test_generation_is_among_the_bases(model_type, artifact):
    model = load(artifact(model_type)[1], model_type)
    assert (GenerationMixin in type(model).__bases__) == model.can_generate()


@pytest.mark.parametrize("model_type", FAMILY_OF)
def test_constructors_have_the_stock_signature(model_type):
    for name in heads(model_type).values():
        stock = getattr(transformers, name)
        assert inspect.signature(subclass(stock)) == inspect.signature(stock), name


def test_arguments_of_the_constructor_arrive(artifact):
    _, out = artifact("vit")
    model = transformers.AutoModel.from_pretrained(out, trust_remote_code=True, use_mask_token=True)
    assert model.embeddings.mask_token is not None
