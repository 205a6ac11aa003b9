"""Report, card and totals, recomputed from the artifact itself."""

import json
from math import prod

import pytest
import torch
from helpers.mixtures import randn
from helpers.tiny import save_tiny
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from mpoe_convert import Recipe, __version__, convert, plan
from mpoe_convert.conversion import build
from mpoe_convert.decomposition.blocks import fit_blocks
from mpoe_convert.decomposition.mpo import fit
from mpoe_convert.decomposition.sites import choose
from mpoe_convert.planning.plan import works_at_once

WAYS = [
    {"layout": "one-sided"},
    {"layout": "two-sided"},
    {"layout": "balanced", "bond_dim": 3, "neuron_order": "source"},
    {"kind": "dense"},
    {"layout": "one-sided", "sites": 5, "bond_dim": 8},
    {"bias": "per-expert", "dtype": "bfloat16"},
]


@pytest.fixture(params=WAYS, ids=str)
def converted(request, tmp_path):
    """(source, artifact, report as written) of a tiny GPT-2."""
    source = save_tiny("gpt2", "AutoModelForCausalLM", tmp_path / "tiny")
    options = {"experts": 3, "bond_dim": 4} | request.param
    convert(Recipe(str(source), **options), tmp_path / "out")
    report = json.loads((tmp_path / "out/conversion_report.json").read_text())
    return source, tmp_path / "out", report


def blocks_by_definition(tensors, name: str, expert: int, term: dict) -> torch.Tensor:
    """The layout of blocks: scales, a matrix per block, and the shared one, for inputs or for outputs."""
    of_inputs = term["shared"][-1]
    order = (0, 1, 2) if of_inputs else (2, 1, 0)
    scales, small = (tensors[f"{name}.terms.0.aux_{k}"][expert].double().flatten() for k in order[:2])
    block = term["in_dims"][1] if of_inputs else term["out_dims"][1]
    small = torch.block_diag(*small.reshape(-1, block, block))
    centre = tensors[f"{name}.terms.0.central_{order[2]}"].double()
    if not of_inputs:  # outputs are numbered (block, place in it)
        return centre.reshape(-1, len(scales)) @ small * scales
    rows = centre.reshape(block, -1, centre.shape[-1]).transpose(0, 1).reshape(len(scales), -1)
    found = small @ rows  # inputs are numbered (place in the block, block)
    found = found.reshape(-1, block, found.shape[-1]).transpose(0, 1).reshape(len(scales), -1)
    return scales[:, None] * found


def matrix_by_definition(tensors, name: str, expert: int, term: dict) -> torch.Tensor:
    """The expert's matrix by the definition: a product over the bonds, one entry of all sites at a time."""
    result, bonds = None, [1, *term["bonds"], 1]
    if "untied" in term:
        return blocks_by_definition(tensors, name, expert, term)
    for k, (in_dim, out_dim) in enumerate(zip(term["in_dims"], term["out_dims"], strict=True)):
        shared = f"{name}.terms.0.central_{k}"
        core = tensors[shared] if shared in tensors else tensors[f"{name}.terms.0.aux_{k}"][expert]
        core = core.double().reshape(bonds[k], in_dim, out_dim, bonds[k + 1])
        if result is None:
            result = core[0]  # (i, o, r)
            continue
        result = torch.tensordot(result, core, dims=1)  # (I, O, i, o, r)
        rows, cols, i, o, r = result.shape
        result = result.permute(0, 2, 1, 3, 4).reshape(rows * i, cols * o, r)
    return result[..., 0]


def test_errors_are_those_of_the_stored_tensors(converted):
    source, out, report = converted
    dense, tensors = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    config = json.loads((out / "config.json").read_text())
    form = config["mpoe"]["forms"][0]
    for matrix in report["matrices"]:
        role = matrix["name"].rpartition(".")[2]
        name = matrix["name"].removesuffix(role) + {"up": "c_fc", "down": "c_proj"}[role] + ".weight"
        found = matrix_by_definition(tensors, matrix["name"], 0, form[role]["terms"][0])
        expected = dense[name].double()
        error = ((found - expected).norm() / expected.norm()).item()
        assert matrix["relative_error"] == pytest.approx(error, rel=0.05, abs=2e-7)
        lost = sum(matrix["discarded_weight"]) ** 0.5
        assert matrix["relative_error_before_cast"] == pytest.approx(lost, rel=1e-3, abs=1e-6)
        clone = matrix_by_definition(tensors, matrix["name"], 1, form[role]["terms"][0])
        drift = ((clone - found).norm() / found.norm()).item()
        assert matrix["clone_drift"] == pytest.approx(drift, rel=0.5)  # from a sample of the rows
        assert 0 < drift < 0.1


