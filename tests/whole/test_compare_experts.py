"""Contenders of the benchmark that compares experts: each can be made, and each system has one."""

import pytest
from helpers.modules import BENCHMARKS, load_module
from transformers import LlamaConfig, LlamaForCausalLM

from mpoe_convert import plan

compare = load_module(BENCHMARKS / "compare_experts.py")


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Stories, with a model whose FFN has the shape of that of llama-stories260k."""
    found = compare.Stories()
    found.model = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 64, "intermediate_size": 172, "vocab_size": 16, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(num_attention_heads=8, **sizes)).save_pretrained(found.model)
    return found


def test_every_contender_can_be_made(task):
    for recipe, _, _ in compare.contenders(task).values():
        if recipe is not None:
            plan(compare.recipe_of(task, recipe, seed=0))


def test_every_system_has_one_contender(task):
    found = [system for name in compare.contenders(task) if (system := compare.system_of(name))]
    assert sorted(found) == sorted(compare.SYSTEMS.values())
    assert compare.system_of("blocks 16, balance 0.01") is None
