"""Artifacts with fewer experts compute what the artifact does whose routers never choose the others."""

import json
import math
import re
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from click.testing import CliRunner
from helpers.artifacts import perturb, set_options
from helpers.data import QUICK, rows, words, write
from helpers.expert_mixtures import save_mixture
from helpers.models import stored, token_ids
from helpers.tiny import save_tiny, save_tokenizer
from safetensors.torch import load_file, save_file

from mpoe_convert import Export, Finetuning, Pruning, Recipe, convert, export, finetune, prune, verify
from mpoe_convert.artifact.fingerprint import weights_of
from mpoe_convert.artifact.layout import register_files
from mpoe_convert.artifact.reader import open_artifact
from mpoe_convert.cli import main
from mpoe_convert.compression.batches import make_batches
from mpoe_convert.errors import CheckpointError, DataError, FamilyError, RecipeError
from mpoe_convert.pruning.held_out import hold_out
from mpoe_convert.pruning.observe import observe
from mpoe_convert.request import read_recipe
from mpoe_convert.source import pruned

BASE = {"experts": 4, "bond_dim": 4}
KINDS = {
    "blocks": {"layout": "blocks"},
    "two-sided, own biases": {"layout": "two-sided", "bias": "per-expert"},
    "dense": {"kind": "dense"},
    "dense, 1 shared": {"kind": "dense", "shared_experts": 1},
    "low-rank": {"kind": "low-rank"},
    "core-space": {"kind": "core-space"},
    "adapter": {"kind": "adapter"},
    "adapters of sizes": {"kind": "adapter", "bond_dim": "2/6/4/8"},
    "low-rank of sizes": {"kind": "low-rank", "bond_dim": "2/4/4/4"},
    "blocks of sizes": {"layout": "blocks", "bond_dim": "2/4/8/2"},
    "parts": {"kind": "split", "experts": 8, "parts": 2, "top_k": 4},
    "parts, 1 shared": {"kind": "split", "experts": 8, "parts": 2, "shared_experts": 1, "top_k": 4},
    "top-p": {"kind": "dense", "select": "top-p", "threshold": 0.6, "top_k": 4},
    "top-any": {"kind": "dense", "select": "top-any", "top_k": 4},
}
SLOW = {*KINDS} - {"blocks", "parts, 1 shared", "low-rank of sizes", "adapters of sizes"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny GPT-2 with a tokenizer, a mixture, and text."""
    found = tmp_path_factory.mktemp("pruning")
    save_tiny("gpt2", "AutoModelForCausalLM", found / "dense")
    save_tokenizer(found / "dense")
    (found / "text.txt").write_text(words(900))
    return found


@pytest.fixture(scope="module")
def made(folder):
    """An artifact of a kind, as after training; made once."""

    def make(kind: str):
        out = folder / f"of {kind}"
        if not out.exists():
            convert(Recipe(str(folder / "dense"), **BASE | KINDS[kind]), out)
            perturb(out)
        return out

    return make


def asked(folder, experts: int, **options) -> Pruning:
    return Pruning(str(folder / "text.txt"), experts, calibration_tokens=640, **options)


def load(out):
    return transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True).eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(token_ids(2, 9)).logits


def never_chosen(model, smaller):
    """The model, whose routers have no hope for the experts that were left out."""
    for (path, ffn), layer in zip(model.mixtures(), smaller.layers, strict=True):
        assert path.startswith(layer.path)
        router, gone = ffn.router, torch.tensor(layer.dropped)
        before = router.logits_of
        router.logits_of = lambda x, before=before, gone=gone: before(x).index_fill(-1, gone, -1e4)
        if ffn.balance_bias is not None:
            ffn.balance_bias[gone] = -1e4
    return model


def agree(one, other) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=2e-5 * float(other.abs().max()))


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind in SLOW)) for kind in KINDS]
)
def test_it_computes_what_it_would_without_the_others(kind, made, folder, tmp_path):
    before, small = made(kind), 4 if "parts" in kind else 3
    smaller = prune(before, tmp_path / "small", asked(folder, small))
    model = load(tmp_path / "small")
    assert {ffn.router.num_experts for _, ffn in model.mixtures()} == {small}
    found, whole = logits(model), logits(load(before))
    agree(found, logits(never_chosen(load(before), smaller)))
    assert (found - whole).abs().max() > 1e-2 * whole.abs().max()


@pytest.mark.parametrize("kind", ["low-rank of sizes", "adapters of sizes"])
def test_shared_experts_of_another_size_stay(kind, made, folder, tmp_path):
    """No recipe gives shared experts a size of their own; a config can."""
    out = shutil.copytree(made(kind), tmp_path / "with shared")
    config = json.loads((out / "config.json").read_text())
    config["mpoe"] |= {"num_experts": 3, "top_k": 2, "shared_experts": 1}  # what was expert 3
    (out / "config.json").write_text(json.dumps(config))
    [path] = out.glob("*.safetensors")
    tensors = load_file(path)
    tensors |= {name: tensors[name][:3].clone() for name in tensors if ".router." in name}
    save_file(tensors, path, metadata={"format": "pt"})
    smaller = prune(out, tmp_path / "small", asked(folder, 2, by="load"))
    agree(logits(load(tmp_path / "small")), logits(never_chosen(load(out), smaller)))


def test_a_balancing_bias_goes_with_its_expert(made, folder, tmp_path):
    out = shutil.copytree(made("dense"), tmp_path / "biased")
    set_options(out, router_balance_bias=True)
    [path] = out.glob("*.safetensors")
    tensors = load_file(path)
    layers = {name.partition(".router.")[0] for name in tensors if ".router." in name}
    biases = {f"{layer}.balance_bias": torch.randn(4) / 4 for layer in layers}
    save_file(tensors | biases, path, metadata={"format": "pt"})
    smaller = prune(out, tmp_path / "small", asked(folder, 2, by="load"))
    agree(logits(load(tmp_path / "small")), logits(never_chosen(load(out), smaller)))


def test_statistics_are_those_of_the_choices_and_of_single_experts(made, folder):
    """Choices by the routers alone; outputs of each expert from a model that sends every token to it."""
    source = open_artifact(str(made("dense, 1 shared")))
    batches = [{"input_ids": token_ids(2, 9), "attention_mask": torch.ones(2, 9, dtype=torch.long)}]
    batches[0]["attention_mask"][1, 5:] = 0
    found = observe(load(made("dense, 1 shared")), source, batches, outputs=True)
    counted = batches[0]["attention_mask"].flatten().bool()
    model, seen = load(made("dense, 1 shared")), {}
    for path, ffn in model.mixtures():
        ffn.register_forward_pre_hook(
            lambda module, args, path=path: seen.update({path: args[0].flatten(0, 1)})
        )
    with torch.no_grad():
        model(**batches[0])
        for path, ffn in model.mixtures():
            x = seen[path][counted].double()
            ranked = (x @ ffn.router.weight.double().mT).topk(2)
            weights = ranked.values.softmax(-1)
            matrices = [projection.terms[0].aux_0.double() for projection in (ffn.up, ffn.down)]
            biases = [projection.bias.double() for projection in (ffn.up, ffn.down)]
            inner = ffn.act(torch.einsum("th,ehi->eti", x, matrices[0]) + biases[0].unsqueeze(1))
            outputs = (torch.einsum("eti,eih->eth", inner, matrices[1]) + biases[1].unsqueeze(1))[:4]
            own = found[path.removesuffix(".mlp")]
            assert len(x) == 14
            for expert in range(4):
                chosen = ranked.indices == expert
                assert own.choices[expert] == chosen.sum()
                assert own.weights[expert] == pytest.approx(float(weights[chosen].sum()), rel=1e-5)
                far = (outputs[expert] - outputs.mean(0)).norm(dim=-1).unsqueeze(-1) * weights
                assert own.differences[expert] == pytest.approx(float(far[chosen].sum()), rel=1e-4)


def test_float64_is_made_on_the_cpu_alone(made, monkeypatch):
    """MPS has none."""
    to_cpu, widened = torch.Tensor.cpu, torch.Tensor.double

    def cpu(tensor):
        moved = to_cpu(tensor)
        moved.is_moved = True
        return moved

    def double(tensor):
        assert getattr(tensor, "is_moved", False)
        return widened(tensor)

    model, source = load(made("blocks")), open_artifact(str(made("blocks")))
    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    monkeypatch.setattr(torch.Tensor, "double", double)
    found = observe(model, source, [{"input_ids": token_ids(2, 9)}], outputs=True)
    assert all(sums.weights.any() and sums.differences.any() for sums in found.values())


def test_a_layer_whose_experts_no_token_chooses_is_told(made):
    batch = {"input_ids": token_ids(2, 9), "attention_mask": torch.zeros(2, 9, dtype=torch.long)}
    with pytest.raises(DataError, match="no token of the calibration text chooses experts of .* other text"):
        observe(load(made("blocks")), open_artifact(str(made("blocks"))), [batch], outputs=False)


# A model, its text's columns, and the layers that have experts.
OTHERS = {
    "t5": ("AutoModelForSeq2SeqLM", "seq2seq", {"encoder", "decoder"}),
    "bert": ("AutoModelForSequenceClassification", "classification", {"encoder"}),
}


@pytest.mark.parametrize("model_type", ["t5", pytest.param("bert", marks=pytest.mark.slow)])
def test_encoder_decoders_and_classifiers_are_measured_by_what_they_give(model_type, tmp_path):
    """The loss is the model's own on held-out pairs; a head that writes no text has a divergence alone."""
    auto, kind, sides = OTHERS[model_type]
    save_tiny(model_type, auto, tmp_path / "dense")
    save_tokenizer(tmp_path / "dense")
    convert(Recipe(str(tmp_path / "dense"), **BASE), out := tmp_path / "out")
    perturb(out)
    request = Pruning(write(tmp_path / "rows.jsonl", rows(kind, 40)), 3, calibration_tokens=256)
    smaller = prune(out, tmp_path / "small", request)
    assert {layer.path.partition(".")[0] for layer in smaller.layers} == sides
    opened = open_artifact(str(out))
    held_out = hold_out(make_batches(request, replace(opened.checkpoint, config=opened.config)))[1]
    given = []
    for folder in (out, tmp_path / "small"):
        model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True).eval()
        with torch.no_grad():
            given.append([model(**batch) for batch in held_out])
    if model_type == "bert":
        before, after = (torch.cat([each.logits for each in own]).log_softmax(-1) for own in given)
        distance = (before.exp() * (before - after)).sum(-1).mean()
        assert smaller.losses is None
        assert smaller.divergence.nats == pytest.approx(float(distance), rel=1e-3, abs=1e-7)
        assert "nats of divergence from the artifact before" in (tmp_path / "small/README.md").read_text()
        return
    counts = [int((batch["labels"] != -100).sum()) for batch in held_out]
    for own, loss in zip(given, smaller.losses, strict=True):
        total = sum(float(each.loss) * count for each, count in zip(own, counts, strict=True))
        assert loss == pytest.approx(total / sum(counts), rel=1e-5)