def test_totals_are_those_of_the_files(converted):
    source, out, report = converted
    dense, tensors = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    totals = report["totals"]
    assert totals["dense_params"] == sum(t.numel() for t in dense.values())
    assert totals["stored_params"] == sum(t.numel() for t in tensors.values())
    assert totals["stored_bytes"] == sum(t.nbytes for t in tensors.values())
    ffn = [t for name, t in dense.items() if ".mlp." in name]
    routers = sum(t.numel() for name, t in tensors.items() if name.endswith("router.weight"))
    assert totals["ffn"]["dense_params"] == sum(t.numel() for t in ffn)
    more = totals["plain_moe_params"] - totals["dense_params"]
    assert more == 2 * sum(t.numel() for t in ffn) + routers
    own = sum(t.numel() for name, t in tensors.items() if ".aux_" in name)
    if report["recipe"]["bias"] == "per-expert" or report["recipe"]["kind"] == "dense":
        own += sum(t.numel() for name, t in tensors.items() if name.endswith((".up.bias", ".down.bias")))
    assert totals["active_params"] == totals["stored_params"] - own // 3  # two of three experts


@pytest.mark.parametrize("layout", ["one-sided", "two-sided"])
def test_flops_are_those_that_torch_counts(layout, tmp_path):
    source = save_tiny("llama", "AutoModelForCausalLM", tmp_path / "tiny")
    recipe = Recipe(str(source), experts=2, top_k=2, layout=layout, bond_dim=4, noise=0.0)
    totals = convert(recipe, tmp_path / "out").plan.totals
    tokens = torch.arange(16)[None]

    def counted(folder, **options) -> int:
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **options).eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(tokens)
        flops = counter.get_flop_counts()["Global"]
        attention = 2 * 2 * 2 * 2 * 16 * 16 * 8  # layers, products, multiply-add, heads, scores, head size
        return sum(flops.values()) - attention

    assert counted(source) == 16 * totals.dense_flops_per_token
    found = counted(tmp_path / "out", trust_remote_code=True)
    assert found == 16 * totals.flops_per_token + totals.rebuild_flops_per_forward


def test_card_is_valid_and_carries_the_licence(tmp_path, tiny_gpt2):
    (tiny_gpt2 / "README.md").write_text("---\nlicense: mit\nlanguage: [en, de]\ntags: [x]\n---\n# A model\n")
    (tiny_gpt2 / "LICENSE").write_text("MIT")
    report = convert(Recipe(str(tiny_gpt2), experts=2, bond_dim=4), tmp_path / "out")
    card = ModelCard.load(tmp_path / "out/README.md")
    assert report.license == card.data.license == "mit"
    assert report.to_json()["license"] == "mit"
    assert report.to_json()["version"] == __version__
    assert card.data.language == ["en", "de"]
    assert card.data.library_name == "transformers"
    assert {"mpoe", "moe", "gpt2"} <= set(card.data.tags)
    assert "trust_remote_code=True" in card.text
    assert all(f"`{matrix.name}`" in card.text for matrix in report.matrices)
    assert (tmp_path / "out/LICENSE").read_text() == "MIT"


def test_warnings_say_what_to_do(tmp_path, tiny_gpt2):
    def warnings(**options):
        recipe = Recipe(str(tiny_gpt2), **({"experts": 2, "bond_dim": 4} | options))
        return " ".join(convert(recipe, tmp_path / str(len(list(tmp_path.iterdir())))).warnings)

    assert warnings() == ""
    assert "will not work before it is retrained" in warnings(layout="balanced", bond_dim=1)
    assert "Lower noise" in warnings(noise=2.0)
    for layout in ("one-sided", "two-sided", "blocks"):  # every one that is exact
        assert layout in works_at_once()
    assert "Lower bond_dim" in warnings(bond_dim=16, experts=2)


def test_plan_reads_no_tensor_and_agrees_with_the_conversion(tmp_path, monkeypatch):
    source = save_tiny("t5", "AutoModelForSeq2SeqLM", tmp_path / "tiny", variant=1)
    recipe = Recipe(str(source), experts=3, bond_dim=4, max_shard_size="20KB")
    report = convert(recipe, tmp_path / "out")
    monkeypatch.setattr("mpoe_convert.source.checkpoint.Checkpoint.read", None)
    planned = plan(recipe)
    assert planned.totals == report.plan.totals
    assert len(planned.shards) > 2
    for file, names in planned.shards.items():
        tensors = load_file(tmp_path / "out" / file)
        assert set(tensors) == set(names)
        sizes = {t.name: prod(t.shape) for t in planned.tensors}
        assert all(tensor.numel() == sizes[name] for name, tensor in tensors.items())
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert model.num_parameters() == planned.totals.stored_params


