"""What training did, in words: the section on training in a model card, and lines for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..artifact import snippets
from ..artifact.card_file import UNTRAINED, set_section
from ..errors import counted
from .intervals import Metric

# Sections of a card that measure the weights before training.
MEASURED_BEFORE = ("Compression", "Reconstruction error")
BEFORE = ", when converted"


def describe_training(path: Path, report: Mapping) -> None:
    """Write how a model was trained into its card.

    Args:
        path: the card.
        report: of the training, as `finetune` returns it.
    """
    run = report["run"]
    lines = [
        f"This model was fine-tuned by `mpoe-convert finetune` (task {report['task']}): "
        f"{steps_taken(report)}, {counted(run['batch_size'] * run['accumulate'], 'example')} per device "
        f"and step, learning rate {run['learning_rate']:g} ({run['schedule']}), seed {run['seed']}."
    ]
    if run["teacher"]:
        teacher, weight = Path(run["teacher"]).name, run["teacher_weight"]
        lines.append(f"It was distilled from {teacher}, with weight {weight:g} of the loss.")
    lines += outcome(report)
    lines.append("All settings and the log are in `training_report.json`.")
    set_section(path, "Training", "\n".join(lines))
    text = path.read_text(encoding="utf-8").replace(UNTRAINED, "It was fine-tuned since: see Training.")
    for title in MEASURED_BEFORE:
        text = text.replace(f"\n## {title}\n", f"\n## {title}{BEFORE}\n")
    path.write_text(snippets.with_model_id(text, snippets.PLACEHOLDER), encoding="utf-8")


def steps_taken(report: Mapping) -> str:
    """How many steps a training took, and how long; one that was resumed knows a part of its time only."""
    time = "" if report["resumed"] else f" in {report['seconds']:,.0f} s"
    return f"{counted(report['steps'], 'step')}{time}"


def outcome(report: Mapping) -> list[str]:
    """What came out of a training, as sentences; all of them are about the weights that were written."""
    return [*_weights(report), *_training_loss(report), *_chosen(report), *_held_out(report)]


def held_out(log: list[dict]) -> dict[int, dict]:
    """{step: the last evaluation's entry in the log}, of every step that was evaluated."""
    return {entry["step"]: entry for entry in log if "eval_loss" in entry}


def _weights(report: Mapping) -> list[str]:
    written, steps = report["written_step"], report["steps"]
    losses = {step: entry["eval_loss"] for step, entry in held_out(report["log"]).items() if step}
    if written == steps and len(losses) < 2:
        return [f"The weights are those of the last step, {steps}."]
    found = f"The weights are those of step {written} of {steps}"
    if written not in losses or losses[written] > min(losses.values()):  # chosen by something else
        return [f"{found}."]
    chosen = f"which had the lowest loss of {counted(len(losses), 'evaluation')} on held-out data"
    return [f"{found}, {chosen}; this choice flatters it."]


def _training_loss(report: Mapping) -> list[str]:
    """Up to the step that was written; what came after is about other weights."""
    entries = [e for e in report["log"] if "loss" in e and e["step"] <= report["written_step"]]
    if not entries:
        return []
    first, last = entries[0], entries[-1]
    loss = "The training loss, with the router losses,"
    if first is last:
        return [f"{loss} was {first['loss']:.3f} at step {first['step']}."]
    went = f"went from {first['loss']:.3f} (step {first['step']}) to {last['loss']:.3f} (step {last['step']})"
    return [f"{loss} {went}."]


def _chosen(report: Mapping) -> list[str]:
    """How many experts a token went to, where that varies."""
    for entry in reversed([e for e in report["log"] if e["step"] <= report["written_step"]]):
        numbers = [value for key, value in entry.items() if key.startswith("experts_per_token/")]
        if numbers:
            mean, low, high = sum(numbers) / len(numbers), min(numbers), max(numbers)
            return [
                f"At step {entry['step']} a token went to {mean:.2f} experts per mixture ({low:.2f} to "
                f"{high:.2f} by mixture)."
            ]
    return []


def _held_out(report: Mapping) -> list[str]:
    if not report["evaluation"]:
        return []
    before, change = held_out(report["log"]).get(0), report["change"]
    had = "" if before is None else f"; before training the model had {_scores(before)}"
    lines = [f"On held-out data these weights have {_scores(report['evaluation'])}{had}."]
    if change is not None:
        lines += [f"The ratio of the perplexities is {Metric(**change).in_words()}. {verdict(report)}"]
    return lines


def _scores(scores: Mapping) -> str:
    shown = [name for name in ("eval_loss", "eval_perplexity", "eval_accuracy") if name in scores]
    return ", ".join(f"{name[5:]} {score_in_words(name, scores[name])}" for name in shown)


def score_in_words(name: str, score: float) -> str:
    """A held-out score for people: of losses and accuracies four decimals, of perplexities four digits."""
    return f"{score:.4g}" if name.endswith("perplexity") else f"{score:.4f}"


def verdict(report: Mapping) -> str:
    """Whether training helped, by the paired interval of the ratio of perplexities."""
    change = Metric(**report["change"])
    if change.low is None or change.high is None:
        reason = "" if change.note is None else change.note.partition(": ")[2]
        return f"Whether training helped cannot be told ({reason})."
    if change.high < 1:
        return "Training helped."
    worse = " The model before training had the lower loss; the best of the trained ones was written."
    if change.low > 1:
        return f"Training made it worse.{worse}"
    text = "Training did not help, as far as these data tell: the 95 % interval includes 1."
    return text + (worse if change.value is not None and change.value > 1 else "")