@pytest.mark.slow
def test_what_is_left_can_be_trained(made, folder, tmp_path):
    prune(made("blocks"), tmp_path / "small", asked(folder, 3))
    run = Finetuning(str(tmp_path / "small"), (str(folder / "text.txt"),), **QUICK)
    finetune(run, tmp_path / "trained")
    assert verify(tmp_path / "trained").ok
    for name in ("small", "trained"):
        report = json.loads((tmp_path / name / "conversion_report.json").read_text())
        assert [step["experts"] for step in report["pruning"]] == [3]
        assert {ffn.router.num_experts for _, ffn in load(tmp_path / name).mixtures()} == {3}
    assert (logits(load(tmp_path / "small")) - logits(load(tmp_path / "trained"))).abs().max() > 1e-3


def test_what_cannot_be_cut_is_told_before_any_text_is_read(folder, tmp_path, monkeypatch):
    save_tokenizer(save_mixture("mixtral", tmp_path / "dense", num_local_experts=6, num_experts=6))
    convert(Recipe(str(tmp_path / "dense")), tmp_path / "out")
    monkeypatch.setattr(pruned, "NUMBERS", ("another_name",))
    monkeypatch.setattr("mpoe_convert.pruning.prune.make_batches", None)
    with pytest.raises(FamilyError, match="this model keeps all its experts"):
        prune(tmp_path / "out", tmp_path / "small", asked(folder, 4))


