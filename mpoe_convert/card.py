"""The model card: README.md of an artifact."""

from __future__ import annotations

import re
from pathlib import Path

from . import experts
from .checkpoint import Checkpoint
from .report import MatrixReport, Report

CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag", "datasets")
UNTRAINED = (
    "The router is untrained: this is a starting point for fine-tuning, not a better model than its base."
)
PAPER = "https://arxiv.org/abs/2203.01104"


def source_front_matter(folder: Path) -> dict:
    """The YAML front matter of the source's README.md; empty if there is none that can be read."""
    import yaml

    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    if not text.startswith("---"):
        return {}
    try:
        values = yaml.safe_load(text.split("---", 2)[1])
    except (yaml.YAMLError, IndexError):
        return {}
    return values if isinstance(values, dict) else {}


def source_license(folder: Path) -> str | None:
    """The licence that the source's card names."""
    return source_front_matter(folder).get("license")


def write(path: Path, report: Report, checkpoint: Checkpoint) -> None:
    """Write the card. Front matter that describes the model itself is carried over from the source."""
    from huggingface_hub import ModelCard, ModelCardData

    front = source_front_matter(checkpoint.folder)
    data = ModelCardData(
        base_model=report.plan.source if checkpoint.revision else None,
        library_name="transformers",
        tags=["mpoe", "moe", "mixture-of-experts", "tensor-train", report.plan.model_type],
        **{key: front[key] for key in CARRIED if front.get(key) is not None},
    )
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_body(report, checkpoint)}")
    path.write_text(str(card), encoding="utf-8")


def _body(report: Report, checkpoint: Checkpoint) -> str:
    return "\n\n".join(
        [
            _introduction(report, checkpoint),
            *(f"> **Warning:** {text}" for text in report.warnings),
            _usage(report, checkpoint),
            "## Parameters\n\n" + _totals(report),
            *(
                ["## Compression\n\n" + _compression(report)]
                if report.plan.budget or report.divergence
                else []
            ),
            "## Reconstruction error\n\n" + _errors(report),
            f"## Citation\n\nThe method is MPOE: [Parameter-Efficient Mixture-of-Experts Architecture for "
            f"Pre-trained Language Models]({PAPER}), Gao et al., COLING 2022.\n",
        ]
    )


def with_model_id(text: str, model_id: str) -> str:
    """A card whose snippets load `model_id`."""
    return re.sub(r'^model_id = ".*"$', f'model_id = "{model_id}"', text, flags=re.MULTILINE)


def set_section(path: Path, title: str, text: str) -> None:
    """Put a section of that title into a card, before the citation; one that is there already is replaced."""
    remove_section(path, title)
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    place = next((i for i, line in enumerate(lines) if line == "## Citation"), len(lines))
    lines[place:place] = [f"## {title}", "", *text.splitlines(), ""]
    path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def remove_section(path: Path, title: str) -> None:
    """Take a section out of a card, if both are there."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    if f"## {title}" in lines:
        start = lines.index(f"## {title}")
        end = next((i for i in range(start + 1, len(lines)) if lines[i].startswith("## ")), len(lines))
        path.write_text("\n".join(lines[:start] + lines[end:]).rstrip() + "\n", encoding="utf-8")


def describe_training(path: Path, report: dict) -> None:
    """Say in a card how its model was trained, from a training report."""
    run, log = report["run"], report["log"]
    time = "" if report["resumed"] else f" in {report['seconds']:,.0f} s"  # which are those since
    losses = [entry["loss"] for entry in log if "loss" in entry]
    lines = [
        f"This model was fine-tuned by `mpoe-convert finetune` (task {report['task']}): {report['steps']} "
        f"steps{time}, {run['batch_size'] * run['accumulate']} examples per device "
        f"and step, learning rate {run['learning_rate']:g} ({run['schedule']}), seed {run['seed']}."
    ]
    if run["teacher"]:
        lines.append(f"It was taught by {Path(run['teacher']).name}, weight {run['teacher_weight']:g}.")
    if losses:
        lines.append(
            f"The training loss, routers' losses included, went from {losses[0]:.3f} to {losses[-1]:.3f}."
        )
    if report["evaluation"]:
        numbers = report["evaluation"]
        shown = [name for name in ("eval_loss", "eval_perplexity", "eval_accuracy") if name in numbers]
        lines.append("Evaluation: " + ", ".join(f"{name[5:]} {numbers[name]:.4f}" for name in shown) + ".")
    lines.append("All settings and the log are in `training_report.json`.")
    set_section(path, "Training", "\n".join(lines))
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(UNTRAINED, "See Training for what became of it since."), encoding="utf-8")


def _name(report: Report, checkpoint: Checkpoint) -> str:
    return report.plan.source if checkpoint.revision else checkpoint.folder.resolve().name


def _introduction(report: Report, checkpoint: Checkpoint) -> str:
    recipe, plan = report.plan.recipe, report.plan
    name = _name(report, checkpoint)
    kind = experts.load(recipe.kind)
    if kind.STARTS_EQUAL:
        start = "Every expert starts as the dense FFN."
    elif recipe.noise:
        start = f"Expert 0 is the dense FFN, the others are perturbed by a relative {recipe.noise:g}."
    else:
        start = "Expert 0 is the dense FFN, the others are exact copies."
    return (
        f"# {name} as a mixture of {recipe.experts} experts\n\n"
        f"{len(plan.ffns)} feed-forward networks of {name} were converted by mpoe-convert into mixtures of "
        f"{recipe.experts} experts, {recipe.top_k} per token. The experts are {kind.ABOUT}. {start} "
        f"{UNTRAINED}"
    )


def _usage(report: Report, checkpoint: Checkpoint) -> str:
    auto = main_auto_class(checkpoint.config, report.plan.model_type)
    has_tokenizer = any("token" in path.name for path in checkpoint.companion_files())
    lines = [f"from transformers import {auto}" + (", AutoTokenizer" if has_tokenizer else ""), ""]
    lines.append('model_id = "path/to/this"')
    lines.append(f"model = {auto}.from_pretrained(model_id, trust_remote_code=True)")
    if has_tokenizer:
        lines.append("tokenizer = AutoTokenizer.from_pretrained(model_id, trust_remote_code=True)")
    code = "\n".join(lines)
    return (
        f"## How to load it\n\n```python\n{code}\n```\n\n"
        "`trust_remote_code` runs `modeling_mpoe.py` from this folder, which needs torch and transformers."
    )


def main_auto_class(config: dict, model_type: str) -> str:
    """The Auto class that loads the head which the source was saved with; AutoModel if none does."""
    from .artifact import heads

    known = heads(model_type)
    architecture = next(iter(config.get("architectures") or ()), None)
    matching = [auto for auto, stock in known.items() if stock == architecture]
    return min(matching, key=_preference, default="AutoModel")


def _preference(auto: str) -> tuple[int, str]:
    """Where an Auto class stands among those that load one head: BART's, for example, is in three."""
    first = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM", "AutoModel")
    if auto in first:
        return first.index(auto), auto
    return len(first) + (auto == "AutoModelForPreTraining"), auto


