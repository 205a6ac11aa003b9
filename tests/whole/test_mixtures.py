"""Mixtures of experts, converted: every family against the stock model, and what users do with one."""

import copy
import io
import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from click.testing import CliRunner
from helpers.data import QUICK, words
from helpers.expert_mixtures import EXPERTS, TOP_K, TYPES, VOCAB, save_mixture, stock_name, token_ids
from helpers.models import stored
from helpers.tiny import save_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from mpoe_convert import (
    Export,
    Finetuning,
    Recipe,
    convert,
    draw_pictures,
    evaluate,
    export,
    finetune,
    plan,
    verify,
)
from mpoe_convert.artifact.inspect import inspect
from mpoe_convert.cli import main
from mpoe_convert.cli.tables import console, print_summary
from mpoe_convert.errors import (
    CheckpointError,
    DataError,
    ExportError,
    OutputError,
    RecipeError,
    TrainingError,
)
from mpoe_convert.options import by_name, default_of
from mpoe_convert.planning.mixtures import moment_bytes
from mpoe_convert.runtime.modeling_mpoe import Picks
from mpoe_convert.tables import Table


def load_pair(source, out, **options):
    """(stock model, converted model), loaded as users do, with nothing missing or left over."""
    stock = AutoModelForCausalLM.from_pretrained(source, **options).eval()
    model, info = AutoModelForCausalLM.from_pretrained(
        out, trust_remote_code=True, output_loading_info=True, **options
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return stock, model.eval()


def difference(model, stock, ids=None) -> float:
    ids = token_ids() if ids is None else ids
    with torch.no_grad():
        found, expected = (each(input_ids=ids).logits.float() for each in (model, stock))
    return float((found - expected).norm() / expected.norm())


def own_parameters(model):
    return [(name, parameter) for name, parameter in model.named_parameters() if ".mixture." in name]


# What takes the text from a recipe.
UNREAD = {"calibrate": (), "calibration_tokens": default_of(by_name(Recipe)["calibration_tokens"])}


@pytest.mark.parametrize("model_type", TYPES)
def test_every_family_computes_and_learns_as_the_stock_model(model_type, tmp_path):
    assert stock_name(model_type)[0] == "AutoModelForCausalLM"
    source = save_mixture(model_type, tmp_path / "source")
    report = convert(Recipe(str(source)), tmp_path / "out")
    stock, model = load_pair(source, tmp_path / "out")
    assert difference(model, stock) < 2e-6
    assert report.max_error == 0 and report.plan.totals.stored_params == report.plan.totals.dense_params
    ids = token_ids()
    losses = [each(input_ids=ids, labels=ids, use_cache=False).loss for each in (stock, model)]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5)
    for loss in losses:
        loss.backward()
    own = own_parameters(model)
    assert own and all(parameter.grad is not None and parameter.grad.any() for _, parameter in own)
    for name, parameter in stock.named_parameters():
        if ".experts." in name or parameter.grad is None:
            continue
        found = model.get_parameter(name).grad
        torch.testing.assert_close(found, parameter.grad, rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        own[-1][1].mul_(1 + 0.1 * torch.randn(own[-1][1].shape, generator=torch.Generator().manual_seed(0)))
    assert difference(model, stock) > 1e-5


# ------------------------------------------------------------------------------------- what users do


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    """(source, artifact)"""
    root = tmp_path_factory.mktemp("mixtral")
    source = save_mixture("mixtral", root / "source")
    convert(Recipe(str(source)), root / "out")
    return source, root / "out"


def test_the_artifact_says_what_it_is(mixtral):
    source, out = mixtral
    config = json.loads((out / "config.json").read_text())
    assert config["mpoe"]["family"] == {"slot": "mlp", "experts": "experts"}
    assert (config["mpoe"]["num_experts"], config["mpoe"]["top_k"]) == (EXPERTS, TOP_K)
    names = stored(out)
    assert not any("experts" in name for name in names)
    assert names["model.layers.1.mlp.mixture.up.terms.0.aux_0"].shape == (EXPERTS, 32, 40)
    card = (out / "README.md").read_text()
    assert "source are stored whole: the model computes what its base does." in card and "dense" not in card
    assert "untrained" not in card and "plain MoE" not in card


def test_a_card_says_how_whole_experts_are_rounded(mixtral, tmp_path):
    convert(Recipe(str(mixtral[0]), dtype="bfloat16"), tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert "are stored whole, in bfloat16." in card and "computes what its base does" not in card


def test_the_artifact_is_verified(mixtral):
    found = verify(mixtral[1])
    assert found.ok and found.relative_difference < 2e-6 and found.greedy_agreement == 1


def test_copies_pickles_and_saved_models_compute_the_same(mixtral, tmp_path):
    stock, model = load_pair(*mixtral)
    assert difference(copy.deepcopy(model), stock) < 2e-6
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert difference(torch.load(file, weights_only=False), stock) < 2e-6
    model.save_pretrained(tmp_path / "again")
    again = load_pair(mixtral[0], tmp_path / "again")[1]
    assert difference(again, stock) < 2e-6
    assert stored(tmp_path / "again").keys() == stored(mixtral[1]).keys()


def test_text_is_generated_with_a_cache(mixtral):
    stock, model = load_pair(*mixtral)
    texts = [each.generate(token_ids(), max_new_tokens=8, do_sample=False) for each in (stock, model)]
    assert torch.equal(*texts)


def test_the_routers_losses_are_the_stock_ones(mixtral):
    ids = token_ids()
    outputs = [each(input_ids=ids, labels=ids, output_router_logits=True) for each in load_pair(*mixtral)]
    for name in ("loss", "aux_loss"):
        torch.testing.assert_close(*(each[name] for each in outputs), rtol=1e-5, atol=1e-6)
    assert all(len(each.router_logits) == 2 for each in outputs)
    config = AutoConfig.from_pretrained(mixtral[1], trust_remote_code=True)
    assert config.router_aux_loss_coef == 0.001  # Mixtral's default, not ours


@pytest.mark.parametrize("schedule", ["apply", "rebuild", "cached"])
def test_every_schedule_computes_the_same(mixtral, schedule):
    stock, model = load_pair(*mixtral, **{})
    for _, ffn in model._mixings():
        ffn.schedule = schedule
    assert difference(model, stock) < 2e-6
    assert difference(model, stock, token_ids((1, 1))) < 2e-6


def test_it_compiles_in_one_graph(mixtral):
    stock, model = load_pair(*mixtral)
    assert difference(torch.compile(model, backend="aot_eager", fullgraph=True), stock) < 2e-6


@pytest.mark.parametrize("model_type", ["phimoe", "gpt_oss"])
def test_routers_have_the_dtype_of_the_stock_ones(model_type, tmp_path):
    source = save_mixture(model_type, tmp_path / "source", torch.bfloat16)
    convert(Recipe(str(source)), tmp_path / "out")
    stock, model = load_pair(source, tmp_path / "out", dtype=torch.bfloat16)
    dtypes = {name: parameter.dtype for name, parameter in stock.named_parameters()}
    assert {name: p.dtype for name, p in model.named_parameters() if name in dtypes} == {
        name: dtype for name, dtype in dtypes.items() if ".experts." not in name
    }
    assert difference(model, stock) < 0.05


def test_layers_that_are_left_out_stay_as_they_are(mixtral, tmp_path):
    report = convert(Recipe(str(mixtral[0]), layers="1"), tmp_path / "out")
    assert report.plan.kept_dense == ("layers.0",)
    stock, model = load_pair(mixtral[0], tmp_path / "out")
    assert {name.split(".mlp.")[0] for name, _ in own_parameters(model)} == {"model.layers.1"}
    assert difference(model, stock) < 2e-6


def test_the_backbone_and_other_heads_load(mixtral):
    source, out = mixtral
    stock, model = (AutoModel.from_pretrained(each, trust_remote_code=True).eval() for each in mixtral)
    with torch.no_grad():
        expected, found = (each(token_ids()).last_hidden_state for each in (stock, model))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    head = transformers.AutoModelForSequenceClassification.from_pretrained(out, trust_remote_code=True)
    assert own_parameters(head)


def test_a_new_model_starts_small(mixtral):
    config = AutoConfig.from_pretrained(mixtral[1], trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    own = [parameter for _, parameter in own_parameters(model)]
    assert own and all(0 < parameter.std() < 0.1 for parameter in own)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_low_rank_adapter_is_learnt(mixtral):
    peft = pytest.importorskip("peft")
    stock, model = load_pair(*mixtral)
    names = [name for name, _ in own_parameters(model)]
    learning = peft.get_peft_model(model, peft.LoraConfig(target_parameters=names[:2], r=2))
    assert difference(learning, stock) < 2e-6
    ids = token_ids()
    learning(input_ids=ids, labels=ids).loss.backward()
    assert any(p.grad is not None and p.grad.any() for n, p in learning.named_parameters() if "lora_" in n)


# ------------------------------------------------------------------------------------------- smaller


@pytest.mark.parametrize("share", ["none", "input", "output", "both", "base"])
def test_shared_experts_compute_what_their_cores_say(mixtral, tmp_path, share):
    """The stock model with the experts' matrices contracted from the cores."""
    source = mixtral[0]
    recipe = Recipe(str(source), keep=0.8, share=share, allocation="uniform")
    report = convert(recipe, tmp_path / "out")
    assert all(matrix.form == share and 0.1 < matrix.relative_error < 1 for matrix in report.matrices)
    assert report.plan.ffn_totals.stored_params <= 0.8 * report.plan.ffn_totals.dense_params
    assert plan(recipe).ffn_totals.stored_params == pytest.approx(
        report.plan.ffn_totals.stored_params, rel=0.15
    )
    stock, model = load_pair(source, tmp_path / "out")
    tensors = stored(tmp_path / "out")
    told = {matrix.name: matrix for matrix in report.matrices}
    for layer, block in enumerate(stock.model.layers):
        matrices = {}
        for role in ("gate", "up", "down"):
            start = f"model.layers.{layer}.mlp.mixture.{role}.terms."
            found = 0
            for term in range(2 if share == "base" else 1):
                names = [name for name in tensors if name.startswith(f"{start}{term}.")]
                names.sort(key=lambda name: name[-1])  # "central_0", "aux_1"
                cores = [tensors[name].double() for name in names]
                cores = [core if core.ndim == 3 else core.unsqueeze(0) for core in cores]
                product = cores[0]
                for core in cores[1:]:
                    product = product @ core
                found = found + product
            matrices[role] = found.expand(EXPERTS, -1, -1).float()
        experts = block.mlp.experts
        gate, up = experts.gate_up_proj.detach().mT.chunk(2, dim=-1)
        for role, exact in {"gate": gate, "up": up, "down": experts.down_proj.detach().mT}.items():
            lost, size = ((part**2).sum((1, 2)) for part in (exact - matrices[role], exact))
            matrix = told[f"model.layers.{layer}.mlp.mixture.{role}"]
            assert matrix.relative_error == pytest.approx(float(lost.sum() / size.sum()) ** 0.5, rel=1e-4)
            assert matrix.expert_errors == pytest.approx((lost / size).sqrt().tolist(), rel=1e-4)
        with torch.no_grad():
            experts.gate_up_proj.copy_(torch.cat([matrices["gate"], matrices["up"]], dim=-1).mT)
            experts.down_proj.copy_(matrices["down"].mT)
    for schedule in ("apply", "rebuild", "cached"):
        for _, ffn in model._mixings():
            ffn.schedule = schedule
        assert difference(model, stock) < 5e-6


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
def test_experts_have_ranks_of_their_own(mixtral, tmp_path):
    """One expert of the source is a twentieth of the others."""
    source = AutoModelForCausalLM.from_pretrained(mixtral[0])
    for block in source.model.layers:
        for parameter in block.mlp.experts.parameters():
            parameter.data[1] *= 0.05
    source.save_pretrained(tmp_path / "source")
    recipe = Recipe(str(tmp_path / "source"), keep=0.7, share="none", allocation="uniform")
    report = convert(recipe, tmp_path / "out")
    assert all(len(m.ranks) == EXPERTS and m.ranks[1] < min(m.ranks[0], m.ranks[2]) for m in report.matrices)
    assert all(m.bonds == (max(m.ranks),) for m in report.matrices)
    assert report.plan.ffn_totals.stored_params <= 0.7 * report.plan.ffn_totals.dense_params
    stock, model = load_pair(tmp_path / "source", tmp_path / "out")
    told = {matrix.name: matrix for matrix in report.matrices}
    for layer, block in enumerate(stock.model.layers):
        exact, ours = block.mlp.experts.down_proj.detach().mT, model.model.layers[layer].mlp.mixture.down
        for expert, matrix in enumerate(exact):
            rows = ours(torch.eye(len(matrix)), Picks(expert)).detach()
            error = float((rows - matrix).norm() / matrix.norm())
            matrix_report = told[f"model.layers.{layer}.mlp.mixture.down"]
            assert matrix_report.expert_errors[expert] == pytest.approx(error, rel=1e-4)
    exported = export(tmp_path / "out", tmp_path / "again", Export(to="moe"))
    assert exported.comparison.relative_difference < 5e-6
    rounded = convert(recipe.replace(bits=8), tmp_path / "rounded")
    assert [m.ranks for m in rounded.matrices] == [m.ranks for m in report.matrices]


def test_the_form_is_chosen_by_the_error(mixtral, tmp_path):
    errors = {}
    for share in ("auto", "none", "input", "output", "both"):
        recipe = Recipe(str(mixtral[0]), keep=0.7, share=share, allocation="uniform")
        report = convert(recipe, tmp_path / "out", overwrite=True)
        errors[share] = [matrix.relative_error for matrix in report.matrices]
    least = [min(each) for each in zip(*(errors[share] for share in errors if share != "auto"), strict=True)]
    assert all(ours <= best * (1 + 1e-6) for ours, best in zip(errors["auto"], least, strict=True))


def test_everything_kept_is_whole(mixtral, tmp_path):
    report = convert(Recipe(str(mixtral[0]), keep=1.0), tmp_path / "out")
    assert {matrix.form for matrix in report.matrices} == {"whole"} and report.plan.is_exact


# ------------------------------------------------------------------------- calibrated, exported, trained


@pytest.fixture(scope="module")
def readable(tmp_path_factory):
    """(source with a tokenizer, text)"""
    root = tmp_path_factory.mktemp("readable")
    source = save_mixture("qwen3_moe", root / "source")
    save_tokenizer(source)
    text = root / "text.txt"
    text.write_text(words(4000))
    return source, str(text)


def experts_table(planned):
    return next(
        part for part in planned.shown() if isinstance(part, Table) and part.title.startswith("Experts")
    )


def test_plans_that_read_no_weights_do_not_know_how_alike_experts_are(mixtral, tmp_path):
    """A conversion does: random experts have 1 / experts of their energy in common."""
    source = mixtral[0]
    assert "alike" not in experts_table(plan(Recipe(str(source), keep=0.6))).headers
    stock = AutoModelForCausalLM.from_pretrained(source).model.layers[1].mlp.experts.down_proj
    stock = stock.detach().double()
    found = [m.alike for m in convert(Recipe(str(source), keep=0.6), tmp_path / "out").matrices]
    assert found == pytest.approx([1 / EXPERTS] * len(found), rel=0.1)
    assert found[-1] == pytest.approx(float(stock.mean(0).square().sum() / stock.square().sum((1, 2)).mean()))


def test_calibrated_experts_lose_less_of_their_outputs(readable, tmp_path):
    source, text = readable
    options = {"share": "none", "allocation": "uniform", "calibration_tokens": 2048}
    recipe = Recipe(str(source), keep=0.6, calibrate=(text,), **options)
    report = convert(recipe, tmp_path / "out")
    plain = convert(recipe.replace(**UNREAD), tmp_path / "plain")
    stock, model = load_pair(source, tmp_path / "out")
    ids = token_ids((8, 32), seed=5)
    assert difference(model, stock, ids) < difference(load_pair(source, tmp_path / "plain")[1], stock, ids)
    for ours, other in zip(report.matrices, plain.matrices, strict=True):
        assert ours.output_error < ours.relative_error and ours.relative_error >= other.relative_error
    words_of_it = report.divergence_in_words()
    assert "nats of divergence from the source" in words_of_it


def test_an_expert_with_nan_is_named_before_what_it_computes(tmp_path, readable):
    source = save_mixture("gpt_oss", tmp_path / "source")
    save_tokenizer(source)
    tensors, name = load_file(source / "model.safetensors"), "model.layers.1.mlp.experts.down_proj"
    tensors[name][2].view(-1)[5] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    recipe = Recipe(str(source), keep=0.6, calibrate=(readable[1],), calibration_tokens=1024)
    for each in (recipe, recipe.replace(**UNREAD), recipe.replace(**UNREAD, keep=None)):
        with pytest.raises(CheckpointError) as caught:
            convert(each, tmp_path / "out")
        assert f"{name} (expert 2) holds NaN or Inf in 1 of" in str(caught.value)


def test_a_folder_without_a_tokenizer_is_told(mixtral, readable, tmp_path):
    with pytest.raises(DataError, match="source' has no tokenizer, which calibration texts need; put the"):
        convert(Recipe(str(mixtral[0]), keep=0.6, calibrate=(readable[1],)), tmp_path / "out")


def test_what_is_told_is_about_mixtures(readable, tmp_path, capsys):
    source, text = readable
    recipe = Recipe(str(source), keep=0.6, share="base", calibrate=(text,), calibration_tokens=1024)
    report = convert(recipe, tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert "* base: D2-MoE" in card and "gao2022mpoe" not in card and "tensor-train" not in card
    assert "of calibration text, up to 1,024 tokens" in card
    own = report.plan.ffn_totals
    flops = own.flops_per_token / own.dense_flops_per_token
    assert f"(--keep allows 60.0%), and take {flops:.1%} of its FLOPs per token" in card
    print_summary(inspect(tmp_path / "out"), console())
    shown = capsys.readouterr().out
    assert "qwen3_moe, 2 layers of 4 experts, top 2" in shown and "60.0% of the numbers at most" in shown
    assert not any(word in shown for word in ("FFN", "drift", "noise", "layout"))


def test_a_plan_without_reading_says_what_it_assumes(mixtral):
    planned = plan(Recipe(str(mixtral[0]), keep=0.6))
    assert planned.warnings[-1].startswith("no weights were read: each expert is planned alone. A conversion")
    assert plan(Recipe(str(mixtral[0]), keep=0.6, share="none")).warnings == []


def test_rates_of_what_is_not_there_are_refused(mixtral, readable, tmp_path):
    out = tmp_path / "out"
    convert(Recipe(str(readable[0]), keep=0.6, share="none"), out)
    for name, what in (
        ("central_lr", "central tensors"),
        ("router_lr", "routers of a converted dense model"),
    ):
        run = Finetuning(model=str(out), data=readable[1], **QUICK | {name: 0.5})
        with pytest.raises(TrainingError, match=f"^{name} is 0.5, and '.*out' has no {what}; leave it out$"):
            finetune(run, tmp_path / "tuned")


def test_a_disk_without_room_for_the_moments_is_told(readable, tmp_path, monkeypatch):
    source, text = readable
    recipe = Recipe(str(source), keep=0.6, share="none", calibrate=(text,), calibration_tokens=1024)
    recipe = recipe.replace(allocation="uniform")  # which takes no gradients
    needed = sum(map(moment_bytes, plan(recipe.replace(**UNREAD)).ffns))
    # Of 2 layers of 4 experts, those of 32 inputs and 24 hidden neurons in one block each.
    assert needed == 2 * EXPERTS * 4 * (32 * 32 + 24 * 24)
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", tmp_path / "assets")
    for free in (needed - 1, needed):
        usage = SimpleNamespace(free=free)
        monkeypatch.setattr("mpoe_convert.artifact.folder.shutil.disk_usage", lambda _, usage=usage: usage)
        if free < needed:
            with pytest.raises(
                OutputError, match="^the calibration needs 0.1 MB and .* HF_ASSETS_CACHE at a"
            ):
                plan(recipe)
            assert not list(tmp_path.rglob("*.safetensors"))
    planned = plan(recipe)
    files = list((tmp_path / "assets").rglob("*.safetensors"))
    assert len(files) == 2 and needed < sum(file.stat().st_size for file in files) < 1.1 * needed
    lines = [line for line in planned.shown() if isinstance(line, str)]
    assert "Moments of the calibration, kept in the cache of Hugging Face: 51.2 kB" in lines
    # Of one layer: as they are kept beside the work on its largest stack, or thrice while they are summed.
    own, stack = needed // 2, max(8 * matrix.dense_params for matrix in planned.matrices)
    without = plan(recipe.replace(**UNREAD)).peak_bytes
    assert planned.peak_bytes == without - stack + own + max(stack, 2 * own)


@pytest.mark.parametrize("allocation", [None, "energy"])
def test_the_budget_is_shared_out(readable, tmp_path, allocation):
    """A layer whose experts hardly count is cut deeper; the same share of each loses more together."""
    source = save_mixture("qwen3_moe", tmp_path / "source")
    save_tokenizer(source)
    model = AutoModelForCausalLM.from_pretrained(source)
    model.model.layers[1].mlp.experts.down_proj.data *= 1e-3
    model.save_pretrained(source)
    recipe = Recipe(str(source), keep=0.6, calibrate=(readable[1],), calibration_tokens=2048)
    planned = plan(recipe.replace(allocation=allocation))
    assert planned.recipe.allocation == (allocation or "loss")
    alike = plan(recipe.replace(allocation="uniform"))
    kept = {}
    for each in (planned, alike):
        assert each.ffn_totals.stored_params <= 0.6 * each.ffn_totals.dense_params
        stored = [matrix.stored_params for matrix in each.matrices]
        kept[each.recipe.allocation] = [sum(stored[:3]), sum(stored[3:])]
    first, second = kept[allocation or "loss"]
    assert (first > 1.5 * second) == (allocation is None)
    assert max(kept["uniform"]) < 1.1 * min(kept["uniform"])


def test_allocations_that_a_mixture_does_not_have(mixtral):
    source = str(mixtral[0])
    with pytest.raises(RecipeError, match="allocation='measured' given with a mixture of experts as the"):
        plan(Recipe(source, keep=0.6, allocation="measured"))
    with pytest.raises(RecipeError, match="allocation is 'loss'; expected calibrate with it"):
        plan(Recipe(source, keep=0.6, allocation="loss"))


def test_experts_that_no_token_reached_are_named(readable, tmp_path):
    source = save_mixture("deepseek_v3", tmp_path / "source")
    save_tokenizer(source)
    model = AutoModelForCausalLM.from_pretrained(source)
    model.model.layers[1].mlp.gate.e_score_correction_bias[2] = -100
    model.save_pretrained(source)
    recipe = Recipe(str(source), keep=0.6, calibrate=(readable[1],), calibration_tokens=2048)
    told = "1 expert of layers.1 (2) saw no calibration token: fitted to what its whole layer saw"
    for share, ends in (("input", "."), ("none", ", with ranks down to {} where others have up to {}.")):
        planned = plan(recipe.replace(share=share, allocation="uniform"))
        own = [m.ranks for m in planned.matrices if ".1." in m.name and len(m.ranks) > 1]
        ends = ends.format(*(min(ranks[2] for ranks in own), max(map(max, own))) if own else ())
        assert planned.warnings == [told + ends] and bool(own) == (share == "none")


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "granitemoe", "nemotron_h", "ernie4_5_moe"])
def test_an_export_is_the_source_again(model_type, tmp_path):
    source = save_mixture(model_type, tmp_path / "source")
    convert(Recipe(str(source)), tmp_path / "out")
    exported = export(tmp_path / "out", tmp_path / "again", Export(to="moe"))
    assert exported.model_type == model_type and exported.comparison.relative_difference < 2e-6
    expected, found = stored(source), stored(tmp_path / "again")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    configs = [json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "again")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("target", ["dense", "lora", "onnx"])
def test_other_exports_are_refused(mixtral, tmp_path, target):
    with pytest.raises(ExportError, match="none of its experts is a model by itself; expected to='moe'"):
        export(mixtral[1], tmp_path / "again", Export(to=target))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
def test_a_smaller_mixture_is_trained_scored_and_exported(readable, tmp_path):
    source, text = readable
    convert(Recipe(str(source), keep=0.7), tmp_path / "out")
    finetune(Finetuning(model=str(tmp_path / "out"), data=text, **QUICK), tmp_path / "tuned")
    before, after = stored(tmp_path / "out"), stored(tmp_path / "tuned")
    still = {name for name, tensor in before.items() if torch.equal(tensor, after[name])}
    assert before.keys() == after.keys() and not still
    assert evaluate(str(tmp_path / "tuned"), data=text, limit=4).metrics["perplexity"].value > 1
    assert verify(tmp_path / "tuned").problems() == []
    exported = export(tmp_path / "tuned", tmp_path / "again", Export(to="moe"))
    assert exported.comparison.relative_difference < 5e-6


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
def test_an_upcycled_model_becomes_a_smaller_mixture(readable, tmp_path):
    """A dense model is upcycled, trained, exported as a Mixtral, and converted again as a mixture."""
    text = readable[1]
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **sizes)).save_pretrained(tmp_path / "llama")
    save_tokenizer(tmp_path / "llama")
    convert(Recipe(str(tmp_path / "llama"), kind="dense", experts=4), tmp_path / "upcycled")
    finetune(Finetuning(model=str(tmp_path / "upcycled"), data=text, **QUICK), tmp_path / "tuned")
    export(tmp_path / "tuned", tmp_path / "mixtral", Export(to="moe"))
    recipe = Recipe(str(tmp_path / "mixtral"), keep=0.6, calibrate=(text,), calibration_tokens=1024)
    report = convert(recipe, tmp_path / "out")
    assert (report.plan.model_type, report.plan.recipe.experts) == ("mixtral", 4)
    assert min(matrix.alike for matrix in report.matrices) > 0.9  # copies of one FFN, a few steps apart
    planned = plan(recipe)
    assert [matrix.alike for matrix in planned.matrices] == [matrix.alike for matrix in report.matrices]
    assert [row["alike"] for row in experts_table(planned).rows] == ["1.00"] * 3
    assert report.plan.ffn_totals.stored_params <= 0.6 * report.plan.ffn_totals.dense_params
    assert report.max_error < 0.1  # though each expert alone would lose much more
    assert verify(tmp_path / "out").ok
    scores = evaluate(str(tmp_path / "out"), data=text, limit=4, against=str(tmp_path / "mixtral"))
    assert scores.differences["perplexity ratio"].value == pytest.approx(1, abs=0.05)