@pytest.mark.slow
def test_the_losses_are_those_of_the_held_out_text(made, folder, tmp_path):
    request = asked(folder, 2)
    smaller = prune(made("low-rank"), tmp_path / "small", request)
    opened = open_artifact(str(made("low-rank")))
    held_out = hold_out(make_batches(request, replace(opened.checkpoint, config=opened.config)))[1]
    for out, loss in zip((made("low-rank"), tmp_path / "small"), smaller.losses, strict=True):
        model, total, count = load(out), 0.0, 0
        for batch in held_out:
            ids = batch["input_ids"]
            with torch.no_grad():
                total += float(model(ids, labels=ids).loss) * ids[:, 1:].numel()
            count += ids[:, 1:].numel()
        assert loss == pytest.approx(total / count, rel=1e-5)
    assert f"{smaller.losses[1]:.4f} nats per token" in (tmp_path / "small/README.md").read_text()


def test_reports_and_card_say_what_was_done_and_the_artifact_is_whole(made, folder, tmp_path):
    """After training: the reports are about the new weights, so that `verify` takes them. Twice over."""
    trained = shutil.copytree(made("dense"), tmp_path / "trained")
    report = {"log": [], "evaluation": {"eval_loss": 1.0}, "change": None, "written_step": 4}
    (trained / "training_report.json").write_text(json.dumps(report | weights_of(trained)))
    register_files(trained, ["training_report.json"])
    smaller = prune(trained, tmp_path / "three", asked(folder, 3))
    again = prune(tmp_path / "three", tmp_path / "two", asked(folder, 2, by="load"))
    assert verify(tmp_path / "two").ok
    written = json.loads((tmp_path / "two/conversion_report.json").read_text())
    assert written["pruning"] == json.loads(json.dumps([smaller.to_json(), again.to_json()]))
    assert written["recipe"]["experts"] == 2
    recipe = (tmp_path / "two/mpoe_recipe.yaml").read_text()
    assert recipe.count("prune did") == 1 and "since, which has left 2 experts per mixture" in recipe
    assert read_recipe(tmp_path / "two/mpoe_recipe.yaml") == read_recipe(trained / "mpoe_recipe.yaml")
    training = json.loads((tmp_path / "two/training_report.json").read_text())
    assert training["evaluation"] is None
    assert training["weights_sha256"] == weights_of(tmp_path / "two")["weights_sha256"]
    card = (tmp_path / "two/README.md").read_text()
    title, note = "# dense as a mixture of 2 experts", "**Note:** What follows was written when there were 3"
    assert f"{title}\n\n> {note} experts per mixture; 2 are left" in card
    assert card.count("**Note:** What follows") == card.count("\n## Fewer experts\n") == 1
    assert "\n## Parameters, with 4 experts\n" in card and again.in_words() in card
    sizes = [sum(t.numel() for t in stored(out).values()) for out in (trained, tmp_path / "three")]
    assert [smaller.params_before, smaller.params] == sizes
    back = export(tmp_path / "two", tmp_path / "back", Export(expert=1))
    assert back.comparison.relative_difference < 1e-4


