"""Contenders of the benchmark that compares experts: each can be made, and each system has one."""

import importlib.util
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from mpoe_convert import plan


def load_benchmark():
    path = Path(__file__).parents[2] / "examples/benchmarks/compare_experts.py"
    spec = importlib.util.spec_from_file_location("compare_experts", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


compare = load_benchmark()


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
