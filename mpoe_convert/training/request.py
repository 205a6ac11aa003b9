"""Requests for training and scoring: frozen values that say everything such a run depends on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import experts
from ..devices import DEVICES, is_device
from ..errors import RunError
from ..options import described, option
from ..request import Request
from ..source.text_options import TaskData
from .roles import FROZEN, UNITS

PRECISIONS = ("float32", "bfloat16", "float16")
SOURCES = (
    "text (.txt), rows (.jsonl, .csv, .tsv, .parquet), or a Hub dataset as owner/name[:subset]. Repeatable."
)


@described
class Finetuning(TaskData, Request):
    """What a fine-tuning run depends on.

    Raises:
        RunError: a value is out of range.
    """

    ERROR = RunError
    NOUN = "fine-tuning request"

    model: str = option(
        help="Artifact, or any model folder or Hub id (the dense model, for comparison).", kw_only=False
    )
    data: tuple[str, ...] = option(
        help=f"Data to train on: {SOURCES}",
        group="Data",
        metavar="FILE|ID",
        item="source",
        kw_only=False,
    )
    eval_data: tuple[str, ...] = option(
        (),
        "Held-out data of the same form. The checkpoint with the lowest loss on them is kept. Repeatable.",
        group="Data",
        metavar="FILE|ID",
        item="source",
        kw_only=False,
    )
    split: str = option("train", "Split of Hub datasets to train on.", group="Data")
    eval_split: str = option("validation", "Split of Hub datasets to evaluate on.", group="Data")
    length: int | None = option(
        None,
        "Tokens per example.",
        group="Data",
        at_least=1,
        default_text="the model's limit, at most 512",
    )
    steps: int | None = option(
        None,
        "Optimizer steps.",
        group="Training",
        at_least=1,
        default_text="as many as --epochs take",
    )
    epochs: float = option(1.0, "Passes over the data.", group="Training", above=0)
    batch_size: int = option(8, "Examples per device and forward pass.", group="Training", at_least=1)
    accumulate: int = option(1, "Forward passes per optimizer step.", group="Training", at_least=1)
    learning_rate: float = option(5e-4, "Peak learning rate.", group="Training", above=0)
    central_lr: float = option(
        1.0, "Factor on the learning rate of central tensors.", group="Training", at_least=0
    )
    auxiliary_lr: float | None = option(
        None,
        "Factor on the learning rate of what each expert owns.",
        group="Training",
        at_least=0,
        default_text=experts.by_kind("AUXILIARY_LR"),
    )
    router_lr: float = option(1.0, "Factor on the learning rate of routers.", group="Training", at_least=0)
    weight_decay: float = option(
        0.01, "Weight decay of all matrices except routers.", group="Training", at_least=0
    )
    schedule: str = option(
        "cosine", "Learning rate over the steps: a scheduler type of transformers.", group="Training"
    )
    warmup: float = option(
        0.05,
        "Steps until the learning rate is at its peak; below 1, as a share of all steps.",
        group="Training",
        at_least=0,
    )
    max_grad_norm: float = option(
        1.0,
        "The norm of all gradients together is clipped to this; it is taken before --skip-centre drops any.",
        group="Training",
        at_least=0,
    )
    skip_centre: float = option(
        0.0,
        "Gradient mask of MPOE: probability that central tensors are not updated in a step.",
        group="Training",
        at_least=0,
        at_most=1,
    )
    skip_unit: str = option(
        "step",
        "What the mask is drawn for: all central tensors at once (step), those of a layer, or each matrix.",
        group="Training",
        choices=UNITS,
    )
    freeze: tuple[str, ...] = option(
        (),
        "What is not trained: the central tensors (centre), or everything outside the experts. Repeatable.",
        group="Training",
        choices=FROZEN,
    )
    precision: str = option(
        "float32",
        "Precision of the forward and backward pass; weights and optimizer stay float32.",
        group="Training",
        choices=PRECISIONS,
    )
    seed: int = option(
        0,
        "Random seed.",
        group="Training",
        at_least=0,
        below=2**32,
        expected="a whole number from 0 to 2**32 - 1",
    )
    options: Mapping[str, Any] = option(
        dict,
        "Set an option of the model's config, such as router_aux_loss_coef=0.02. Repeatable.",
        group="Training",
        flag="--option",
    )
    arguments: Mapping[str, Any] = option(
        dict,
        "Set a field of transformers.TrainingArguments that has no option here. Repeatable.",
        group="Training",
        flag="--set",
    )
    teacher: str | None = option(
        None,
        "Dense model to distil from, which heals what compression lost.",
        group="Distillation",
        metavar="MODEL",
    )
    teacher_weight: float = option(
        0.5,
        "Weight of the teacher's part of the loss, its Kullback-Leibler divergence. Below 1: the rest is the "
        "model's own loss, with what its routers learn from.",
        group="Distillation",
        at_least=0,
        below=1,
    )
    temperature: float = option(
        2.0, "Softmax temperature of teacher and student.", group="Distillation", above=0
    )
    hidden_weight: float = option(
        0.0,
        "Weight of another part: the mean squared difference of all hidden states from the teacher's, "
        "relative to the mean square of those.",
        group="Distillation",
        at_least=0,
    )
    eval_every: int | None = option(
        None,
        "Steps between evaluations.",
        group="Progress",
        at_least=1,
        default_text="as --save-every",
    )
    save_every: int = option(500, "Steps between checkpoints.", group="Progress", at_least=1)
    log_every: int = option(10, "Steps between lines of the log.", group="Progress", at_least=1)
    report_to: tuple[str, ...] = option(
        (),
        "Experiment tracker, such as tensorboard or wandb. Repeatable.",
        group="Progress",
        metavar="NAME",
        item="tracker",
    )


@described
class Scoring(TaskData, Request):
    """What an evaluation depends on.

    Raises:
        RunError: a value is out of range.
    """

    ERROR = RunError
    NOUN = "evaluation"

    model: str = option(help="Artifact, model folder or Hub id.", kw_only=False)
    data: tuple[str, ...] = option(
        help=f"Data to score on: {SOURCES}",
        group="Data",
        metavar="FILE|ID",
        item="source",
        kw_only=False,
    )
    against: str | None = option(
        None,
        "Another model to score on the same examples, such as the dense one.",
        group="Data",
        metavar="MODEL",
    )
    split: str = option("test", "Split of Hub datasets.", group="Data")
    length: int | None = option(
        None,
        "Tokens per window or example.",
        group="Scoring",
        at_least=1,
        default_text="the model's limit, at most 512",
    )
    stride: int | None = option(
        None,
        "Tokens from the start of a window to that of the next, for perplexity.",
        group="Scoring",
        at_least=1,
        default_text="half of --length",
    )
    batch_size: int = option(8, "Windows or examples per forward pass.", group="Scoring", at_least=1)
    limit: int | None = option(
        None,
        "Score the first so many windows or examples only; with --routed-by, so many of every task.",
        group="Scoring",
        at_least=1,
        default_text="all",
    )
    device: str = option(
        "auto",
        f"Where the model runs: {DEVICES}.",
        group="Scoring",
        valid=is_device,
        expected=DEVICES,
    )
    seed: int = option(
        0,
        "Seed of the bootstrap and of which tokens are masked.",
        group="Scoring",
        at_least=0,
    )
    record: bool = option(
        False,
        "Write the results into MODEL, an artifact's folder: into evaluation_report.json, its card and the "
        "card's metadata.",
        group="General",
    )
