"""Rounded cores: the integers, how they lie in files, and artifacts that hold them."""

import json
import math
import re
import shutil
from itertools import accumulate

import pytest
import torch
from click.testing import CliRunner
from helpers.models import stored
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from mpoe_convert import Export, Finetuning, Recipe, convert, export, finetune, plan, verify
from mpoe_convert.artifact.inspect import inspect
from mpoe_convert.artifact.reader import open_artifact
from mpoe_convert.artifact.rounding import group_size, pack, read_core, round_core, stored_specs, unpack
from mpoe_convert.cli import main
from mpoe_convert.conversion.rounding import round_ffn
from mpoe_convert.errors import RecipeError, TrainingError
from mpoe_convert.planning.rounding import config_of, rounding_bytes

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
    # Each expert's cores in groups of their own; the first has less than 32 x 32 numbers.
    "sizes": {"experts": 3, "kind": "low-rank", "bond_dim": "6/32/48", "noise": 0.1},
    # Ranks that no number divides: 61 of 96 inputs are kept.
    "kept": {"experts": 2, "bond_dim": 2, "noise": 0.0, "keep": 0.95},
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
@pytest.mark.parametrize("shapes", [[(64, 40)], 3 * [(32, 40)], [(97, 40)], [(64, 40), (3, 40), (97, 40)]])
def test_no_number_moves_by_more_than_half_a_step(shapes, bits, levels):
    """Of one matrix, a stack, a longer row, and of experts that differ in size, whose core is a vector."""
    whole = (shapes[0], (len(shapes), *shapes[0]))[len(shapes) > 1]
    core = randn(*(whole if len(set(shapes)) == 1 else [sum(map(math.prod, shapes))]))
    layers = {f"core.{expert}": shape for expert, shape in enumerate(shapes)}
    made, exact = round_core(layers, core, bits)
    assert {name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in made.items()} == (
        stored_specs(layers, "float32", bits)
    )
    assert exact.shape == core.shape
    parts = zip(*(t.flatten().split(list(map(math.prod, shapes))) for t in (core, exact)), strict=True)
    for shape, (part, found) in zip(shapes, parts, strict=True):
        largest = part.view(shape).abs().amax(-2, keepdim=True)  # of a column of the core, or of a part of it
        step = (largest / levels).expand(shape)
        assert ((found - part).view(shape).abs() <= step / 2 * (1 + 1e-5)).all()
        assert not torch.equal(found, part)
    again = read_core(made.__getitem__, layers, bits, tuple(core.shape))
    torch.testing.assert_close(again, exact, rtol=0, atol=0)


def test_zeros_stay():
    made, exact = round_core({"core": (32, 32)}, torch.zeros(32, 32), 4)
    assert not exact.any() and all(t.isfinite().all() for t in made.values())


def test_groups_divide_every_row():
    """By trial: of the divisors from 32 to 128 none is nearer to 64; without one the row is whole."""
    for width in range(1, 700):
        size, allowed = group_size(width, 4), [d for d in range(32, 129) if width % d == 0]
        assert size in allowed or (not allowed and size == width)
        assert all(abs(size - 64) <= abs(d - 64) for d in allowed)
        assert group_size(width, 8) == width
    assert [group_size(width, 4) for width in (1536, 96, 200, 97, 211)] == [64, 48, 50, 97, 211]


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


