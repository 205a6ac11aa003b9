"""Old checkpoints: the names and files of earlier releases convert to models that load whole."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from helpers.tiny import make_inputs, make_model, outputs
from safetensors.torch import load_file, save_file

from mpoe_convert import Recipe, convert

State = dict[str, torch.Tensor]


def save_dense(model, state: State, folder: Path, write=None) -> Path:
    """A checkpoint of `model`'s config and any state dict, as safetensors unless `write` says how."""
    folder.mkdir()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if write:
        write(state, folder)
    else:
        state = {name: tensor.clone().contiguous() for name, tensor in state.items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def saved_state(model, folder: Path) -> State:
    """What save_pretrained writes: current names, tied tensors once."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def stored(out: Path) -> State:
    return load_file(out / "model.safetensors")


def assert_converts(dense_folder: Path, auto_class: str, out: Path) -> State:
    """Both folders load by the Auto class, nothing missing, with equal outputs; the stored tensors."""
    convert(Recipe(str(dense_folder), experts=3, bond_dim=4, noise=0.0), out)
    assert_same_model(dense_folder, auto_class, out)
    return stored(out)


def assert_same_model(dense_folder: Path, auto_class: str, out: Path) -> None:
    auto = getattr(transformers, auto_class)
    dense = auto.from_pretrained(dense_folder).eval()
    model, info = auto.from_pretrained(out, trust_remote_code=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"], info
    inputs = make_inputs(dense, auto_class)
    expected, found = outputs(dense, inputs), outputs(model.eval(), inputs)
    assert expected.keys() == found.keys() and expected
    for name, tensor in expected.items():
        scale = tensor.abs().max().item()
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-5 * scale, msg=name)


def without_prefix(state: State, prefix: str) -> State:
    assert any(name.startswith(prefix) for name in state)
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def renamed(state: State, *pairs: tuple[str, str]) -> State:
    """Every pair has to apply somewhere, or the test would test nothing."""
    for old, new in pairs:
        assert any(old in name for name in state), old
        state = {name.replace(old, new): tensor for name, tensor in state.items()}
    return state


# ----------------------------------------------------------------------------------- names of tensors


def old_gpt2(state: State) -> State:
    state = without_prefix(state, "transformer.")
    mask = torch.ones(64, 64).tril().view(1, 1, 64, 64)
    return state | {f"h.{layer}.attn.bias": mask for layer in range(2)}


def old_gpt2_head(state: State) -> State:
    masks = {f"transformer.h.{layer}.attn.masked_bias": torch.tensor(-1e4) for layer in range(2)}
    return state | masks


def old_bert(state: State) -> State:
    return renamed(state, ("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))


def old_neox(state: State) -> State:
    if "lm_head.weight" in state:
        state = renamed(state, ("lm_head.weight", "embed_out.weight"))
    assert "embed_out.weight" in state
    for layer in range(2):
        prefix = f"gpt_neox.layers.{layer}.attention"
        state |= {
            f"{prefix}.bias": torch.ones(1, 1, 64, 64, dtype=torch.bool).tril(),
            f"{prefix}.masked_bias": torch.tensor(-torch.inf),
            f"{prefix}.rotary_emb.inv_freq": torch.ones(1),
        }
    return state


def old_opt(state: State) -> State:
    return without_prefix(state, "model.")


def without_bert_prefix(state: State) -> State:
    return without_prefix(state, "bert.")


SPELLINGS = {
    "gpt2-without-prefix": ("gpt2", "AutoModelForCausalLM", old_gpt2),
    "gpt2-masked-bias": ("gpt2", "AutoModelForCausalLM", old_gpt2_head),
    "bert-gamma-beta": ("bert", "AutoModelForMaskedLM", old_bert),
    "gpt_neox-embed_out": ("gpt_neox", "AutoModelForCausalLM", old_neox),
    "opt-without-model": ("opt", "AutoModelForCausalLM", old_opt),
}


@pytest.mark.parametrize("case", SPELLINGS)
def test_old_names(case, tmp_path):
    model_type, auto_class, respell = SPELLINGS[case]
    model = make_model(model_type, auto_class)
    state = respell(saved_state(model, tmp_path / "now"))
    folder = save_dense(model, state, tmp_path / "old")
    assert_converts(folder, auto_class, tmp_path / "out")


def test_the_old_names_reach_the_dense_model_too(tmp_path):
    """The oracle: with one renamed tensor changed, outputs are not those of the model as it is now."""
    model = make_model("bert", "AutoModelForMaskedLM")
    state = old_bert(saved_state(model, tmp_path / "now"))
    folder = save_dense(model, state, tmp_path / "old")
    convert(Recipe(str(folder), experts=3, bond_dim=4, noise=0.0), tmp_path / "out")
    changed = next(name for name in state if name.endswith("LayerNorm.gamma"))
    save_dense(model, state | {changed: state[changed] * 2}, tmp_path / "changed")
    with pytest.raises(AssertionError):
        assert_same_model(tmp_path / "changed", "AutoModelForMaskedLM", tmp_path / "out")


def test_a_bare_bert_loads_bare_and_under_a_head(tmp_path):
    """Saved from BertModel: no prefix. A head on top of it is new in both, the rest is not."""
    model = make_model("bert", "AutoModel")
    state = saved_state(model, tmp_path / "now")
    assert "embeddings.word_embeddings.weight" in state
    folder = save_dense(model, state, tmp_path / "old")
    assert_converts(folder, "AutoModel", tmp_path / "out")
    auto = transformers.AutoModelForSequenceClassification
    dense, expected = auto.from_pretrained(folder, output_loading_info=True)
    head, found = auto.from_pretrained(tmp_path / "out", trust_remote_code=True, output_loading_info=True)
    assert found["missing_keys"] == expected["missing_keys"] == {"classifier.weight", "classifier.bias"}
    inputs = make_inputs(dense, "AutoModelForSequenceClassification")
    pooled = [model.eval().base_model(**inputs).pooler_output for model in (dense, head)]
    torch.testing.assert_close(pooled[1], pooled[0], rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------- pytorch_model.bin


def write_bin(state: State, folder: Path) -> None:
    torch.save(state, folder / "pytorch_model.bin")


def write_legacy_bin(state: State, folder: Path) -> None:
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def write_sharded_bin(state: State, folder: Path) -> None:
    """As older releases did it: what shares a storage goes into one shard."""
    write_shards(state, folder, lambda name: state[name].ndim == 1)


def write_scattered_bin(state: State, folder: Path) -> None:
    """Every second tensor in the other shard, ties or not: the pickles cannot share storage."""
    names = sorted(state)
    write_shards(state, folder, lambda name: names.index(name) % 2 == 0)


def write_shards(state: State, folder: Path, is_first) -> None:
    weight_map = {}
    for number in (1, 2):
        part = {name: tensor for name, tensor in state.items() if is_first(name) == (number == 1)}
        file = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


BIN_WRITERS = [write_bin, write_legacy_bin, write_sharded_bin]
TIED = {
    ("gpt2", "AutoModelForCausalLM"): {"lm_head.weight", "transformer.wte.weight"},
    ("t5", "AutoModelForSeq2SeqLM"): {
        "shared.weight",
        "encoder.embed_tokens.weight",
        "decoder.embed_tokens.weight",
        "lm_head.weight",
    },
}


@pytest.mark.parametrize("write", BIN_WRITERS)
@pytest.mark.parametrize(("model_type", "auto_class"), TIED)
def test_bins_store_what_is_tied_once(model_type, auto_class, write, tmp_path):
    model = make_model(model_type, auto_class)
    state = model.state_dict()
    tied = TIED[model_type, auto_class]
    assert len({state[name].data_ptr() for name in tied}) == 1  # else the fixture ties nothing
    folder = save_dense(model, state, tmp_path / "old", write)
    tensors = assert_converts(folder, auto_class, tmp_path / "out")
    assert len(tied & set(tensors)) == 1


@pytest.mark.parametrize("write", BIN_WRITERS)
def test_a_bin_that_holds_the_tied_table_once_is_enough(write, tmp_path):
    model = make_model("t5", "AutoModelForSeq2SeqLM")
    tied = TIED["t5", "AutoModelForSeq2SeqLM"] - {"shared.weight"}
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    folder = save_dense(model, state, tmp_path / "old", write)
    tensors = assert_converts(folder, "AutoModelForSeq2SeqLM", tmp_path / "out")
    assert not tied & set(tensors)


@pytest.mark.parametrize("write", [None, *BIN_WRITERS])
def test_a_head_with_numbers_of_its_own_is_kept(write, tmp_path):
    """T5 v1.1: the config may say what it likes, the file holds two tables."""
    model = make_model("t5", "AutoModelForSeq2SeqLM", variant=1)
    state = model.state_dict()
    state["lm_head.weight"] = torch.randn(state["lm_head.weight"].shape, generator=seeded())
    folder = save_dense(model, state, tmp_path / "old", write)
    tensors = assert_converts(folder, "AutoModelForSeq2SeqLM", tmp_path / "out")
    torch.testing.assert_close(tensors["lm_head.weight"], state["lm_head.weight"], rtol=0, atol=0)
    assert "shared.weight" in tensors


@pytest.mark.parametrize("write", BIN_WRITERS)
def test_a_wrapped_bin_is_that_of_the_plain_model(write, tmp_path):
    """As `torch.save(ddp_model.state_dict())` leaves it: prefixes, and tied tensors twice."""
    model = make_model("gpt2", "AutoModelForCausalLM")
    plain = save_dense(model, model.state_dict(), tmp_path / "plain", write)
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    folder = save_dense(model, state, tmp_path / "old", write)
    outs = [tmp_path / "1", tmp_path / "2"]
    for dense, out in zip((plain, folder), outs, strict=True):
        convert(Recipe(str(dense), experts=3, bond_dim=4, noise=0.0), out)
    expected, found = map(stored, outs)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_ties_that_the_shards_tore_apart_still_load(tmp_path):
    model = make_model("t5", "AutoModelForSeq2SeqLM")
    folder = save_dense(model, model.state_dict(), tmp_path / "old", write_scattered_bin)
    assert_converts(folder, "AutoModelForSeq2SeqLM", tmp_path / "out")


def test_safetensors_made_from_the_same_model_give_the_same_tensors(tmp_path):
    """The file format of the source doesn't show in the artifact."""
    model = make_model("gpt2", "AutoModelForCausalLM")
    safe = saved_state(model, tmp_path / "now")
    first = assert_converts(save_dense(model, safe, tmp_path / "a"), "AutoModelForCausalLM", tmp_path / "1")
    state = model.state_dict()
    second = assert_converts(
        save_dense(model, state, tmp_path / "b", write_bin), "AutoModelForCausalLM", tmp_path / "2"
    )
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=0)


def test_the_weights_that_the_config_names_are_converted(tmp_path):
    """transformers reads that file, too; the artifact's own weights have the usual name."""
    model = make_model("llama", "AutoModelForCausalLM")
    state = saved_state(model, tmp_path / "now")
    folder = save_dense(model, {name: tensor + 1 for name, tensor in state.items()}, tmp_path / "old")
    save_file(state, folder / "b.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"transformers_weights": "b.safetensors"}))
    assert_converts(folder, "AutoModelForCausalLM", tmp_path / "out")
    assert "transformers_weights" not in json.loads((tmp_path / "out" / "config.json").read_text())
