"""The user's choices for a fine-tuning run: one frozen value that says everything it depends on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ..errors import RunError
from ..source.texts import TASKS, Columns
from .roles import FROZEN, UNITS

PRECISIONS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Finetuning:
    """What a fine-tuning run depends on.

    Attributes:
        model: artifact, or any model folder or Hub id (the dense model, for comparison).
        data / eval_data: files or Hub datasets, see `texts.read`; losses on `eval_data` choose the best
            checkpoint, if there are any.
        split / eval_split: of Hub datasets.
        text_column, target_column, label_column: where rows hold text, target text (seq2seq) and class.
        routed_by: column that names a row's task: routers choose by task, not by token.
        task: causal, masked, seq2seq or classification; by default what the model's head is for.
        tokenizer: folder or Hub id; by default the model's own.
        length: tokens per example; by default what the model can take, at most 512.
        steps: optimizer's steps; by default `epochs` over the data.
        batch_size, accumulate: examples per device and pass, passes per step.
        learning_rate: peak, of everything that has no factor of its own: `central_lr`, `auxiliary_lr` and
            `router_lr` are factors on it, by default 1, and 3 for what low-rank experts and adapters own.
        schedule, warmup: transformers' scheduler type, and its share of the steps (below 1) or their number.
        max_grad_norm: clips the norm over all gradients, those included that the mask drops later.
        skip_centre: probability that the central cores sit a step out (MPOE's gradient mask); 0: never.
        skip_unit: what is drawn for, step, layer or matrix.
        freeze: "centre" and/or "all-but-experts".
        teacher: dense model to distil from; `teacher_weight` (below 1) of its Kullback-Leibler divergence at
            `temperature`, the rest of the model's own loss, routers' included; `hidden_weight` of the mean
            squared difference of all hidden states, relative to the teacher's mean square.
        precision: of the computation; weights and optimizer are float32.
        eval_every, save_every, log_every: in steps.
        report_to: trackers, as "tensorboard" or "wandb".
        options: of the model's config, as {"router_aux_loss_coef": 0.02}.
        arguments: any other field of transformers.TrainingArguments.
        trust_remote_code: run code that model, tokenizer or teacher bring along, other than this release's
            `modeling_mpoe.py`.

    Raises:
        RunError: a value is out of range.
    """

    model: str
    data: tuple[str, ...]
    eval_data: tuple[str, ...] = ()
    split: str = "train"
    eval_split: str = "validation"
    text_column: str = "text"
    target_column: str = "target"
    label_column: str = "label"
    routed_by: str | None = None
    task: str | None = None
    tokenizer: str | None = None
    length: int | None = None
    steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 8
    accumulate: int = 1
    learning_rate: float = 5e-4
    central_lr: float = 1.0
    auxiliary_lr: float | None = None
    router_lr: float = 1.0
    weight_decay: float = 0.01
    schedule: str = "cosine"
    warmup: float = 0.05
    max_grad_norm: float = 1.0
    skip_centre: float = 0.0
    skip_unit: str = "step"
    freeze: tuple[str, ...] = ()
    teacher: str | None = None
    teacher_weight: float = 0.5
    temperature: float = 2.0
    hidden_weight: float = 0.0
    precision: str = "float32"
    seed: int = 0
    eval_every: int | None = None
    save_every: int = 500
    log_every: int = 10
    report_to: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    trust_remote_code: bool = False

    def __post_init__(self):
        for name in ("data", "eval_data", "freeze", "report_to"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value or ()))
        choices = {"task": (None, *TASKS), "skip_unit": UNITS, "precision": PRECISIONS}
        for name, allowed in choices.items():
            _check(getattr(self, name) in allowed, f"{name} is {getattr(self, name)!r}", allowed)
        _check(set(self.freeze) <= set(FROZEN), f"freeze is {list(self.freeze)}", FROZEN)
        if not isinstance(self.trust_remote_code, bool):
            raise RunError(f"trust_remote_code is {self.trust_remote_code!r}; expected true or false")
        for name in ("steps", "length", "batch_size", "accumulate", "eval_every", "save_every", "log_every"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise RunError(f"{name} is {value!r}; expected a whole number of at least 1")
        for name in ("skip_centre", "teacher_weight"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise RunError(f"{name} is {value!r}; expected 0 to 1")
        if self.teacher_weight == 1:
            raise RunError("teacher_weight is 1, which leaves no loss to the routers; expected less")
        for name in ("temperature", "learning_rate", "epochs"):
            if not getattr(self, name) > 0:
                raise RunError(f"{name} is {getattr(self, name)!r}; expected a number above 0")

    @classmethod
    def from_mapping(cls, values: Mapping) -> Finetuning:
        """From the contents of a recipe file; unknown names are errors."""
        known = {each.name for each in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise RunError(f"unknown fine-tuning keys {unknown}; known are {sorted(known)}")
        for name in ("model", "data"):
            if not values.get(name):
                raise RunError(f"no {name} is given")
        return cls(**{key: value for key, value in values.items() if value is not None})

    @property
    def trust(self) -> dict[str, bool]:
        """For `loading`."""
        return {"trust_remote_code": self.trust_remote_code}

    @property
    def columns(self) -> Columns:
        return Columns(self.text_column, self.target_column, self.label_column, self.routed_by)


def _check(holds: bool, found: str, allowed) -> None:
    if not holds:
        raise RunError(f"{found}; expected one of {', '.join(str(a) for a in allowed if a)}")
