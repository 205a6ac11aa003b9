"""What a training says of itself: everything beside the weights is about these very weights."""

import hashlib
import json
import math

import pytest
import torch
import transformers
from helpers.data import words, write
from helpers.models import token_ids
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from mpoe_convert import Finetuning, draw_pictures, evaluate, finetune, router_stats
from mpoe_convert.errors import CheckpointError
from mpoe_convert.training.card import outcome

LENGTH = 16


@pytest.fixture
def data(tmp_path) -> tuple[str, str]:
    found = (tmp_path / "train.txt", tmp_path / "held-out.txt")
    for seed, path in enumerate(found):
        path.write_text(words(LENGTH * 25 - 1, seed))  # and the end of the text
    return str(found[0]), str(found[1])


def run(out, data, **options) -> Finetuning:
    values = {"length": LENGTH, "batch_size": 4, "steps": 6, "log_every": 1, "eval_every": 1, "warmup": 0}
    return Finetuning(str(out), data[0], data[1], **values | options)


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


def blocks(seed: int = 1) -> torch.Tensor:
    """(25, LENGTH), the blocks of the held-out text."""
    return torch.cat([token_ids(LENGTH * 25 - 1, seed=seed), torch.tensor([2])]).reshape(25, LENGTH)


def measured(folder) -> tuple[float, dict]:
    """(loss, load of the experts) of a written model on the held-out text, by transformers."""
    model = load(folder)
    with torch.no_grad(), router_stats(model) as stats:
        loss = model(blocks(), labels=blocks()).loss.item()
    return loss, {path: found.load.tolist() for path, found in stats.items()}


def told(folder) -> str:
    card = (folder / "README.md").read_text()
    return card[card.index("## Training") : card.index("## Limits")]


# The rate spoils the model after a few steps, so that an early step is the best.
@pytest.mark.parametrize("rate", [0.03, 0.5])
def test_everything_is_about_the_weights_that_were_written(rate, artifact, data, tmp_path):
    _, out = artifact("gpt2", noise=0.1)
    target = tmp_path / "tuned"
    report = finetune(run(out, data, learning_rate=rate, schedule="constant"), target)
    written, held_out = report["written_step"], {e["step"]: e for e in report["log"] if "eval_loss" in e}
    assert list(held_out) == [0, 1, 2, 3, 4, 5, 6] and 0 < written <= report["steps"] == 6
    assert written < 6 or rate < 0.1
    assert written == min(range(1, 7), key=lambda step: held_out[step]["eval_loss"])
    loss, loads = measured(target)
    assert report["evaluation"]["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert held_out[written]["eval_loss"] == pytest.approx(loss, rel=1e-5)
    for path, load in loads.items():
        assert report["expert_load"][path] == pytest.approx(load, abs=1e-4)
    before, _ = measured(out)
    assert held_out[0]["eval_loss"] == pytest.approx(before, rel=1e-5)
    assert report["change"]["value"] == pytest.approx(math.exp(loss - before), rel=1e-5)
    assert report["change"]["low"] < report["change"]["value"] < report["change"]["high"]
    text = told(target)
    assert f"step {written} of 6, which had the lowest loss of 6 evaluations on held-out data" in text
    assert f"these weights have loss {loss:.4f}, perplexity {math.exp(loss):.4g}; before" in text
    assert f"the model had loss {before:.4f}" in text
    losses = {entry["step"]: entry["loss"] for entry in report["log"] if "loss" in entry}
    if written > 1:
        assert f"to {losses[written]:.3f} (step {written})." in text
    assert ("The model before training had the lower loss" in text) == (before < loss)
    assert report["weights_sha256"] == hashlib.sha256((target / "model.safetensors").read_bytes()).hexdigest()
    assert json.loads((target / "training_report.json").read_text())["weights_sha256"]
    assert "## Reconstruction error, when converted" in (target / "README.md").read_text()
    assert "units" not in json.dumps(report["log"])


class Killed(Exception):
    pass


def test_a_resumed_run_tells_the_same(artifact, data, tmp_path):
    _, out = artifact("gpt2", noise=0.1)
    whole = finetune(run(out, data, steps=4), tmp_path / "whole")

    def kill(step: int, steps: int, logs) -> None:
        if step == 3 and "loss" in logs:
            raise Killed

    with pytest.raises(Killed):
        finetune(run(out, data, steps=4), tmp_path / "killed", progress=kill)
    resumed = finetune(run(out, data, steps=4), tmp_path / "killed", resume=True)
    assert resumed["change"] == whole["change"] is not None
    assert resumed["expert_load"] == whole["expert_load"] and resumed["written_step"] == whole["written_step"]
    losses = [[e["eval_loss"] for e in r["log"] if "eval_loss" in e] for r in (whole, resumed)]
    assert losses[0] == losses[1] and len(losses[0]) == 5


def test_masked_tokens_are_the_same_ones_at_every_evaluation(artifact, data, tmp_path):
    """At a rate of almost nothing no evaluation differs; the loss over all tokens is that of `evaluate`."""
    _, out = artifact("bert", "AutoModelForMaskedLM", noise=0.1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out, mask_token="w3", trust_remote_code=True)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    options = {"tokenizer": str(tmp_path / "tokenizer"), "learning_rate": 1e-12, "steps": 2}
    report = finetune(run(out, data, **options), tmp_path / "tuned")
    losses = [entry["eval_loss"] for entry in report["log"] if "eval_loss" in entry]
    assert losses == pytest.approx([report["evaluation"]["eval_loss"]] * 3, rel=1e-6)
    asked = {"tokenizer": str(tmp_path / "tokenizer"), "length": LENGTH, "task": "masked"}
    found = evaluate(str(out), data[1], **asked).metrics["perplexity"].value
    assert math.exp(losses[0]) == pytest.approx(found, rel=1e-5)


def test_of_other_weights_nothing_is_kept_or_drawn(artifact, data, tmp_path):
    _, out = artifact("gpt2", noise=0.1)
    target = tmp_path / "tuned"
    finetune(run(out, data, steps=1), target)
    evaluate(str(target), data[1], length=LENGTH, record=True)
    path = target / "model.safetensors"
    tensors = load_file(path)
    tensors["transformer.wte.weight"][0, 0] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"training_report.json' is about other weights than those in its"
    ):
        draw_pictures(target)
    evaluate(str(target), data[0], length=LENGTH, record=True)
    [kept] = json.loads((target / "evaluation_report.json").read_text())["evaluations"]
    assert kept["data"] == ["train.txt"]
    results = ModelCard.load(target / "README.md").data.eval_results
    assert {result.dataset_name for result in results} == {"train.txt"}


