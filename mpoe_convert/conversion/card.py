"""The model card: README.md of an artifact or an export."""

from __future__ import annotations

from pathlib import Path

from .. import experts
from ..artifact import snippets
from ..artifact.auto_classes import has_tokenizer
from ..artifact.card_file import CARRIED, UNTRAINED, source_front_matter
from ..artifact.loading import AUTO_CLASSES
from ..artifact.snippets import PIPELINE_TAGS
from ..errors import counted
from ..experts.selection import in_words
from ..planning.mixtures import MixturePlan
from ..planning.recipe import Recipe
from ..source.architecture import main_auto_class
from ..source.checkpoint import Checkpoint
from ..source.custom_code import files
from ..source.sentence_encoder import encoder_class
from .mixtures import StackReport
from .report import Report

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


# Where the forms come from that experts of a mixture take.
_FORMS = {
    "none": "SVD-LLM ([arXiv 2403.07378](https://arxiv.org/abs/2403.07378))",
    "input": "MoLAE",
    "output": "MoLAE",
    "both": "TD-MoE",
    "base": "D2-MoE ([arXiv 2502.17298](https://arxiv.org/abs/2502.17298))",
}


def write(path: Path, report: Report, checkpoint: Checkpoint) -> None:
    """Write the card. Front matter that describes the model itself is carried over from the source."""
    from huggingface_hub import ModelCardData

    front = source_front_matter(checkpoint.folder)
    auto = main_auto_class(checkpoint.config, report.plan.model_type)
    carried = {key: front[key] for key in CARRIED if front.get(key) is not None}
    data = ModelCardData(
        base_model=report.plan.source if checkpoint.revision else None,
        library_name="transformers",
        tags=[*_tags(report), report.plan.model_type],
        pipeline_tag=carried.pop("pipeline_tag", PIPELINE_TAGS.get(auto)),
        **carried,
    )
    # Not by `ModelCard`, which imports the client of the Hub to write the same.
    text = f"---\n{data.to_yaml()}\n---\n\n{_body(report, checkpoint, auto)}"
    path.write_text(text, encoding="utf-8")


def _tags(report: Report) -> list[str]:
    of_mixtures = ["mpoe", "moe", "mixture-of-experts"]
    return of_mixtures if isinstance(report.plan, MixturePlan) else [*of_mixtures, "tensor-train"]


def _body(report: Report, checkpoint: Checkpoint, auto: str) -> str:
    return "\n\n".join(
        [
            _introduction(report, checkpoint),
            *(f"> **Warning:** {text}" for text in report.warnings),
            *_usage(checkpoint, auto),
            "## Parameters\n\n" + report.plan.totals_table().markdown() + f"\n\n{report.plan.savings}",
            *(
                ["## Compression\n\n" + _compression(report)]
                if report.plan.budget or report.divergence
                else []
            ),
            *_left_out(report),
            *(["## Rounding\n\n" + _rounding(report)] if report.rounding else []),
            "## Reconstruction error\n\n" + report.matrices_table().markdown(),
            "## Limits\n\n" + _limits(report, checkpoint),
            *_citation(report),
        ]
    )


def _citation(report: Report) -> list[str]:
    """The method; of a mixture those whose forms its experts take."""
    if not isinstance(report.plan, MixturePlan):
        return [CITATION]
    used = {matrix.form for matrix in report.matrices if isinstance(matrix, StackReport)}
    lines = [f"* {form}: {_FORMS[form]}" for form in _FORMS if form in used]
    texts = ["What experts share, as in:\n\n" + "\n".join(lines)] if lines else []
    if report.plan.fewer is not None:
        texts.append("Which experts stay: REAP ([arXiv 2510.13999](https://arxiv.org/abs/2510.13999)).")
    return ["## Methods\n\n" + "\n\n".join(texts) + "\n"] if texts else []