def counted_bytes(shapes: dict, rounded: set, bits: int) -> int:
    """Of tensors by name; of rounded cores words, a scale of 4 bytes per group, and 16 bytes of a shape."""
    total = 0
    for name, shape in shapes.items():
        if name not in rounded:
            total += 4 * math.prod(shape)
            continue
        for width, rows in matrices_in(name, shape):
            group = width if bits == 8 else {64: 64, 96: 48}.get(width, width)
            total += rows * (4 * math.ceil(width * bits / 32) + 4 * width // group) + 16
    return total


def matrices_in(name: str, shape: tuple) -> list[tuple[int, int]]:
    """The matrices of a core; in a vector those of experts of the ranks 6, 32 and 48."""
    if len(shape) > 1:
        return math.prod(shape[:-2]) * [shape[-2:]]
    side = shape[0] // (6 + 32 + 48)
    return [(side, rank) if name.endswith("aux_0") else (rank, side) for rank in (6, 32, 48)]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", RECIPES)
def test_files_are_as_large_as_the_plan_says_and_as_counted(name, bits, made):
    """Bytes on disk, but for the header, against a count from the artifact that is not rounded."""
    _, whole, rounded, report = made(name, bits)
    tensors, before = stored(rounded), stored(whole)
    [file] = rounded.glob("*.safetensors")
    data = file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little")
    packed = [key for key in tensors if key.endswith("weight_packed")]
    packed = {re.sub(r"(\.\d+)?\.weight_packed$", "", key) for key in packed}
    ours = {key for key, t in before.items() if ".terms." in key and min(t.shape[-2:]) >= 32}
    assert packed == ours and packed
    assert data == counted_bytes({key: tuple(t.shape) for key, t in before.items()}, packed, bits)
    assert report.plan.totals.stored_bytes == data
    assert {tensor.name for tensor in report.plan.tensors} == tensors.keys()
    assert all(torch.equal(tensors[key], before[key]) for key in before.keys() - packed)
    assert json.loads((rounded / "conversion_report.json").read_text())["rounding"]["bits"] == bits
    config = json.loads((rounded / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    targets = [t.removeprefix("re:") for g in config["config_groups"].values() for t in g["targets"]]
    layers = [key.removesuffix(".weight_packed") for key in tensors if key.endswith("weight_packed")]
    assert all(sum(bool(re.match(target, layer)) for target in targets) == 1 for layer in layers)
    stacks = {layer.rpartition(".")[0] for layer in layers}  # a list of layers, or the chain: none is a layer
    assert not any(re.match(target, stack) for target in targets for stack in stacks)


@pytest.mark.parametrize("name", RECIPES)
def test_plans_know_the_bytes_of_what_is_written(name, made):
    source, _, _, report = made(name)
    planned = plan(Recipe(str(source), **RECIPES[name], bits=4))
    assert planned.ffn_totals.stored_bytes == report.plan.ffn_totals.stored_bytes
    assert planned.tensors == report.plan.tensors


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
            found = report.rounding.get(f"{new.key}.{role}", 0.0)
            assert found == pytest.approx(float(lost / energy) ** 0.5, rel=1e-4)
            assert 0.01 < found < 0.2 or not found
    assert report.rounding


def test_dense_cores_are_the_source_rounded_in_groups(made):
    """Worked out with torch alone: one group of 48 entries of a row of the source's weight at a time."""
    source, _, rounded, _ = made("dense")
    name = "model.layers.0.mlp.down_proj.weight"
    weight = load_file(source / "model.safetensors")[name]  # (64, 96)
    expected = weight.clone()
    for row in range(64):
        for start in range(0, 96, 48):
            part = weight[row, start : start + 48]
            step = part.abs().max() / 7
            expected[row, start : start + 48] = (part / step).round() * step
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
    arguments = ["finetune", str(rounded), "--data", str(text), "-o", str(tmp_path / "out"), "--quiet"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 1 and len(done.stderr.splitlines()) == 1 and "--bits" in done.stderr


def test_plans_show_the_source_rounded_alone(made):
    """64 x 96 in three matrices of two layers: half a byte each, and a scale of 4 bytes per group."""
    source, *_ = made("mpo")
    groups = 2 * (96 + 96 + 64 * 2)  # rows of 64 have one group, those of 96 have two of 48
    expected = 2 * 3 * 64 * 96 // 2 + 4 * groups
    done = CliRunner().invoke(main, ["plan", str(source), "--experts", "2", "--bond-dim", "8", "--json"])
    assert json.loads(done.stdout)["rounded_source_bytes"]["4"] == expected
    shown = CliRunner().invoke(
        main, ["plan", str(source), "--experts", "2", "--bond-dim", "8", "--bits", "4"]
    )
    # Per projection: the core of 64 x 96 is large; the two experts own 8 x 8 blocks on one side.
    share = 64 * 96 * 3 / (64 * 96 * 3 + 2 * (64 + 64 + 64) * 8 + 2 * 64)
    words = " ".join(shown.stdout.split())
    assert "of the numbers at 4 bits; the source's matrices, only rounded, take" in words
    found = float(re.search(r"([\d.]+)% of the numbers at 4 bits", words)[1])
    assert found == pytest.approx(100 * share, abs=3)


def test_the_memory_of_rounding_is_planned(made):
    """The largest sum of what is allocated and not yet freed, by torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    source, *_ = made("dense")
    for name, bits in (("dense", 4), ("dense", 8), ("mixture", 4)):
        source, _, _, report = made(name, bits)
        ffn = report.plan.ffns[0]
        tensors = {key: randn(*shape) for key, (shape, _) in ffn.tensors.items()}
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            round_ffn(ffn, tensors, bits)
        events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        held = list(accumulate(e.nbytes() for e in sorted(events, key=lambda event: event.start_ns())))
        assert 0.5 * rounding_bytes(ffn, bits) < max(held) <= rounding_bytes(ffn, bits)
    plain, planned = (plan(Recipe(str(source), bits=bits)) for bits in (None, 4))
    saved = plain.totals.stored_bytes - planned.totals.stored_bytes  # of the one weight file that is written
    assert planned.peak_bytes > plain.peak_bytes - saved


def test_a_large_rounding_raises_the_planned_peak():
    """Of twelve experts' whole matrices: as rounded, packed, and one in work."""
    from types import SimpleNamespace

    matrix = SimpleNamespace(
        name="m", num_experts=12, rows=64, cols=64, spec={"terms": [{"in_dims": [64], "out_dims": [64]}]}
    )
    matrix.spec["terms"][0] |= {"bonds": [], "shared": [False]}
    ffn = SimpleNamespace(matrices=[matrix], tensors={"m.terms.0.aux_0": ((12, 64, 64), "float32")})
    assert rounding_bytes(ffn, None) == 0
    assert rounding_bytes(ffn, 4) == 12 * 64 * 64 * 4 + 12 * 64 * 64 // 2 + 32 * 64 * 64


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


def test_where_nothing_is_large_nothing_is_rounded_and_it_is_said(tmp_path):
    torch.manual_seed(0)
    sizes = SIZES | {"hidden_size": 16, "intermediate_size": 24}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path / "llama")
    recipe = Recipe(str(tmp_path / "llama"), experts=2, bond_dim=4, bits=4)
    report = convert(recipe, tmp_path / "out")
    for warnings in (plan(recipe).warnings, report.warnings):
        assert [text for text in warnings if text.startswith("bits rounds nothing: no core has 32 x 32")]
    assert report.rounding == {} and report.to_json()["rounding"] is None
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert inspect(tmp_path / "out").bits is None


def load(folder, **options):
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **options
    )
    assert not any(info.values()), info
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(torch.arange(3, 33)[None]).logits


@pytest.mark.parametrize(
    ("name", "bits", "dtype"),
    [("mpo", 4, "float16"), ("kept", 4, "float32"), ("sizes", 4, "float32"), ("mixture", 8, "float32")],
)
def test_a_model_that_ran_is_saved_as_it_was_stored(name, bits, dtype, made, tmp_path):
    """Whole matrices, which the library makes in the first pass, are packed again."""
    pytest.importorskip("compressed_tensors")
    _, whole, rounded, _ = made(name, bits)
    model = load(rounded, dtype=getattr(torch, dtype))
    expected = logits(model)
    shutil.copytree(rounded, tmp_path / "again")
    model.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(load(tmp_path / "again")), expected, rtol=0, atol=0)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)  # it runs on
    before, after = open_artifact(str(rounded)), open_artifact(str(tmp_path / "again"))
    for old, new in zip(before.mixtures, after.mixtures, strict=True):
        expected = before.matrix(old, "up", {0: 1.0}).to(getattr(torch, dtype))
        torch.testing.assert_close(after.matrix(new, "up", {0: 1.0}), expected, rtol=2e-3, atol=1e-3)
    assert stored(tmp_path / "again").keys() == stored(rounded).keys()
    assert inspect(tmp_path / "again").bits == bits
    if name == "mixture":
        assert verify(tmp_path / "again").ok