# Changes of the config, and how many experts are left, once or twice.
MIXTURES = {
    "mixtral": ({"num_local_experts": 6, "num_experts": 6}, (4, 3)),
    "deepseek_v3": (
        {"n_routed_experts": 8, "num_local_experts": 8, "num_experts": 8, "n_group": 2, "topk_group": 1},
        (6,),
    ),
}


def found_steps(report: dict, count: int) -> list[tuple[list[int], list[float]]]:
    """Of each layer: the source's numbers that are left after all steps, and the last shares by them."""
    found = []
    for steps in zip(*(step["layers"] for step in report["pruning"]), strict=True):
        left, shares = [*range(count)], [0.0] * count
        for layer in steps:
            shares = [0.0] * count
            for number, share in zip(left, layer["shares"], strict=True):
                shares[number] = share
            left = [left[expert] for expert in layer["kept"]]
        found.append((left, shares))
    return found


@pytest.mark.parametrize("model_type", ["mixtral", pytest.param("deepseek_v3", marks=pytest.mark.slow)])
def test_mixtures_as_sources_keep_what_the_source_has_of_these_experts(model_type, folder, tmp_path):
    """`verify` compares with the source, cut to the experts that stay; also the second time."""
    changes, numbers = MIXTURES[model_type]
    save_tokenizer(save_mixture(model_type, tmp_path / "dense", **changes))
    convert(Recipe(str(tmp_path / "dense")), last := tmp_path / "out")
    for count in numbers:
        prune(last, tmp_path / str(count), asked(folder, count, by="load"))
        last = tmp_path / str(count)
    found = verify(last)
    assert found.ok and found.relative_difference < 1e-4
    report = json.loads((last / "conversion_report.json").read_text())
    own = found_steps(report, 8 if model_type == "deepseek_v3" else 6)
    for layer, (kept, shares) in zip(report["fewer_experts"]["layers"], own, strict=True):
        assert layer["kept"] == kept and sorted(layer["kept"] + layer["dropped"]) == [*range(len(shares))]
        assert layer["shares"] == shares and sum(shares) == pytest.approx(1)
        assert len(layer["scores"]) == len(shares)
    done = CliRunner().invoke(main, ["inspect", str(last)])
    assert len(re.findall(r"experts per (?:layer|mixture)", done.stdout)) == 1
    layer = report["fewer_experts"]["layers"][0]
    layer["kept"][0] = next(expert for expert in range(9) if expert not in layer["kept"])
    (last / "conversion_report.json").write_text(json.dumps(report))
    assert not verify(last).ok


