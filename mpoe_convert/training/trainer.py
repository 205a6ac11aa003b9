"""transformers' Trainer for shared cores: gradient mask, rates by role, distillation, router logs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import reduce
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.nn import functional as F

from .. import experts
from ..artifact.loading import HoldsMixtures
from ..errors import TrainingError
from ..extras import need
from .request import Finetuning
from .roles import mask_centre, param_groups
from .router_stats import router_stats

try:
    from transformers import Trainer, TrainerCallback
except ImportError:
    need("fine-tuning", "accelerate", "datasets", extra="train")
    raise

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments


# Called as progress(step, steps, logged values).
OnLog = Callable[[int, int, Mapping[str, float]], None]


class CentreMask(TrainerCallback):
    """MPOE's gradient mask for transformers' Trainer; see `mask_centre`."""

    def __init__(self, probability: float, *, seed: int = 0, per: str = "step"):
        self.probability, self.seed, self.per = probability, seed, per

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        mask_centre(kwargs["model"], state.global_step, self.probability, seed=self.seed, per=self.per)


class RouterLog(TrainerCallback):
    """Watches the routers in the steps that are logged.

    Attributes:
        latest: values for the log: `load_entropy/PATH` (1: all experts are chosen equally often) and
            `load_max/PATH`.
        loads: {path of a mixture: fraction of the choices that each expert got}.
    """

    def __init__(self):
        self.latest: dict[str, float] = {}
        self.loads: dict[str, list[float]] = {}
        self._watching = ExitStack()
        self._stats: dict = {}

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if (state.global_step + 1) % args.logging_steps == 0:
            self._stats = self._watching.enter_context(router_stats(kwargs["model"]))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._stats:
            return
        self._watching.close()
        self.latest, self.loads = {}, {}
        for path, stats in self._stats.items():
            load = stats.load
            self.loads[path] = [round(fraction, 4) for fraction in load.tolist()]
            entropy = torch.special.entr(load).sum() / math.log(len(load))
            self.latest[f"load_entropy/{path}"] = round(float(entropy), 4)
            self.latest[f"load_max/{path}"] = round(float(load.max()), 4)
        self._stats = {}


class FollowStep(TrainerCallback):
    """Moves the routers' balancing biases before a checkpoint is written, not after it."""

    def __init__(self, model: nn.Module):
        self.model = model

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        cast(HoldsMixtures, self.model).update_router_bias()


class StopAtNonFinite(TrainerCallback):
    """Ends a run before the first optimizer step whose gradient is not finite."""

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.fp16:
            return  # the loss's scale is still sought: such steps are left out
        gradients = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        if gradients:
            device = gradients[0].device
            norms = torch.stack([gradient.norm().to(device) for gradient in gradients])
            check_finite_step("gradient norm", norms.norm(), state.global_step + 1)


def check_finite_step(what: str, value: torch.Tensor, step: int) -> None:
    """Raises TrainingError if a scalar of a step is NaN or infinite."""
    if not torch.isfinite(value).all():
        raise TrainingError(
            f"the {what} is {float(value)} at step {step}, so training has failed; lower the learning rate, "
            "or look at the data of that step"
        )


class TellLogs(TrainerCallback):
    """Passes all logs of the main process on to a callback."""

    def __init__(self, progress: OnLog | None):
        self.progress = progress

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.progress is not None and logs is not None and state.is_world_process_zero:
            self.progress(state.global_step, state.max_steps, logs)


