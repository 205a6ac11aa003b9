"""Weights that no checkpoint brings: each family's own initialisation, as the stock class does it."""

from unittest.mock import patch

import pytest
import torch
import transformers
from helpers.models import generative
from helpers.selection import every
from transformers import initialization

from mpoe_convert.source.families import FAMILY_OF

STOCK = initialization.TORCH_INIT_FUNCTIONS
# The stock class of openai-gpt leaves its matrices to their constructor.
TYPES = [model_type for model_type in FAMILY_OF if model_type != "openai-gpt"]


def made(auto, config, way: str, **options):
    """A new model whose every parameter is full of the standard deviation that it would be drawn with."""

    def fill(tensor, mean=0.0, std=1.0, *args, **kwargs):
        return tensor.fill_(mean + std)

    with patch.dict(STOCK, normal_=fill, trunc_normal_=fill):
        if way == "made":
            return auto.from_config(config, **options)
        return type(auto.from_config(config, **options)).from_pretrained(None, config=config, state_dict={})


# Weights that are missing are drawn by the same method; some types stand for all.
WAYS = [(t, "made") for t in TYPES] + [
    (t, "missing") for t in ("gpt2", "llama", "gpt_neox", "bert", "t5", "vit")
]


@pytest.mark.parametrize(("model_type", "way"), every(4, WAYS))
def test_scales_are_the_familys_own(model_type, way, artifact):
    folder, out = artifact(model_type, experts=2)
    auto = getattr(transformers, generative(model_type))
    stock = made(auto, transformers.AutoConfig.from_pretrained(folder), way)
    config = transformers.AutoConfig.from_pretrained(out, trust_remote_code=True)
    model = made(auto, config, way, trust_remote_code=True)

    expected, found = stock.state_dict(), model.state_dict()
    drawn = {name for name, tensor in expected.items() if len(tensor.unique()) <= 2}  # a padding row is zero
    outside = drawn & found.keys()
    assert len(outside) > 5
    for name in outside:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0, msg=name)
    for path, ffn in model.mixtures():
        layer = stock.base_model.get_submodule(path.removesuffix("." + config.mpoe["family"]["slot"]))
        dense = dict(layer.named_parameters())
        paths = (config.mpoe["family"]["slot"], *config.mpoe["family"]["absorbed"])
        names = [n for n, p in dense.items() if p.ndim == 2 and any(n.startswith(f"{p}.") for p in paths)]
        for part, name in (("up", names[-2]), ("down", names[-1])):
            cores = dict(getattr(ffn, part).named_parameters())
            largest = max((c for n, c in cores.items() if ".central_" in n), key=torch.Tensor.numel)
            torch.testing.assert_close(largest.max(), dense[name].max(), rtol=0, atol=0, msg=path)


def test_what_a_model_has_is_not_drawn_again(artifact):
    _, out = artifact("gpt2")
    config = transformers.AutoConfig.from_pretrained(out, trust_remote_code=True)
    model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.post_init()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, msg=name)