REFUSED = {
    "too few": ("dense", {"experts": 1}, "experts is 1; expected a whole number of at least 2"),
    "all": (
        "dense",
        {"experts": 4},
        "experts is 4, and '.*' has 4 experts per mixture, of which a token takes 2; expected 2 to 3",
    ),
    "fewer than a token takes": (
        "parts",
        {"experts": 2},
        "4 for each of 2 parts .* takes 4; expected 4 to 6, a multiple of 2",
    ),
    "no multiple": ("parts", {"experts": 5}, "expected 4 to 6, a multiple of 2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_number_that_cannot_be_left_is_told(case, made, folder, tmp_path):
    kind, options, said = REFUSED[case]
    with pytest.raises(RecipeError, match=said):
        prune(made(kind), tmp_path / "small", asked(folder, **options))
    assert not list(tmp_path.iterdir())


def test_artifacts_whose_experts_all_stay_are_told(made, folder, tmp_path):
    out = shutil.copytree(made("dense"), tmp_path / "tasks")
    set_options(out, router_tasks=["a", "b"])
    with pytest.raises(CheckpointError, match="choose by task, so text does not say which experts they need"):
        prune(out, tmp_path / "small", asked(folder, 2))
    convert(Recipe(str(folder / "dense"), kind="split", experts=4, top_k=2), tmp_path / "split")
    with pytest.raises(RecipeError, match="none of them can be left out"):
        prune(tmp_path / "split", tmp_path / "small", asked(folder, 2))
    with pytest.raises(CheckpointError, match="describes no converted model"):
        prune(folder / "dense", tmp_path / "small", asked(folder, 2))


def test_experts_of_a_mixture_keep_their_own_ranks(folder, tmp_path):
    """Every layer keeps others, of other ranks; their matrices are those that they were."""
    source = save_mixture("mixtral", tmp_path / "dense", **MIXTURES["mixtral"][0])
    save_tokenizer(source)
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if "experts." in name:
            layer, expert = (
                int(each) for each in re.search(r"layers\.(\d+).*experts\.(\d+)\.", name).groups()
            )
            tensor *= 0.05 ** ((layer + expert) % 3)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    recipe = Recipe(str(source), keep=0.6, share="none", allocation="uniform")
    convert(recipe, tmp_path / "out")
    smaller = prune(tmp_path / "out", tmp_path / "small", asked(folder, 4, by="load"))
    before, after = open_artifact(str(tmp_path / "out")), open_artifact(str(tmp_path / "small"))
    ranks = set()
    for old, new, layer in zip(before.mixtures, after.mixtures, smaller.layers, strict=True):
        for role in new.roles:
            [term] = new.form[role]["terms"]
            ranks.add(str(term["by_expert"]["bonds"]))
            assert term["bonds"] == max(term["by_expert"]["bonds"])
            for place, expert in enumerate(layer.kept):
                expected = before.matrix(old, role, {expert: 1.0})
                found = after.matrix(new, role, {place: 1.0})
                torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert len(ranks) > 1
    model = load(tmp_path / "small")
    exported = export(tmp_path / "small", tmp_path / "stock", Export(to="moe"))
    assert exported.comparison.relative_difference < 5e-6 and logits(model).isfinite().all()
    assert verify(tmp_path / "small").ok


def test_the_command_prints_what_is_left_out_and_the_losses(made, folder, tmp_path):
    args = ["prune", str(made("adapter")), "-o", str(tmp_path / "small"), "--experts", "3", "--by", "load"]
    args += ["--calibrate", str(folder / "text.txt"), "--calibration-tokens", "640"]
    done = CliRunner().invoke(main, args)
    assert done.exit_code == 0, done.output
    [found] = json.loads((tmp_path / "small/conversion_report.json").read_text())["pruning"]
    assert (found["experts"], found["text"], len(found["layers"][0]["kept"])) == (3, ["text.txt"], 3)
    before, after = (math.log(found["divergence"][name]) for name in ("dense_perplexity", "perplexity"))
    assert f"{after:.4f} nats per token, {before:.4f} before" in " ".join(done.stdout.split())
    assert "their share of choices" in done.stdout
    done = CliRunner().invoke(main, ["inspect", str(tmp_path / "small")])
    assert "Of 4 experts per mixture 3 were left, by load." in done.stdout
