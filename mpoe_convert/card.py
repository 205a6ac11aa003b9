"""The model card: README.md of an artifact or an export."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from . import experts, snippets
from .architecture import heads, own_heads
from .checkpoint import Checkpoint
from .report import MatrixReport, Report
from .snippets import PIPELINE_TAGS
from .source_code import files

CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag", "datasets")
UNTRAINED = (
    "The router is untrained: this is a starting point for fine-tuning, not a better model than its base."
)
CITATION = """\
## Citation

The method is MPOE, [arXiv 2203.01104](https://arxiv.org/abs/2203.01104):

```bibtex
@inproceedings{gao2022mpoe,
  title     = {Parameter-Efficient Mixture-of-Experts Architecture for Pre-trained Language Models},
  author    = {Gao, Ze-Feng and Liu, Peiyu and Zhao, Wayne Xin and Lu, Zhong-Yi and Wen, Ji-Rong},
  booktitle = {Proceedings of the 29th International Conference on Computational Linguistics (COLING)},
  year      = {2022}
}
```
"""


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
    auto = main_auto_class(checkpoint.config, report.plan.model_type)
    carried = {key: front[key] for key in CARRIED if front.get(key) is not None}
    data = ModelCardData(
        base_model=report.plan.source if checkpoint.revision else None,
        library_name="transformers",
        tags=["mpoe", "moe", "mixture-of-experts", "tensor-train", report.plan.model_type],
        **{"pipeline_tag": PIPELINE_TAGS.get(auto)} | carried,
    )
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_body(report, checkpoint, auto)}")
    path.write_text(str(card), encoding="utf-8")


def _body(report: Report, checkpoint: Checkpoint, auto: str) -> str:
    return "\n\n".join(
        [
            _introduction(report, checkpoint),
            *(f"> **Warning:** {text}" for text in report.warnings),
            *_usage(checkpoint, auto),
            "## Parameters\n\n" + _totals(report),
            *(
                ["## Compression\n\n" + _compression(report)]
                if report.plan.budget or report.divergence
                else []
            ),
            "## Reconstruction error\n\n" + _errors(report),
            "## Limits\n\n" + _limits(report, checkpoint),
            CITATION,
        ]
    )


def write_export(
    path: Path,
    title: str,
    paragraphs: Iterable[str],
    code: str,
    front: dict,
    tags: Iterable[str],
    library: str,
) -> None:
    """Write the card of an export, with licence and base from the front matter of the artifact's card."""
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(
        base_model=front.get("base_model"),
        library_name=library,
        tags=list(tags),
        **{key: front[key] for key in CARRIED if front.get(key) is not None},
    )
    body = "\n\n".join([f"# {title}", *paragraphs, f"## How to load it\n\n```python\n{code}\n```\n"])
    path.write_text(str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")), encoding="utf-8")


def for_repository(text: str, repo_id: str) -> str:
    """The card for the Hub: its snippets load that repository, its results have that repository's name."""
    from huggingface_hub import ModelCard

    text = snippets.with_model_id(text, repo_id)
    if "\nmodel-index:" not in text:
        return text
    card = ModelCard(text)
    card.data.model_name = repo_id.partition("/")[2]
    return str(card)


def set_section(path: Path, title: str, text: str) -> None:
    """Put a section into a card, before the limits. A section with that title is replaced."""
    remove_section(path, title)
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    place = next((i for i, line in enumerate(lines) if line in ("## Limits", "## Citation")), len(lines))
    lines[place:place] = [f"## {title}", "", *text.splitlines(), ""]
    path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def remove_section(path: Path, title: str) -> None:
    """Remove a section from a card, if both exist."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    if f"## {title}" in lines:
        start = lines.index(f"## {title}")
        end = next((i for i in range(start + 1, len(lines)) if lines[i].startswith("## ")), len(lines))
        path.write_text("\n".join(lines[:start] + lines[end:]).rstrip() + "\n", encoding="utf-8")


def describe_training(path: Path, report: dict) -> None:
    """Write into a card how its model was trained, from a training report."""
    run, log = report["run"], report["log"]
    time = "" if report["resumed"] else f" in {report['seconds']:,.0f} s"  # else: of the last part only
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
        numbers = report["evaluation"]
        shown = [name for name in ("eval_loss", "eval_perplexity", "eval_accuracy") if name in numbers]
        lines.append("Evaluation: " + ", ".join(f"{name[5:]} {numbers[name]:.4f}" for name in shown) + ".")
    lines.append("All settings and the log are in `training_report.json`.")
    set_section(path, "Training", "\n".join(lines))
    text = path.read_text(encoding="utf-8").replace(UNTRAINED, "It was fine-tuned since: see Training.")
    path.write_text(snippets.with_model_id(text, snippets.PLACEHOLDER), encoding="utf-8")


def _name(report: Report, checkpoint: Checkpoint) -> str:
    return report.plan.source if checkpoint.revision else checkpoint.folder.resolve().name


def _networks(number: int, of: str = "") -> str:
    """The subject of a sentence: "4 feed-forward networks of tiny-gpt2 were"."""
    return f"1 feed-forward network{of} was" if number == 1 else f"{number} feed-forward networks{of} were"


def _introduction(report: Report, checkpoint: Checkpoint) -> str:
    recipe, plan = report.plan.recipe, report.plan
    name = _name(report, checkpoint)
    kind = experts.load(recipe.kind)
    dense = "the dense FFN" if plan.is_exact else "an approximation of the dense FFN"
    if kind.STARTS_EQUAL:
        start = f"Every expert starts as {dense}."
    elif recipe.noise:
        start = f"Expert 0 is {dense}; the others are perturbed by relative noise of {recipe.noise:g}."
    else:
        start = f"Expert 0 is {dense}; the others are exact copies of it."
    named = source_front_matter(checkpoint.folder).get("license_name") or report.license
    base, licence = name, f"The licence is that of its base: {named}."
    if checkpoint.revision:
        base = f"[{name}](https://huggingface.co/{name}), revision `{checkpoint.revision}`"
    if named is None:
        licence = "The card of its base names no licence; the terms of the base apply."
    return (
        f"# {name} as a mixture of {recipe.experts} experts\n\n"
        f"{_networks(len(plan.ffns), f' of {base}')} converted by mpoe-convert into mixtures of "
        f"{recipe.experts} experts, of which {recipe.top_k} are chosen per token. "
        f"The experts are {kind.ABOUT}. {start} {UNTRAINED}\n\n{licence}"
    )


def _usage(checkpoint: Checkpoint, auto: str) -> list[str]:
    has_tokenizer = any("token" in path.name for path in checkpoint.companion_files())
    parts = [
        f"## How to use it\n\n```python\n{snippets.loading(auto, has_tokenizer)}\n```",
        "`trust_remote_code` runs `modeling_mpoe.py` from this folder, which needs torch and transformers."
        + _own_code(checkpoint),
    ]
    code = snippets.training(auto) if has_tokenizer else None
    command = snippets.command(auto, has_own_code=checkpoint.code is not None)
    if code:
        parts += [
            "## How to fine-tune it\n\nLike any transformers model: in a loop such as this one, with "
            f"`Trainer`, or with PEFT:\n\n```python\n{code}\n```",
            "Or with mpoe-convert, which has learning rates for central tensors, auxiliary tensors and "
            "routers, and reads texts, pairs and labels from files or from the Hub:\n\n"
            f"```\n{command}\n```",
        ]
    return parts


def _own_code(checkpoint: Checkpoint) -> str:
    names = [path.name for path in files(checkpoint.folder, checkpoint.architecture)]
    if not names:
        return ""
    listed = ", ".join(f"`{name}`" for name in names)
    return (
        f" It also runs {listed}: custom code of the base, copied unchanged. Read it before you run it; it "
        "may need other packages."
    )


def _limits(report: Report, checkpoint: Checkpoint) -> str:
    totals, name = report.plan.totals, _name(report, checkpoint)
    stored = totals.stored_params / totals.dense_params
    flops = totals.flops_per_token / totals.dense_flops_per_token
    lines = [
        f"It stores {stored:.2f} times the parameters of {name} and takes {flops:.2f} times its FLOPs per "
        "token. It gains nothing from this until its experts are trained.",
        f"It has the errors of {name}, and the biases of its training data.",
        "Quality was not evaluated beyond the measurements in this card.",
        "It needs `trust_remote_code=True`. Inference engines with built-in architectures (vLLM, llama.cpp) "
        "cannot load it; see `mpoe-convert export`.",
    ]
    if report.plan.kept_dense:
        lines.insert(1, f"{_networks(len(report.plan.kept_dense))} left dense.")
    return "\n".join(f"* {line}" for line in lines)


def main_auto_class(config: dict, model_type: str) -> str:
    """The Auto class that loads the head which the source was saved with; AutoModel if none does."""
    own = own_heads(config.get("auto_map") or {})
    known = {auto: name.rpartition(".")[2] for auto, name in own.items()} or heads(model_type)
    architecture = next(iter(config.get("architectures") or ()), None)
    matching = [auto for auto, stock in known.items() if stock == architecture]
    return min(matching, key=_preference, default="AutoModel")


def _preference(auto: str) -> tuple[int, str]:
    """Sort key of the Auto classes that load one head: BART's, for example, is in three."""
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
    """What the FFNs store, and the divergence from the dense model."""
    recipe, budget, found = report.plan.recipe, report.plan.budget, report.divergence
    totals = report.plan.ffn_totals
    calibrated = f"calibrated on {budget.tokens:,} tokens" if budget and budget.tokens else "calibrated"
    details = [f"metric {recipe.metric}", calibrated if found else "without calibration"]
    details += ["corrected"] if recipe.correct else []
    details += [f"the closest to the dense model of {len(report.trials)} variants"] if report.trials else []
    text = (
        f"The FFNs store {totals.stored_params / totals.dense_params:.1%} of the dense FFNs' parameters "
        f"({', '.join(details)})."
    )
    return text if found is None else f"{text} {report.divergence_in_words()}"


def _error_row(matrix: MatrixReport) -> str:
    bonds = ", ".join(map(str, matrix.bonds)) or "–"
    of_outputs = "" if matrix.output_error is None else f"{matrix.output_error:.2e} | "
    return (
        f"| `{matrix.name}` | {matrix.shape[0]} x {matrix.shape[1]} | {bonds} | "
        f"{matrix.relative_error:.2e} | {of_outputs}{matrix.clone_drift:.2e} | {matrix.stored_params:,} |"
    )
