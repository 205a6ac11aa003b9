"""What transformers' files say of stock models without being imported, beside what the models say."""

import json
import sys
from dataclasses import replace
from importlib.metadata import version

import pytest
import transformers
from helpers.tiny import VARIANTS, make_config, save_tiny
from packaging.version import Version
from torch import nn
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from mpoe_convert import Recipe, plan
from mpoe_convert.errors import MpoeError
from mpoe_convert.source import stock_shapes
from mpoe_convert.source.architecture import Architecture, _heads, heads
from mpoe_convert.source.safetensors_file import TensorInfo
from mpoe_convert.source.stand_ins import UnknownError, stub
from mpoe_convert.source.state_dict import is_buffer

# The others are asked of the models themselves: their attention, or their renames, are not stood in for.
KNOWN = (
    *("gpt2", "openai-gpt", "gpt_bigcode", "starcoder2", "codegen", "bloom", "phi", "phi3", "glm", "llama"),
    *("mistral", "qwen2", "qwen3", "smollm3", "olmo", "olmo2", "olmo3", "gemma", "gemma2", "gemma3_text"),
    *("granite", "stablelm", "cohere", "cohere2", "helium", "exaone4", "ministral", "opt", "xglm", "bart"),
    *("mbart", "pegasus", "marian", "blenderbot", "blenderbot-small", "m2m_100", "plbart", "bert", "roberta"),
    *("xlm-roberta", "camembert", "electra", "deberta-v2", "mpnet", "modernbert", "distilbert", "albert"),
    *("t5", "mt5", "umt5"),
)
# Variants of them that are not: a kind of layer that others have not.
UNKNOWN = {("deberta-v2", 1)}
MAIN = ("LMHeadModel", "ForCausalLM", "ForConditionalGeneration", "MTModel", "ForMaskedLM")
THOROUGH = ("gpt2", "t5", "bart")


@pytest.fixture(autouse=True)
def ask_the_files(monkeypatch):
    """Also in this process, where the models are imported."""
    monkeypatch.setattr(stock_shapes, "_has_models", lambda: False)


def config_of(model_type: str, head: str, variant: int = 0) -> dict:
    return json.loads(make_config(model_type, variant).to_json_string()) | {"architectures": [head]}


def cases(model_type: str) -> list[tuple[str, int]]:
    """(head, variant): the head of most checkpoints in all variants, or all heads."""
    names = list(dict.fromkeys(heads(model_type).values()))
    main = [name for name in names if name.endswith(MAIN)][:1] or names[:1]
    variants = range(len(VARIANTS.get(model_type, [{}])))
    all_heads = [(name, 0) for name in names if model_type in THOROUGH and name != main[0]]
    return all_heads + [(main[0], variant) for variant in variants]


def stock(config: dict):
    return Architecture(config).build(getattr(transformers, config["architectures"][0]))


@pytest.mark.parametrize("model_type", KNOWN)
def test_what_is_answered_is_what_the_model_says(model_type):
    """Names, shapes, ties, layers and their order."""
    for head, variant in cases(model_type):
        config = config_of(model_type, head, variant)
        shapes, model = stock_shapes.stock_shapes(config), stock(config)
        if shapes is None:
            assert (model_type, variant) in UNKNOWN, (head, variant)
            continue
        expected = {name: tuple(each.shape) for name, each in model.named_parameters(remove_duplicate=False)}
        assert list(shapes.parameters.items()) == list(expected.items()), head
        assert shapes.buffers.keys() == model.state_dict().keys() - expected.keys(), head
        assert shapes.ties == model.all_tied_weights_keys, head
        assert shapes.prefix == (model.base_model_prefix if model.base_model is not model else ""), head
        found = [(path, each) for path, each in model.named_modules()]
        found = [(path, each) for path, each in found if isinstance(each, (nn.Linear, Conv1D, nn.Conv2d))]
        assert list(shapes.products) == [(path, each.weight.numel()) for path, each in found], head


@pytest.mark.parametrize("model_type", ["gpt2", "t5", "bert", "qwen2", "xlm-roberta", "gemma3_text"])
def test_heads_and_configs_have_the_names_that_transformers_gives_them(model_type):
    assert list((stock_shapes.stock_heads(model_type) or {}).items()) == list(_heads(model_type).items())
    assert stock_shapes.stock_config_name(model_type) == transformers.CONFIG_MAPPING[model_type].__name__


def test_processors_have_the_names_that_transformers_gives_them():
    assert stock_shapes.stock_processors() == dict(PROCESSOR_MAPPING_NAMES)


def test_nothing_of_the_files_stays_in_the_list_of_modules():
    config = config_of("gpt2", "GPT2LMHeadModel")
    before = set(sys.modules)
    assert stock_shapes.stock_shapes(config) is not None
    assert set(sys.modules) == before


