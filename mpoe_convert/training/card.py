"""The section on training in a model card."""

from __future__ import annotations

from pathlib import Path

from ..artifact import snippets
from ..artifact.card_file import UNTRAINED, set_section


def describe_training(path: Path, report: dict) -> None:
    """Write how a model was trained into its card.

    Args:
        path: the card.
        report: of the training, as `finetune` returns it.
    """
    run, log = report["run"], report["log"]
    time = "" if report["resumed"] else f" in {report['seconds']:,.0f} s"  # a resumed run knows its own only
    losses = [entry["loss"] for entry in log if "loss" in entry]
    lines = [
        f"This model was fine-tuned by `mpoe-convert finetune` (task {report['task']}): {report['steps']} "
        f"steps{time}, {run['batch_size'] * run['accumulate']} examples per device "
        f"and step, learning rate {run['learning_rate']:g} ({run['schedule']}), seed {run['seed']}."
    ]
    if run["teacher"]:
        teacher, weight = Path(run["teacher"]).name, run["teacher_weight"]
        lines.append(f"It was distilled from {teacher}, with weight {weight:g} of the loss.")
    if losses:
        lines.append(
            f"The training loss, with the router losses, went from {losses[0]:.3f} to {losses[-1]:.3f}."
        )
    if report["evaluation"]:
        scores = report["evaluation"]
        shown = [name for name in ("eval_loss", "eval_perplexity", "eval_accuracy") if name in scores]
        lines.append("Evaluation: " + ", ".join(f"{name[5:]} {scores[name]:.4f}" for name in shown) + ".")
    lines.append("All settings and the log are in `training_report.json`.")
    set_section(path, "Training", "\n".join(lines))
    text = path.read_text(encoding="utf-8").replace(UNTRAINED, "It was fine-tuned since: see Training.")
    path.write_text(snippets.with_model_id(text, snippets.PLACEHOLDER), encoding="utf-8")