@pytest.mark.parametrize("name", ["kept", "sizes"])
def test_the_library_makes_the_matrices_that_exports_do(name, made):
    """`Artifact.matrix` and compressed-tensors read the same numbers, in groups that fill no word."""
    pytest.importorskip("compressed_tensors")
    _, _, rounded, _ = made(name)
    model, artifact = load(rounded), open_artifact(str(rounded))
    logits(model)
    for mixture in artifact.mixtures:
        for role in mixture.roles:
            found = torch.zeros(mixture.size(role))
            for chain in model.get_submodule(mixture.key).get_submodule(role).terms:
                cores = [getattr(chain, core) for core in chain.core_names]
                found += chain._contract(cores, 1, torch.empty(0)).detach()
            torch.testing.assert_close(found, artifact.matrix(mixture, role, {1: 1.0}), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", RECIPES)
def test_inspect_counts_the_numbers_that_were_rounded(name, made):
    """As many parameters in every part as before rounding, in fewer bytes."""
    _, whole, rounded, report = made(name)
    before, after = inspect(whole), inspect(rounded)
    numbers = {part: count[1] for part, count in before.parts.items()}
    assert {part: count[1] for part, count in after.parts.items()} == numbers
    assert sum(c[2] for c in after.parts.values()) == report.plan.totals.stored_bytes
    assert (before.bits, after.bits) == (None, 4) and after.to_json()["bits"] == 4
    shown = " ".join(CliRunner().invoke(main, ["inspect", str(rounded)]).stdout.split())
    worst = max(report.rounding.values())
    assert f"rounded to 4 bits, which changes the matrices by up to {worst:.2e} of their norm" in shown
    assert "rounded to" not in CliRunner().invoke(main, ["inspect", str(whole)]).stdout


def test_bits_are_8_or_4():
    with pytest.raises(RecipeError, match="bits is 6; expected 8 or 4"):
        Recipe("m", bits=6)


def test_an_encoder_that_runs_before_its_model_has_matrices(tmp_path):
    """`generate` calls it first; and a model that was saved goes on as before."""
    pytest.importorskip("compressed_tensors")
    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "d_model": 64, "d_ff": 96, "d_kv": 32, "num_heads": 2, "num_layers": 1}
    config = T5Config(**sizes, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    convert(Recipe(str(tmp_path / "t5"), experts=2, bond_dim=8, bits=8), tmp_path / "out")
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    tokens = torch.arange(3, 15)[None]
    found = model.generate(tokens, max_new_tokens=4, do_sample=False)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(model.generate(tokens, max_new_tokens=4, do_sample=False), found)


def test_an_encoder_alone_has_layers_of_every_target(tmp_path):
    """compressed-tensors complains of targets that a model has no layer of."""
    sizes = {"vocab_size": 48, "d_model": 64, "d_ff": 96, "d_kv": 32, "num_heads": 2, "num_layers": 2}
    T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).save_pretrained(tmp_path / "t5")
    planned = plan(Recipe(str(tmp_path / "t5"), experts=2, bond_dim=8, bits=4))
    config = config_of(planned, 4)
    targets = [t.removeprefix("re:") for g in config["config_groups"].values() for t in g["targets"]]
    ends = (tensor.name.partition(".weight_packed") for tensor in planned.tensors)
    layers = [layer for layer, end, _ in ends if end]
    assert layers and all(sum(bool(re.match(target, layer)) for target in targets) == 1 for layer in layers)
    alone = [layer for layer in layers if layer.startswith("encoder.")]
    assert alone and all(any(re.match(target, layer) for layer in alone) for target in targets)