# --------------------------------------------------------------------------------------- what is not certain


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "float33"},
        {"n_head": 3},
        {"n_embd": "16"},
        {"resid_pdrop": 1.5},
        {"initializer_range": -1.0},
        {"activation_function": "no_such"},
        {"attn_implementation": "no_such"},
        {"gradient_checkpointing": True},
        {"dtype": {"": "float32"}},
        {"architectures": ["NoSuchModel"]},
        {"architectures": ["BertModel"]},
        {"architectures": []},
        {"model_type": "no_such"},
    ],
    ids=str,
)
def test_what_transformers_refuses_or_may_build_otherwise_is_not_answered(change):
    assert stock_shapes.stock_shapes(config_of("gpt2", "GPT2LMHeadModel") | change) is None


def test_a_release_that_was_not_tried_is_not_asked(monkeypatch):
    config = config_of("gpt2", "GPT2LMHeadModel")
    monkeypatch.setattr(stock_shapes, "version", lambda package: "5.17.1")
    assert stock_shapes.stock_shapes(config) is None
    first, last = map(Version, stock_shapes.TRIED)
    monkeypatch.setattr(stock_shapes, "version", lambda package: f"{last}.3")
    assert stock_shapes.stock_shapes(config) is not None
    monkeypatch.setattr(stock_shapes, "version", lambda package: f"{last.major}.{last.minor + 1}.0")
    assert stock_shapes.stock_shapes(config) is None
    assert stock_shapes.stock_heads("gpt2") is None


def test_the_installed_release_is_tried():
    """Raise the bound once the tests of this file pass with a new release."""
    first, last = map(Version, stock_shapes.TRIED)
    assert (
        first <= Version(version("transformers"))
        and Version(version("transformers")).release[:2] <= last.release
    )


# ------------------------------------------------------------------------------------------ which tensors fit


def headers(model) -> dict[str, TensorInfo]:
    """Of the tensors that `save_pretrained` writes: ties once."""
    tied = set(model.all_tied_weights_keys)
    return {
        name: TensorInfo(name, "float32", tuple(tensor.shape), "model.safetensors")
        for name, tensor in model.state_dict().items()
        if name not in tied
    }


@pytest.mark.parametrize(
    ("model_type", "head"),
    [("gpt2", "GPT2LMHeadModel"), ("bart", "BartForConditionalGeneration"), ("bert", "BertModel")],
)
def test_a_whole_checkpoint_fits_and_no_other(model_type, head):
    config = config_of(model_type, head)
    model, shapes = stock(config), stock_shapes.stock_shapes(config)
    tensors = headers(model)
    assert shapes.holds_all(tensors, is_buffer)
    prefix = f"{shapes.prefix}."
    bare = {name.removeprefix(prefix): info for name, info in tensors.items()}
    assert shapes.holds_all(bare, is_buffer)
    mask = TensorInfo("h.0.attn.bias", "float32", (1, 1, 4, 4), "model.safetensors")
    assert shapes.holds_all(tensors | {mask.name: mask}, is_buffer)
    for name, info in tensors.items():
        less = {other: each for other, each in tensors.items() if other != name}
        assert shapes.holds_all(less, is_buffer) == (name in shapes.buffers), name
        for changed in (replace(info, shape=(*info.shape, 1)), replace(info, dtype="float33")):
            assert not shapes.holds_all(tensors | {name: changed}, is_buffer), name
    extra = replace(mask, name="more.weight")
    assert not shapes.holds_all(tensors | {extra.name: extra}, is_buffer)
    if bare.keys() != tensors.keys():
        twice = next(iter(bare.keys() - tensors.keys()))
        assert not shapes.holds_all(tensors | {twice: bare[twice]}, is_buffer)


def test_a_plan_refuses_what_the_model_refuses(tmp_path, monkeypatch):
    """In the words of the check that asks the model itself; what fits is not checked a second time."""
    folder = save_tiny("gpt2", "AutoModelForCausalLM", tmp_path / "dense")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for key, value, message in (
        ("n_positions", 65, r"wpe.weight has the shape \[64, 16\], and config.json asks for \[65, 16\]"),
        ("add_cross_attention", True, "the checkpoint lacks 'transformer.h.0.crossattention.c_attn.bias'"),
        ("n_head", 3, "transformers cannot build a gpt2 from this config.json"),
    ):
        (folder / "config.json").write_text(json.dumps(config | {key: value}), encoding="utf-8")
        with pytest.raises(MpoeError, match=message):
            plan(Recipe(str(folder), experts=2))
    monkeypatch.setattr("mpoe_convert.source.state_dict.check_state_dict", None)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert plan(Recipe(str(folder), experts=2)).totals.dense_flops_per_token > 0


# -------------------------------------------------------------------------------------------------- stubs


def test_a_stub_is_anything_but_a_value():
    found = stub("Found")
    assert found.other is not None and found("a name")(int) is int and isinstance(found | None, object)
    child = type("Child", (found,), {"size": 3})
    assert child().size == 3 and isinstance(child(), child)
    for question in (
        lambda: bool(found),
        lambda: list(found),
        lambda: found == 1,
        lambda: isinstance(1, found),
        lambda: issubclass(int, found),
        lambda: found < 1,
        lambda: found + 1,
        lambda: len(found),
    ):
        with pytest.raises((UnknownError, TypeError)):
            question()