# ---------------------------------------------------------------------------------------- a trained one


def test_a_trained_mixture_keeps_its_loss(test_data, tmp_path):
    from helpers.real import load, windows_of

    source = test_data / "checkpoints" / "qwen3moe-mix"
    convert(Recipe(str(source)), tmp_path / "out")
    text = (test_data / "text" / "mix" / "train_tinystories.txt").read_text()[-20000:]
    windows = windows_of(source, text, 128, 8)
    with torch.no_grad():
        losses = [
            load(folder)(input_ids=windows, labels=windows).loss.item()
            for folder in (source, tmp_path / "out")
        ]
    assert losses[1] == pytest.approx(losses[0], abs=1e-3) and losses[0] < 5


def test_biases_of_routers_stay_in_float32(tmp_path):
    """As in the stock model: rounded to bfloat16, biases near 10 would choose other experts."""
    dense = save_mixture("deepseek_v3", tmp_path / "dense")
    state = load_file(dense / "model.safetensors")
    names = [name for name in state if name.endswith("e_score_correction_bias")]
    for name in names:
        state[name] = 10 + 0.03 * torch.randn(state[name].shape, generator=torch.Generator().manual_seed(1))
    save_file(state, dense / "model.safetensors", metadata={"format": "pt"})
    convert(Recipe(str(dense), dtype="bfloat16"), tmp_path / "out")
    found = load_file(tmp_path / "out/model.safetensors")
    assert names and all(torch.equal(found[name], state[name]) for name in names)
    assert not torch.equal(state[names[0]], state[names[0]].bfloat16().float())