class MpoeTrainer(Trainer):
    """Trainer with learning rates by role, distillation, and routers in the log."""

    def __init__(self, *args: Any, run: Finetuning, teacher: nn.Module | None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.run, self.teacher = run, teacher
        self.router_log = next((c for c in kwargs["callbacks"] if isinstance(c, RouterLog)), None)
        if teacher is not None:
            teacher.to(self.args.device).eval().requires_grad_(False)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer with learning rates by role."""
        if self.optimizer is None:
            model = cast("PreTrainedModel", self.model if model is None else model)
            cls, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            decays = set(self.get_decay_parameter_names(model))
            auxiliary = self.run.auxiliary_lr
            if auxiliary is None:
                block = getattr(cast("PreTrainedModel", self.model).config, "mpoe", None)
                auxiliary = experts.load(block["kind"]).AUXILIARY_LR if block else 1.0
            groups = param_groups(
                model,
                self.args.learning_rate,
                central=self.run.central_lr,
                auxiliary=auxiliary,
                router=self.run.router_lr,
                weight_decay=self.args.weight_decay,
                no_decay={name for name, _ in model.named_parameters()} - decays,
            )
            self.optimizer = cls(groups, **options)
        return self.optimizer

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # transformers would take one step more
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """A step's loss. Raises TrainingError if it is not finite: transformers hides that in its log."""
        loss = super().training_step(*args, **kwargs)
        check_finite_step("loss", loss, self.state.global_step + 1)
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The loss, or (loss, outputs); in training with the distillation, if there is a teacher."""
        if self.teacher is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        hidden = {"output_hidden_states": True} if self.run.hidden_weight else {}
        loss, outputs = super().compute_loss(model, inputs | hidden, True, num_items_in_batch)
        with torch.no_grad():
            taught = self.teacher(**{k: v for k, v in inputs.items() if k != "task_ids"}, **hidden)
        extra = self.distillation(outputs, taught, inputs["labels"])
        if num_items_in_batch is not None and self.model_accepts_loss_kwargs:  # its part of the step's mean
            labels = inputs["labels"][..., int(self._loss_shifts_labels) :]
            extra = extra * (labels != -100).sum() / num_items_in_batch * self.accelerator.num_processes
        loss = (1 - self.run.teacher_weight) * loss + extra
        return (loss, outputs) if return_outputs else loss

    def distillation(self, outputs: Any, taught: Any, labels: torch.Tensor) -> torch.Tensor:
        """KL(teacher || student) per counted token at the temperature, times its square (Hinton 2015).

        Args:
            outputs / taught: of the student and of the teacher, with logits (B, T, V) or (B, classes).
            labels: (B, T), -100 where a token does not count, or (B,).

        Raises:
            TrainingError: the logits have different shapes.
        """
        student, teacher = outputs.logits, taught.logits
        if student.shape != teacher.shape:
            raise TrainingError(
                f"the teacher's logits are {tuple(teacher.shape)}, the model's {tuple(student.shape)}; "
                "expected the dense model that was converted, with the same head"
            )
        if labels.dim() == 2:  # per token, where a label counts
            if self._loss_shifts_labels:
                student, teacher, labels = student[:, :-1], teacher[:, :-1], labels[:, 1:]
            student, teacher = student[labels != -100], teacher[labels != -100]
        temperature = self.run.temperature
        divergence = F.kl_div(
            (student.float() / temperature).log_softmax(-1),
            (teacher.float() / temperature).log_softmax(-1),
            reduction="batchmean",
            log_target=True,
        )
        loss = self.run.teacher_weight * temperature**2 * divergence
        if self.run.hidden_weight:
            loss = loss + self.run.hidden_weight * _hidden_difference(outputs, taught)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "eval_loss" in logs:  # not of the training loss, which includes the routers' losses
            logs["eval_perplexity"] = math.exp(min(logs["eval_loss"], 80.0))
        if self.router_log is not None and "loss" in logs:
            logs |= self.router_log.latest
        super().log(logs, start_time)
        if self.router_log is not None and "loss" in logs and self.router_log.loads:  # no tracker takes lists
            entry: dict[str, Any] = self.state.log_history[-1]
            entry["expert_load"] = self.router_log.loads


def _hidden_difference(outputs: Any, taught: Any) -> torch.Tensor:
    """Mean over the hidden states of their squared difference, relative to the teacher's mean square."""
    names = ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")
    pairs = [
        pair
        for name in names
        if getattr(taught, name, None)
        for pair in zip(getattr(outputs, name), getattr(taught, name), strict=True)
    ]
    differences = [F.mse_loss(s.float(), t.float()) / t.float().square().mean() for s, t in pairs]
    return reduce(torch.add, differences) / len(differences)