def _left_out(report: Report) -> list[str]:
    """Which experts of a mixture are left out."""
    if not isinstance(report.plan, MixturePlan) or report.plan.fewer is None:
        return []
    return [
        "## Experts that are left out\n\nNumbers are those of the base. A score is the mean norm of what an "
        f"expert adds to a token that is routed to it.\n\n{report.plan.fewer.table().markdown()}"
    ]


def _name(report: Report, checkpoint: Checkpoint) -> str:
    return report.plan.source if checkpoint.revision else checkpoint.folder.resolve().name


def _networks(number: int, of: str = "") -> str:
    """The subject of a sentence: "4 feed-forward networks of tiny-gpt2 were"."""
    return f"1 feed-forward network{of} was" if number == 1 else f"{number} feed-forward networks{of} were"


def _introduction(report: Report, checkpoint: Checkpoint) -> str:
    if isinstance(report.plan, MixturePlan):
        return _introduction_of_experts(report, report.plan, checkpoint)
    recipe, plan = report.plan.recipe, report.plan
    name = _name(report, checkpoint)
    kind = experts.load(recipe.kind)
    dense = "the dense FFN" if plan.is_exact else "an approximation of the dense FFN"
    if state := recipe.own_options.first_state():
        start = state
    elif kind.STARTS_EQUAL:
        start = f"Every expert starts as {dense}."
    elif recipe.noise:
        start = f"Expert 0 is {dense}; the others are perturbed by relative noise of {recipe.noise:g}."
    else:
        start = f"Expert 0 is {dense}; the others are exact copies of it."
    base, licence = _base_and_licence(report, checkpoint)
    return (
        f"# {name} as a mixture of {recipe.experts} experts\n\n"
        f"{_networks(len(plan.ffns), f' of {base}')} converted by mpoe-convert into mixtures of "
        f"{recipe.experts} experts, {in_words(recipe.select, recipe.top_k, recipe.threshold)}"
        f"{_shared_experts(recipe)}. "
        f"The experts are {kind.ABOUT}. {start} {UNTRAINED}\n\n{licence}"
    )


def _shared_experts(recipe: Recipe) -> str:
    """The end of a sentence about experts that every token passes."""
    number = recipe.shared_experts
    return f", beside {counted(number, 'expert')} that every token passes" if number else ""


def _base_and_licence(report: Report, checkpoint: Checkpoint) -> tuple[str, str]:
    """The source, as the text names it, and a sentence about its licence."""
    name = base = _name(report, checkpoint)
    named = source_front_matter(checkpoint.folder).get("license_name") or report.license
    if checkpoint.revision:
        base = f"[{name}](https://huggingface.co/{name}), revision `{checkpoint.revision}`"
    if named is None:
        return base, "The card of its base names no licence; the terms of the base apply."
    return base, f"The licence is that of its base: {named}."


def _introduction_of_experts(report: Report, plan: MixturePlan, checkpoint: Checkpoint) -> str:
    """Of a mixture as the source."""
    base, licence = _base_and_licence(report, checkpoint)
    name, layers = _name(report, checkpoint), counted(len(plan.ffns), "layer")
    stay, others = f"There are {plan.recipe.experts} per layer", "Routers and all else are those"
    if plan.fewer is not None:
        stay = f"Of {plan.source_experts} per layer {plan.recipe.experts} are left"
        others = "Routers keep the rows of these; all else is that"
    if plan.is_exact:
        how, title = f"stored whole{_roundings(plan.recipe)}.", name
    elif all(matrix.form == "whole" for matrix in report.matrices if isinstance(matrix, StackReport)):
        how, title = "stored whole.", f"{name}, smaller"
    else:
        kept = plan.ffn_totals.stored_params / plan.ffn_totals.dense_params
        forms = ", ".join(
            dict.fromkeys(matrix.form for matrix in report.matrices if isinstance(matrix, StackReport))
        )
        how, title = f"stored in {kept:.1%} of their numbers (shared: {forms}).", f"{name}, smaller"
    return (
        f"# {title}\n\nThe experts of {layers} of {base} are {how} {stay}, of which a token takes "
        f"{plan.recipe.top_k}. {others} of the base. Made by mpoe-convert.\n\n{licence}"
    )