def test_pictures_name_the_source(tmp_path):
    dense = save_mixture("mixtral", tmp_path / "dense")
    convert(Recipe(str(dense), keep=0.6), tmp_path / "out")
    draw_pictures(tmp_path / "out")
    drawn = (tmp_path / "out/pictures/parameters.svg").read_text(encoding="utf-8")
    assert "<!-- source, stored -->" in drawn and "dense base" not in drawn and "routers" not in drawn


def test_more_than_all_numbers_are_refused(tmp_path):
    dense = save_mixture("mixtral", tmp_path / "dense")
    with pytest.raises(RecipeError, match="keep is 2; expected a share of the experts' numbers"):
        convert(Recipe(str(dense), keep=2), tmp_path / "out")


def test_recipe_files_that_list_every_option_are_taken(mixtral, tmp_path):
    """As earlier releases wrote them: the defaults in them were not chosen by anyone."""
    source, _ = mixtral
    values = Recipe(str(source)).to_mapping() | {"experts": EXPERTS, "top_k": TOP_K}
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(values))
    command = ["convert", "--config", str(path), "--dry-run"]
    assert CliRunner().invoke(main, command).exit_code == 0
    refused = CliRunner().invoke(main, [*command, "--noise", "0.01"])
    assert refused.exit_code == 2 and "--noise given with a mixture" in refused.stderr