def report(change, written=3, losses=(3.0, 2.9, 2.95, 2.8), **others) -> dict:
    log = [{"step": step, "eval_loss": loss} for step, loss in enumerate(losses)]
    made = {"written_step": written, "steps": 3, "log": log, "evaluation": {"eval_loss": losses[written]}}
    return made | {"change": change} | others


@pytest.mark.parametrize(
    ("value", "low", "high", "verdict"),
    [
        (0.9, 0.85, 0.95, "Training helped."),
        (0.98, 0.9, 1.1, "Training did not help, as far as these data tell: the 95 % interval includes 1."),
        (1.3, 1.2, 1.4, "Training made it worse. The model before training had the lower loss; the best"),
        (1.1, 0.9, 1.2, "includes 1. The model before training had the lower loss; the best of the trained"),
    ],
)
def test_the_verdict_is_that_of_the_interval(value, low, high, verdict):
    found = outcome(report({"value": value, "low": low, "high": high, "note": None}))
    assert verdict in found[-1] and f"{value:.4g} ({low:.4g} to {high:.4g})" in found[-1]


def test_too_few_examples_give_no_verdict():
    reason = "no interval: it takes at least 10 windows, the data give 3"
    found = outcome(report({"value": 0.5, "low": None, "high": None, "note": reason}))
    assert found[-1].endswith(
        "Whether training helped cannot be told (it takes at least 10 windows, the data give 3)."
    )


def test_losses_of_later_steps_are_not_told():
    made = report(None, written=1, losses=(3.0, 2.8, 3.3, 3.5))
    made["log"] += [{"step": step, "loss": 5.0 - step} for step in (1, 2, 3)]
    found = " ".join(outcome(made))
    assert "was 4.000 at step 1" in found and "2.000" not in found
    assert "step 1 of 3, which had the lowest loss of 3 evaluations on held-out data" in found
    made["written_step"] = 2  # as another metric may have it
    assert "The weights are those of step 2 of 3." in outcome(made)


def test_without_held_out_data_it_is_the_last_step(artifact, data, tmp_path):
    _, out = artifact("gpt2", noise=0.1)
    values = run(out, data, steps=2)
    found = finetune(values.replace(eval_data=()), tmp_path / "tuned")
    assert found["written_step"] == 2 and found["evaluation"] is found["change"] is None
    assert "The weights are those of the last step, 2." in told(tmp_path / "tuned")


def test_classes_and_targets_have_a_change_too(artifact, tmp_path):
    from helpers.data import rows

    for model_type, auto, task in (
        ("bert", "AutoModelForSequenceClassification", "classification"),
        ("t5", "AutoModelForSeq2SeqLM", "seq2seq"),
    ):
        _, out = artifact(model_type, auto, noise=0.1)
        text = write(tmp_path / f"{task}.jsonl", rows(task))
        found = finetune(run(out, (text, text), length=8, steps=2, learning_rate=1e-2), tmp_path / task)
        before = next(e for e in found["log"] if e["step"] == 0)
        ratio = math.exp(found["evaluation"]["eval_loss"] - before["eval_loss"])
        assert found["change"]["value"] == pytest.approx(ratio, rel=1e-5)
        assert ("eval_accuracy" in before) == (task == "classification")