def _roundings(recipe: Recipe) -> str:
    """The end of a sentence about numbers that are kept: what rounds them."""
    if recipe.bits is not None:
        return f", rounded to {recipe.bits} bits"
    return ": the model computes what its base does" if recipe.dtype is None else f", in {recipe.dtype}"


def _usage(checkpoint: Checkpoint, auto: str) -> list[str]:
    reads_text = has_tokenizer(checkpoint.folder)
    parts = [
        f"## How to use it\n\n```python\n{snippets.loading(auto, reads_text)}\n```",
        "`trust_remote_code` runs `modeling_mpoe.py` from this folder, which needs torch and transformers."
        + _own_code(checkpoint),
    ]
    if kind := encoder_class(checkpoint.folder):
        parts.append(f"As the sentence encoder that it is:\n\n```python\n{snippets.encoding(kind)}\n```")
    code = snippets.training(auto) if reads_text else None
    command = snippets.command(auto, has_own_code=checkpoint.code is not None)
    if code:
        parts += [
            "## How to fine-tune it\n\nLike any transformers model: in a loop such as this one, with "
            f"`Trainer`, or with PEFT:\n\n```python\n{code}\n```"
        ]
    if code and auto in AUTO_CLASSES.values():
        parts += [
            "Or with mpoe-convert, which has learning rates for central tensors, auxiliary tensors and "
            "routers, and reads texts, pairs and labels from files or from the Hub:\n\n"
            f"```\n{command}\n```"
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
    if isinstance(report.plan, MixturePlan):
        lines = _shared_limits(_name(report, checkpoint))
        if report.plan.kept_dense:
            lines.insert(
                0, f"The experts of {counted(len(report.plan.kept_dense), 'layer')} were left as they are."
            )
        return "\n".join(f"* {line}" for line in lines)
    totals, name = report.plan.totals, _name(report, checkpoint)
    stored = totals.stored_params / totals.dense_params
    flops = totals.flops_per_token / totals.dense_flops_per_token
    most = f"{totals.per_token} " if totals.per_token else ""
    lines = [
        f"It stores {stored:.2f} times the parameters of {name} and takes {most}{flops:.2f} times its FLOPs "
        "per token. It gains nothing from this until its experts are trained.",
        *_shared_limits(name),
    ]
    if report.plan.kept_dense:
        lines.insert(1, f"{_networks(len(report.plan.kept_dense))} left dense.")
    return "\n".join(f"* {line}" for line in lines)


def _shared_limits(name: str) -> list[str]:
    return [
        f"It has the errors of {name}, and the biases of its training data.",
        "Quality was not evaluated beyond the measurements in this card.",
        "It needs `trust_remote_code=True`. Engines that run architectures of their own alone, such as "
        "llama.cpp, cannot load it; see `mpoe-convert export`.",
    ]


def _rounding(report: Report) -> str:
    return (
        f"{report.rounding_in_words()} The format is that of compressed-tensors: loading needs `pip install "
        "compressed-tensors`. Nothing else is rounded. Rounded cores cannot be fine-tuned."
    )


def _compression(report: Report) -> str:
    """What the FFNs store, and the divergence from the dense model."""
    if isinstance(report.plan, MixturePlan):
        recipe = report.plan.recipe
        text = "the calibration batches"
        if recipe.calibrate:
            text = f"calibration text, up to {recipe.calibration_tokens:,} tokens"
        use = "Fitted to what each expert gets of" if recipe.keep is not None else "Experts were scored on"
        return f"{use} {text}. {report.divergence_in_words()}"
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