def _totals(report: Report) -> str:
    rows = ["| | dense base | plain MoE | this model |", "|---|---:|---:|---:|"]
    for label, totals in (("FFNs", report.plan.ffn_totals), ("whole model", report.plan.totals)):
        rows += [
            f"| {label}: parameters stored | {totals.dense_params:,} | {totals.plain_moe_params:,} | "
            f"{totals.stored_params:,} |",
            f"| {label}: parameters used per token | {totals.dense_params:,} | "
            f"{totals.plain_moe_active_params:,} | {totals.active_params:,} |",
            f"| {label}: bytes | {totals.dense_bytes:,} | {totals.plain_moe_bytes:,} | "
            f"{totals.stored_bytes:,} |",
            f"| {label}: FLOPs per token | {totals.dense_flops_per_token:,} | "
            f"{totals.plain_moe_flops_per_token:,} | {totals.flops_per_token:,} |",
        ]
    return "\n".join(rows)


def _errors(report: Report) -> str:
    names = ["matrix", "shape", "bonds", "relative error", "clone drift", "parameters"]
    measured = any(matrix.output_error is not None for matrix in report.matrices)
    if measured:
        names[4:4] = ["of outputs"]
    rows = [f"| {' | '.join(names)} |", f"|---|---|---|{'---:|' * (len(names) - 3)}"]
    return "\n".join(rows + [_error_row(matrix) for matrix in report.matrices])


def _compression(report: Report) -> str:
    """What the FFNs store and how far that took the model from the dense one."""
    recipe, budget, found = report.plan.recipe, report.plan.budget, report.divergence
    totals = report.plan.ffn_totals
    calibrated = f"calibrated on {budget.tokens:,} tokens" if budget and budget.tokens else "calibrated"
    details = [f"metric {recipe.metric}", calibrated if found else "without calibration"]
    details += ["corrected"] if recipe.correct else []
    text = (
        f"The FFNs store {totals.stored_params / totals.dense_params:.1%} of the dense FFNs' numbers "
        f"({', '.join(details)})."
    )
    return text if found is None else f"{text} {found.in_words()}"


def _error_row(matrix: MatrixReport) -> str:
    bonds = ", ".join(map(str, matrix.bonds)) or "–"
    of_outputs = "" if matrix.output_error is None else f"{matrix.output_error:.2e} | "
    return (
        f"| `{matrix.name}` | {matrix.shape[0]} x {matrix.shape[1]} | {bonds} | "
        f"{matrix.relative_error:.2e} | {of_outputs}{matrix.clone_drift:.2e} | {matrix.stored_params:,} |"
    )