def test_sharded_and_whole_artifacts_hold_the_same(tmp_path, tiny_gpt2):
    whole = convert(Recipe(str(tiny_gpt2), experts=2, bond_dim=4), tmp_path / "whole")
    parts = convert(Recipe(str(tiny_gpt2), experts=2, bond_dim=4, max_shard_size="10KB"), tmp_path / "parts")
    assert len(whole.plan.shards) == 1 < len(parts.plan.shards)
    expected = load_file(tmp_path / "whole/model.safetensors")
    found = {}
    for file in parts.plan.shards:
        found |= load_file(tmp_path / "parts" / file)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["blocks", "one-sided", "two-sided", "balanced"])
@pytest.mark.parametrize("size", [(24, 96), (96, 24)])
def test_the_error_by_pieces_is_that_of_the_whole_matrix(layout, size, monkeypatch):
    """Pieces cover the matrix once, and each lies beside its own part of the approximation."""
    monkeypatch.setattr(build, "_PIECE", 100)
    matrix = randn(*size, dtype=torch.float32)
    sites = choose(*size, layout=layout, num_sites=3, bond_dim=6)
    cores = fit_blocks(matrix, sites) if layout == "blocks" else list(fit(matrix, sites).cores)
    cores = [core + 0.01 * randn(*core.shape, seed=2, dtype=torch.float32) for core in cores]
    copies = [list(sites.copies) if layout == "blocks" else [1] * 3]
    whole = build._matrix_of([cores], copies, torch.float64)
    seen = torch.zeros_like(matrix)
    for part, own in build._cuts(matrix, [cores]):
        seen[part] += 1
        torch.testing.assert_close(
            build._matrix_of(own, copies, torch.float64), whole[part], rtol=1e-6, atol=1e-6
        )
    assert (seen == 1).all()
    expected = ((whole - matrix).norm() / matrix.norm()).item()
    assert build._error(matrix, [cores], copies) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("first", [0.0, 1e-30])
def test_samples_do_not_depend_on_what_the_first_rows_hold(first, monkeypatch):
    """Estimates from an eighth, of a matrix whose first eighth is zero or next to it, and of noise on it."""
    monkeypatch.setattr(build, "_PIECE", 96 * 64 // 8)
    matrix = randn(96, 64, dtype=torch.float32)
    matrix[:12] *= first
    noisy = matrix + 0.01 * randn(96, 64, seed=2, dtype=torch.float32)
    whole = ((noisy - matrix).norm() / matrix.norm()).item()
    ours, theirs = ([[each[None, :, :, None]]] for each in (matrix, noisy))
    assert build._error(matrix, theirs, [[1]], every=8) == pytest.approx(whole, rel=0.2)
    assert build._drift(matrix, (ours, [[1]]), (theirs, [[1]])) == pytest.approx(whole, rel=0.2)


def test_a_sample_of_zeros_is_not_taken_for_the_matrix(monkeypatch):
    monkeypatch.setattr(build, "_PIECE", 96 * 64 // 8)
    matrix = randn(96, 64, dtype=torch.float32)
    matrix[:12] = 0
    assert build._error(matrix, [[1.5 * matrix[None, :, :, None]]], [[1]], every=8) == pytest.approx(0.5)


def test_the_drift_of_a_matrix_whose_sample_is_zero_is_that_of_all():
    core = randn(1, 16, 24, 1, dtype=torch.float32)
    core[:, ::8] = core[:, :, ::8] = 0
    dense = core[0, :, :, 0]
    expected = build._drift(dense, ([[core]], [[1]]), ([[1.5 * core]], [[1]]))
    assert expected == pytest.approx(0.5)


@pytest.mark.parametrize("shape", [(4096, 16), (16, 4096)])
def test_of_large_matrices_the_drift_takes_fewer_rows_or_columns(shape, monkeypatch):
    """So many that they make up the numbers asked for: told by a matrix that differs in one line."""
    monkeypatch.setattr(build, "_SAMPLED", 4096 * 16 // 32)
    matrix = randn(*shape, dtype=torch.float32)
    lines = matrix if shape[0] > 16 else matrix.T
    for line, is_seen in ((32, True), (40, False)):
        other = matrix.clone()
        (other if shape[0] > 16 else other.T)[line] *= 2
        ours, theirs = ([[each[None, :, :, None]]] for each in (matrix, other))
        drift = build._drift(matrix, (ours, [[1]]), (theirs, [[1]]))
        seen = lines[::32].norm()
        assert drift == pytest.approx(float(lines[32].norm() / seen) if is_seen else 0.0)
