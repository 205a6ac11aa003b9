"""Rounded cores: the integers, how they lie in files, and artifacts that hold them."""

import json

import pytest
import torch
from click.testing import CliRunner
from helpers.models import stored
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from mpoe_convert import Export, Finetuning, Recipe, convert, export, finetune, plan
from mpoe_convert.artifact.reader import open_artifact
from mpoe_convert.artifact.rounding import group_size, pack, read_core, round_core, stored_specs, unpack
from mpoe_convert.cli import main
from mpoe_convert.errors import RecipeError, TrainingError

SIZES = {
    "vocab_size": 48,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
RECIPES = {
    "mpo": {"experts": 2, "bond_dim": 8, "noise": 0.1},
    "dense": {"experts": 2, "kind": "dense", "noise": 0.1},
    "mixture": {},
}


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bits", [4, 8])
def test_integers_lie_in_their_bits(bits):
    """Each in `bits` bits of a word, the first in the lowest, shifted by half the range."""
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, 40), dtype=torch.int8)
    words, per_word = pack(codes, bits), 32 // bits
    assert words.dtype == torch.int32 and words.shape == (5, 40 * bits // 32)
    for row in range(5):
        for col in range(40):
            word = int(words[row, col // per_word]) % 2**32
            assert (word >> bits * (col % per_word)) % 2**bits == int(codes[row, col]) + 2 ** (bits - 1)
    assert torch.equal(unpack(words, bits, 40), codes)


def test_rows_that_fill_no_word_are_padded():
    codes = torch.arange(-3, 4, dtype=torch.int8).reshape(1, 7)
    assert pack(codes, 8).shape == (1, 2) and torch.equal(unpack(pack(codes, 8), 8, 7), codes)


@pytest.mark.parametrize(("bits", "levels"), [(8, 127), (4, 7)])
@pytest.mark.parametrize("shape", [(64, 40), (3, 32, 40)])
def test_no_number_moves_by_more_than_half_a_step(shape, bits, levels):
    core = randn(*shape)
    made, exact = round_core("core", core, bits)
    assert {name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in made.items()} == (
        stored_specs("core", shape, "float32", bits)
    )
    largest = core.abs().amax(-2, keepdim=True)  # of a column of the core, or of a part of it
    step = (largest / levels).expand_as(core)
    assert ((exact - core).abs() <= step / 2 * (1 + 1e-5)).all() and not torch.equal(exact, core)
    experts = shape[0] if len(shape) == 3 else None
    torch.testing.assert_close(read_core(made.__getitem__, "core", bits, experts), exact, rtol=0, atol=0)


def test_zeros_stay():
    made, exact = round_core("core", torch.zeros(32, 32), 4)
    assert not exact.any() and all(t.isfinite().all() for t in made.values())


def test_groups_divide_rows():
    assert [group_size("core", width, 4) for width in (128, 96, 48, 200)] == [64, 32, 16, 8]
    assert group_size("core", 100, 8) == 100
    with pytest.raises(
        RecipeError, match=r"core has 100 inputs, which no group of 64, 32, 16, 8 divides; exp"
    ):
        group_size("core", 100, 4)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(source, the artifact as it is, the artifact rounded, its report) of a recipe, made once."""
    root, known = tmp_path_factory.mktemp("rounded"), {}

    def make(name, bits=4):
        source = root / ("mixtral" if name == "mixture" else "llama")
        if not source.exists():
            torch.manual_seed(0)
            config = (MixtralConfig if name == "mixture" else LlamaConfig)(
                **SIZES, **({"num_local_experts": 4} if name == "mixture" else {})
            )
            (MixtralForCausalLM if name == "mixture" else LlamaForCausalLM)(config).save_pretrained(source)
        if (name, bits) not in known:
            whole, rounded = root / name, root / f"{name}-{bits}"
            if not whole.exists():
                convert(Recipe(str(source), **RECIPES[name]), whole)
            report = convert(Recipe(str(source), **RECIPES[name], bits=bits), rounded)
            known[name, bits] = source, whole, rounded, report
        return known[name, bits]

    return make


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", RECIPES)
def test_files_hold_what_the_plan_says(name, bits, made):
    _, whole, rounded, report = made(name, bits)
    tensors, before = stored(rounded), stored(whole)
    assert report.plan.totals.stored_bytes == sum(t.nbytes for t in tensors.values())
    assert sum(t.nbytes for t in tensors.values()) < sum(t.nbytes for t in before.values())
    same = tensors.keys() & before.keys()
    assert all(torch.equal(tensors[key], before[key]) for key in same)
    packed = {key.partition(".weight_packed")[0] for key in tensors if key.endswith("weight_packed")}
    assert len(packed) == len(tensors.keys() - same) / 3
    written = json.loads((rounded / "conversion_report.json").read_text())
    assert written["rounding"]["bits"] == bits
    config = json.loads((rounded / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"


@pytest.mark.parametrize("name", RECIPES)
def test_matrices_come_from_the_rounded_cores(name, made):
    """And the report says how far they are from those that were not rounded."""
    _, whole, rounded, report = made(name)
    before, after = open_artifact(str(whole)), open_artifact(str(rounded))
    for old, new in zip(before.mixtures, after.mixtures, strict=True):
        for role in new.roles:
            lost = energy = 0.0
            for expert in range(after.num_experts):
                exact = before.matrix(old, role, {expert: 1.0})
                lost += (after.matrix(new, role, {expert: 1.0}) - exact).square().sum()
                energy += exact.square().sum()
            assert report.rounding[f"{new.key}.{role}"] == pytest.approx(
                float(lost / energy) ** 0.5, rel=1e-4
            )
            assert 0.01 < report.rounding[f"{new.key}.{role}"] < 0.2


def test_dense_cores_are_the_source_rounded_in_groups(made):
    """Worked out with torch alone: one group of 64 (32) entries of a row of the source's weight at a time."""
    source, _, rounded, _ = made("dense")
    name = "model.layers.0.mlp.down_proj.weight"
    weight = load_file(source / "model.safetensors")[name]  # (64, 96): groups of 32
    expected = weight.clone()
    for row in range(64):
        for start in range(0, 96, 32):
            part = weight[row, start : start + 32]
            step = part.abs().max() / 7
            expected[row, start : start + 32] = (part / step).round() * step
    artifact = open_artifact(str(rounded))
    found = artifact.matrix(artifact.mixtures[0], "down", {0: 1.0})
    torch.testing.assert_close(found.T, expected, rtol=0, atol=1e-6)


def test_a_dense_export_has_the_rounded_matrices(made, tmp_path):
    _, _, rounded, _ = made("mpo")
    export(str(rounded), tmp_path / "dense", Export(to="dense", expert=0, check=False))
    artifact = open_artifact(str(rounded))
    weights = load_file(tmp_path / "dense" / "model.safetensors")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in config
    expected = artifact.matrix(artifact.mixtures[0], "up", {0: 1.0})
    torch.testing.assert_close(weights["model.layers.0.mlp.up_proj.weight"].T, expected, rtol=0, atol=1e-6)


def test_training_is_refused(made, tmp_path):
    _, _, rounded, _ = made("mpo")
    text = tmp_path / "text.txt"
    text.write_text("some words\n" * 50)
    with pytest.raises(
        TrainingError, match=r"has rounded weights \(compressed-tensors\), which cannot be tra"
    ):
        finetune(Finetuning(str(rounded), data=[str(text)]), tmp_path / "out")


def test_plans_show_the_source_rounded_alone(made):
    """64 x 96 in three matrices of two layers: half a byte each, and a scale of 4 bytes per group."""
    source, *_ = made("mpo")
    groups = 2 * (96 + 96 + 64 * 3)  # rows of 64 have one group, those of 96 have three of 32
    expected = 2 * 3 * 64 * 96 // 2 + 4 * groups
    done = CliRunner().invoke(main, ["plan", str(source), "--experts", "2", "--bond-dim", "8", "--json"])
    assert json.loads(done.stdout)["rounded_source_bytes"]["4"] == expected
    shown = CliRunner().invoke(
        main, ["plan", str(source), "--experts", "2", "--bond-dim", "8", "--bits", "4"]
    )
    assert "the source's matrices, only rounded, take" in " ".join(shown.stdout.split())


def test_calibration_names_the_library_that_it_needs(made, tmp_path, monkeypatch):
    source, *_ = made("mpo")
    text = tmp_path / "text.txt"
    text.write_text("some words\n" * 50)
    monkeypatch.setattr("mpoe_convert.extras.find_spec", lambda name: None)
    done = CliRunner().invoke(
        main,
        [str(source), "--bits", "4", "--keep", "0.8", "--calibrate", str(text), "-o", str(tmp_path / "out")],
    )
    assert done.exit_code == 1
    assert "--bits with calibration needs compressed_tensors: install them with pip install" in done.stderr


def test_models_without_a_large_core_are_refused(tiny_gpt2):
    with pytest.raises(RecipeError, match="bits is 4, and no core is large enough to be rounded"):
        plan(Recipe(str(tiny_gpt2), experts=2, bond_dim=4, bits=4))


def test_bits_are_8_or_4():
    with pytest.raises(RecipeError, match="bits is 6; expected 8 or 4"):
        Recipe("m", bits=6)
