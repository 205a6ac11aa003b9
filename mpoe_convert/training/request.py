"""Requests for training and scoring: frozen values that say everything such a run depends on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .. import experts
from ..devices import DEVICES, is_device
from ..errors import RunError
from ..options import LARGEST_COUNT, OptionalText, Text, Texts, called, described, in_home, option
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

    model: Text = option(
        help="Artifact, or any model folder or Hub id (the dense model, for comparison).",
        kw_only=False,
        flag="MODEL",
        read=in_home,
    )
    data: Texts = option(
        help=f"Data to train on: {SOURCES}",
        group="Data",
        metavar="FILE|ID",
        item="source",
        read=in_home,
        kw_only=False,
    )
    eval_data: Texts = option(
        default=(),
        help="Held-out data of the same form. The checkpoint with the lowest loss on them is kept. "
        "Repeatable.",
        group="Data",
        metavar="FILE|ID",
        item="source",
        read=in_home,
        kw_only=False,
    )
    split: str = option(default="train", help="Split of Hub datasets to train on.", group="Data")
    eval_split: str = option(default="validation", help="Split of Hub datasets to evaluate on.", group="Data")
    length: int | None = option(
        default=None,
        help="Tokens per example.",
        group="Data",
        at_least=1,
        at_most=LARGEST_COUNT,
        default_text="the model's limit, at most 512",
    )
    steps: int | None = option(
        default=None,
        help="Optimizer steps.",
        group="Training",
        at_least=1,
        at_most=LARGEST_COUNT,
        default_text="as many as --epochs take",
    )
    epochs: float = option(default=1.0, help="Passes over the data.", group="Training", above=0, at_most=1e6)
    batch_size: int = option(
        default=8,
        help="Examples per device and forward pass.",
        group="Training",
        at_least=1,
        at_most=LARGEST_COUNT,
    )
    accumulate: int = option(
        default=1,
        help="Forward passes per optimizer step.",
        group="Training",
        at_least=1,
        at_most=LARGEST_COUNT,
    )
    learning_rate: float = option(
        default=5e-4, help="Peak learning rate.", group="Training", above=0, at_most=math.inf
    )
    central_lr: float = option(
        default=1.0,
        help="Factor on the learning rate of central tensors.",
        group="Training",
        at_least=0,
        at_most=1000,
    )
    auxiliary_lr: float | None = option(
        default=None,
        help="Factor on the learning rate of what each expert owns.",
        group="Training",
        at_least=0,
        default_text=experts.by_kind("AUXILIARY_LR"),
        at_most=1000,
    )
    router_lr: float = option(
        default=1.0,
        help="Factor on the learning rate of routers.",
        group="Training",
        at_least=0,
        at_most=1000,
    )
    weight_decay: float = option(
        default=0.01,
        help="Weight decay of all matrices except routers.",
        group="Training",
        at_least=0,
        at_most=100,
    )
    schedule: str = option(
        default="cosine",
        help="Learning rate over the steps: a scheduler type of transformers.",
        group="Training",
    )
    warmup: float = option(
        default=0.05,
        help="Steps until the learning rate is at its peak; below 1, as a share of all steps.",
        group="Training",
        at_least=0,
        at_most=LARGEST_COUNT,
    )
    max_grad_norm: float = option(
        default=1.0,
        help="The norm of all gradients together is clipped to this (0: not at all); it is taken before "
        "--skip-centre drops any.",
        group="Training",
        at_least=0,
        at_most=math.inf,
    )
    skip_centre: float = option(
        default=0.0,
        help="Gradient mask of MPOE: probability that central tensors are not updated in a step.",
        group="Training",
        at_least=0,
        at_most=1,
    )
    skip_unit: str = option(
        default="step",
        help="What the mask is drawn for: all central tensors at once (step), those of a layer, or each "
        "matrix.",
        group="Training",
        choices=UNITS,
    )
    freeze: Texts = option(
        default=(),
        help="What is not trained: the central tensors (centre), or everything outside the experts. "
        "Repeatable.",
        group="Training",
        choices=FROZEN,
    )
    precision: str = option(
        default="float32",
        help="Precision of the forward and backward pass; weights and optimizer stay float32.",
        group="Training",
        choices=PRECISIONS,
    )
    seed: int = option(
        default=0,
        help="Random seed.",
        group="Training",
        at_least=0,
        below=2**32,
        expected="a whole number from 0 to 2**32 - 1",
    )
    options: Mapping[str, Any] = option(
        default=dict,
        help="Set an option of the model's config, such as router_aux_loss_coef=0.02. Repeatable.",
        group="Training",
        flag="--option",
    )
    arguments: Mapping[str, Any] = option(
        default=dict,
        help="Set a field of transformers.TrainingArguments that has no option here. Repeatable.",
        group="Training",
        flag="--set",
    )
    teacher: OptionalText = option(
        default=None,
        help="Dense model to distil from, which heals what compression lost.",
        group="Distillation",
        metavar="MODEL",
        read=in_home,
    )
    teacher_weight: float = option(
        default=0.5,
        help="Weight of the teacher's part of the loss, its Kullback-Leibler divergence. Below 1: the rest "
        "is the model's own loss, with what its routers learn from.",
        group="Distillation",
        at_least=0,
        below=1,
    )
    temperature: float = option(
        default=2.0,
        help="Softmax temperature of teacher and student.",
        group="Distillation",
        above=0,
        at_most=1000,
    )
    hidden_weight: float = option(
        default=0.0,
        help="Weight of another part: the mean squared difference of all hidden states from the teacher's, "
        "relative to the mean square of those.",
        group="Distillation",
        at_least=0,
        at_most=1e6,
    )
    eval_every: int | None = option(
        default=None,
        help="Steps between evaluations of --eval-data, with a checkpoint each.",
        group="Progress",
        at_least=1,
        at_most=LARGEST_COUNT,
        default_text="as --save-every",
    )
    save_every: int = option(
        default=500,
        help="Steps between checkpoints; with --eval-data those of --eval-every, if it is given.",
        group="Progress",
        at_least=1,
        at_most=LARGEST_COUNT,
    )
    log_every: int = option(
        default=10,
        help="Steps between lines of the log.",
        group="Progress",
        at_least=1,
        at_most=LARGEST_COUNT,
    )
    report_to: Texts = option(
        default=(),
        help="Experiment tracker, such as tensorboard or wandb. Repeatable.",
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

    model: Text = option(help="Artifact, model folder or Hub id.", kw_only=False, flag="MODEL", read=in_home)
    data: Texts = option(
        help=f"Data to score on: {SOURCES}",
        group="Data",
        metavar="FILE|ID",
        item="source",
        read=in_home,
        kw_only=False,
    )
    against: OptionalText = option(
        default=None,
        help="Another model to score on the same examples, such as the dense one.",
        group="Data",
        metavar="MODEL",
        read=in_home,
    )
    split: str = option(default="test", help="Split of Hub datasets.", group="Data")
    length: int | None = option(
        default=None,
        help="Tokens per window or example.",
        group="Scoring",
        at_least=1,
        at_most=LARGEST_COUNT,
        default_text="the model's limit, at most 512",
    )
    stride: int | None = option(
        default=None,
        help="Tokens from the start of a window to that of the next, for perplexity.",
        group="Scoring",
        at_least=1,
        at_most=LARGEST_COUNT,
        default_text="half of --length",
    )
    batch_size: int = option(
        default=8,
        help="Windows or examples per forward pass.",
        group="Scoring",
        at_least=1,
        at_most=LARGEST_COUNT,
    )
    limit: int | None = option(
        default=None,
        help="Score the first so many windows or examples only; with --routed-by, so many of every task.",
        group="Scoring",
        at_least=1,
        at_most=LARGEST_COUNT,
        default_text="all",
    )
    device: str = option(
        default="auto",
        help=f"Where the model runs: {DEVICES}.",
        group="Scoring",
        valid=is_device,
        expected=DEVICES,
    )
    seed: int = option(
        default=0,
        help="Seed of the bootstrap and of which tokens are masked.",
        group="Scoring",
        at_least=0,
        below=2**63,
        expected="a whole number from 0 to 2**63 - 1",
    )
    record: bool = option(
        default=False,
        help="Write the results into MODEL, an artifact's folder: into evaluation_report.json, its card and "
        "the card's metadata.",
        group="General",
    )

    def check_together(self) -> None:
        if self.length and self.stride:
            check_stride(self.length, self.stride)


def check_stride(length: int, stride: int) -> None:
    """Raises RunError for windows of `length` tokens between which `stride` leaves tokens out."""
    if stride > length:
        raise RunError(
            f"{called('stride')} is {stride} with {called('length')} {length}; expected at most the length"
        )
