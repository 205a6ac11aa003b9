"""The model card: README.md of an artifact or an export."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from . import experts, snippets
from .architecture import heads, own_heads
from .checkpoint import Checkpoint
from .report import Report
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
            "## Parameters\n\n" + report.plan.totals_table().markdown(),
            *(
                ["## Compression\n\n" + _compression(report)]
                if report.plan.budget or report.divergence
                else []
            ),
            "## Reconstruction error\n\n" + report.matrices_table().markdown(),
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
    """The card of an export. What the artifact's card (`front`) says of licence and base is carried over."""
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
    """The card as it is to stand on the Hub: its snippets load that repository, its results bear its name."""
    from huggingface_hub import ModelCard

    text = snippets.with_model_id(text, repo_id)
    if "\nmodel-index:" not in text:
        return text
    card = ModelCard(text)
    card.data.model_name = repo_id.partition("/")[2]
    return str(card)


def set_section(path: Path, title: str, text: str) -> None:
    """Put a section of that title into a card, before the limits; one that is there already is replaced."""
    remove_section(path, title)
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    place = next((i for i, line in enumerate(lines) if line in ("## Limits", "## Citation")), len(lines))
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
    text = path.read_text(encoding="utf-8").replace(UNTRAINED, "See Training for what became of it since.")
    path.write_text(snippets.with_model_id(text, snippets.PLACEHOLDER), encoding="utf-8")


def _name(report: Report, checkpoint: Checkpoint) -> str:
    return report.plan.source if checkpoint.revision else checkpoint.folder.resolve().name


def _introduction(report: Report, checkpoint: Checkpoint) -> str:
    recipe, plan = report.plan.recipe, report.plan
    name = _name(report, checkpoint)
    kind = experts.load(recipe.kind)
    dense = "the dense FFN" if plan.is_exact else "the dense FFN as far as it was kept"
    if kind.STARTS_EQUAL:
        start = f"Every expert starts as {dense}."
    elif recipe.noise:
        start = f"Expert 0 is {dense}, the others are perturbed by a relative {recipe.noise:g}."
    else:
        start = f"Expert 0 is {dense}, the others are exact copies."
    named = source_front_matter(checkpoint.folder).get("license_name") or report.license
    base, licence = name, f"The licence is that of its base: {named}."
    if checkpoint.revision:
        base = f"[{name}](https://huggingface.co/{name}), revision `{checkpoint.revision}`"
    if named is None:
        licence = "The card of its base names no licence; whatever terms hold for that hold for this."
    return (
        f"# {name} as a mixture of {recipe.experts} experts\n\n"
        f"{len(plan.ffns)} feed-forward networks of {base} were converted by mpoe-convert into mixtures of "
        f"{recipe.experts} experts, {recipe.top_k} per token. The experts are {kind.ABOUT}. {start} "
        f"{UNTRAINED}\n\n{licence}"
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
            "## How to fine-tune it\n\nAs any model of transformers, in a loop like this, by `Trainer` or "
            f"with PEFT:\n\n```python\n{code}\n```",
            "Or by mpoe-convert, with a learning rate for every role, on texts, pairs or classes in files or "
            f"from the Hub:\n\n```\n{command}\n```",
        ]
    return parts


def _own_code(checkpoint: Checkpoint) -> str:
    names = [path.name for path in files(checkpoint.folder, checkpoint.architecture)]
    if not names:
        return ""
    listed = ", ".join(f"`{name}`" for name in names)
    return (
        f" It also runs {listed}: code of the base, copied as it was. Read it before you run it; it may need "
        "more."
    )


def _limits(report: Report, checkpoint: Checkpoint) -> str:
    totals, name = report.plan.totals, _name(report, checkpoint)
    stored = totals.stored_params / totals.dense_params
    flops = totals.flops_per_token / totals.dense_flops_per_token
    lines = [
        f"It stores {stored:.2f} times the parameters of {name} and takes {flops:.2f} times its FLOPs per "
        "token. Experts that were never trained apart give nothing in return.",
        f"What {name} gets wrong, and the biases of its training data, came along with its weights.",
        "Nothing is known of its quality but what this card says was measured.",
        "Its code lies beside it; programs that bring their own for every architecture do not know it.",
    ]
    if report.plan.kept_dense:
        lines.insert(1, f"{len(report.plan.kept_dense)} feed-forward networks stayed dense.")
    return "\n".join(f"* {line}" for line in lines)


def main_auto_class(config: dict, model_type: str) -> str:
    """The Auto class that loads the head which the source was saved with; AutoModel if none does."""
    own = own_heads(config.get("auto_map") or {})
    known = {auto: name.rpartition(".")[2] for auto, name in own.items()} or heads(model_type)
    architecture = next(iter(config.get("architectures") or ()), None)
    matching = [auto for auto, stock in known.items() if stock == architecture]
    return min(matching, key=_preference, default="AutoModel")


def _preference(auto: str) -> tuple[int, str]:
    """Where an Auto class stands among those that load one head: BART's, for example, is in three."""
    first = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM", "AutoModel")
    if auto in first:
        return first.index(auto), auto
    return len(first) + (auto == "AutoModelForPreTraining"), auto


def _compression(report: Report) -> str:
    """What the FFNs store and how far that took the model from the dense one."""
    recipe, budget, found = report.plan.recipe, report.plan.budget, report.divergence
    totals = report.plan.ffn_totals
    calibrated = f"calibrated on {budget.tokens:,} tokens" if budget and budget.tokens else "calibrated"
    details = [f"metric {recipe.metric}", calibrated if found else "without calibration"]
    details += ["corrected"] if recipe.correct else []
    details += [f"the nearest to the dense model of {len(report.trials)} ways"] if report.trials else []
    text = (
        f"The FFNs store {totals.stored_params / totals.dense_params:.1%} of the dense FFNs' numbers "
        f"({', '.join(details)})."
    )
    return text if found is None else f"{text} {report.divergence_in_words()}"
