"""transformers' Trainer for shared cores: gradient mask, rates by role, distillation, router logs."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.nn import functional as F

from .. import experts
from ..artifact.loading import HoldsMixtures
from ..errors import MpoeError, OutputError, TrainingError, few, one_line
from ..options import switched
from ..runtime.modeling_mpoe import counts_items
from ..tensors import broken_weights
from .checkpoints import PARTIAL, REFUSALS, Record, find_checkpoint, what_is_left, write_record
from .library import Trainer, TrainerCallback, rotate_checkpoints
from .request import Finetuning
from .roles import check_mask, mask_centre, param_groups
from .router_stats import router_stats

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.data import DataLoader
    from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments


# Called as progress(step, steps, logged values).
OnLog = Callable[[int, int, Mapping[str, float]], None]
# Called as watch(what is done, how many steps or batches are done, of how many); 0 of 0: a note.
Watch = Callable[[str, int, int], None]


class CentreMask(TrainerCallback):
    """MPOE's gradient mask for transformers' Trainer; see `mask_centre`.

    Raises:
        TrainingError: a value is out of range.
    """

    def __init__(self, probability: float, *, seed: int = 0, per: str = "step"):
        check_mask(probability, per)
        self.probability, self.seed, self.per = probability, seed, per

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        mask_centre(kwargs["model"], state.global_step, self.probability, seed=self.seed, per=self.per)


class RouterLog(TrainerCallback):
    """Watches the routers in the steps that are logged.

    Attributes:
        varies: the number of experts per token does.
        latest: values for the log: `load_entropy/PATH` (1: all experts are chosen equally often) and
            `load_max/PATH`; `experts_per_token/PATH` where it varies.
        loads: {path of a mixture: fraction of the choices that each expert got}.
    """

    def __init__(self, varies: bool = False):
        self.varies = varies
        self.latest: dict[str, float] = {}
        self.loads: dict[str, list[float]] = {}
        self._watching = ExitStack()
        self._stats: dict = {}

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.latest, self.loads = {}, {}  # of this step, or none
        if (state.global_step + 1) % args.logging_steps == 0:
            self._stats = self._watching.enter_context(router_stats(kwargs["model"]))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._stats:
            return
        self._watching.close()
        for path, stats in self._stats.items():
            load = stats.load
            self.loads[path] = [round(fraction, 4) for fraction in load.tolist()]
            entropy = torch.special.entr(load).sum() / math.log(len(load))
            self.latest[f"load_entropy/{path}"] = round(float(entropy), 4)
            self.latest[f"load_max/{path}"] = round(float(load.max()), 4)
            if self.varies:
                self.latest[f"experts_per_token/{path}"] = round(stats.experts_per_token, 4)
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


class ShowSteps(TrainerCallback):
    """Tells after every step, and every batch of an evaluation, how far a run is."""

    def __init__(self, watch: Watch):
        self.watch, self.batches = watch, 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.watch("training", state.global_step, state.max_steps)

    on_step_end = on_train_begin

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.batches += 1
        if state.is_world_process_zero:
            self.watch("evaluating", self.batches, len(kwargs["eval_dataloader"]))

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.batches = 0


class FindBest(TrainerCallback):
    """Finds the best checkpoint where it is: a checkpoint names it as it was called when it was written."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        best = Path(args.output_dir or ".", f"checkpoint-{state.best_global_step}")
        if best.is_dir():
            state.best_model_checkpoint = str(best)


@contextmanager
def refusals_told(what: str) -> Iterator[None]:
    """Tell in one line whatever a library raises inside the block; elsewhere, what a full disk answers.

    Raises:
        TrainingError: it raised something.
    """
    try:
        yield
    except MpoeError:
        raise
    except Exception as error:  # every library that takes part may raise anything
        if isinstance(error, OSError) and error.errno in REFUSALS:
            raise
        raise TrainingError(f"{what}: {one_line(error)}") from error


def check_weights(model: nn.Module, step: int) -> None:
    """Raises TrainingError if an optimizer step left NaN or infinities, which no loss has shown yet."""
    if broken := broken_weights(model):
        raise TrainingError(f"NaN or infinities in {few(broken)} after step {step}; lower the learning rate")


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

    def __init__(self, *args: Any, run: Finetuning, teacher: nn.Module | None, record: Record, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.run, self.teacher, self.record = run, teacher, record
        cls = type(cast("nn.Module", self.model))
        if not counts_items(getattr(cls, "_base_class", cls)):  # of dense models transformers believes it
            self.model_accepts_loss_kwargs = False
        self._adds_router_losses = self.label_smoother is not None and self._joins_router_losses()
        self._is_saving = False
        self.router_log = next((c for c in kwargs["callbacks"] if isinstance(c, RouterLog)), None)
        if teacher is not None:
            teacher.to(self.args.device).eval().requires_grad_(False)

    def _joins_router_losses(self) -> bool:
        """Whether the model has routers whose losses are to be added to one that Trainer makes.

        Raises:
            TrainingError: that cannot be done.
        """
        model = cast("nn.Module", self.model)
        if not (hasattr(model, "mixtures") and cast(HoldsMixtures, model).mixtures()):
            return False
        if not hasattr(model, "add_router_losses"):
            raise TrainingError(
                "label_smoothing_factor is set, and the model's code, which is of an earlier version, would "
                "weigh the routers' losses wrongly; convert the model again, or leave it out"
            )
        if self.args.torch_compile:
            raise TrainingError(
                "label_smoothing_factor and torch_compile are set, and in compiled code the routers' losses "
                "are part of the model's own loss only; leave one of them out"
            )
        return True

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer with learning rates by role."""
        if self.optimizer is None:
            model = cast("PreTrainedModel", self.model if model is None else model)
            with refusals_told("the optimizer cannot be made"):
                cls, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            decays = set(self.get_decay_parameter_names(model))
            auxiliary = self.run.auxiliary_lr
            if auxiliary is None:
                block = getattr(cast("PreTrainedModel", self.model).config, "mpoe", None)
                kind = block["kind"] if block else None  # experts of a mixture are of no kind
                auxiliary = experts.load(kind).AUXILIARY_LR if kind in experts.KINDS else 1.0
            groups = param_groups(
                model,
                self.args.learning_rate,
                central=self.run.central_lr,
                auxiliary=auxiliary,
                router=self.run.router_lr,
                weight_decay=self.args.weight_decay,
                no_decay={name for name, _ in model.named_parameters()} - decays,
            )
            with refusals_told("the optimizer cannot be made"):
                self.optimizer = cls(groups, **options)
        return self.optimizer

    def get_train_dataloader(self) -> DataLoader:
        """The batches to train on. Raises TrainingError: an argument of theirs is refused."""
        with refusals_told("the training data cannot be batched"):
            return super().get_train_dataloader()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # transformers would take one step more
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """A step's loss. Raises TrainingError if it is not finite: transformers hides that in its log."""
        loss = super().training_step(*args, **kwargs)
        worst = loss
        if self.args.world_size > 1 and torch.distributed.is_initialized():  # all processes end together
            worst = torch.where(loss.isfinite(), 0.0, torch.inf)
            torch.distributed.all_reduce(worst, torch.distributed.ReduceOp.MAX)
        check_finite_step("loss", worst if loss.isfinite().all() else loss, self.state.global_step + 1)
        return loss

    def _get_output_dir(self, *args: Any, **kwargs: Any) -> str:
        folder = super()._get_output_dir(*args, **kwargs)
        return os.path.join(folder, PARTIAL) if self._is_saving else folder

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Write a checkpoint under another name; it gets its own when it is whole. Every process calls this.

        Raises:
            OutputError: it cannot be written. The ones from before are left.
            TrainingError: the step destroyed the weights.
        """
        check_weights(cast("nn.Module", self.model), self.state.global_step)
        output = Path(str(self.args.output_dir))
        wait, writes = self.accelerator.wait_for_everyone, self.args.should_save
        if writes:
            shutil.rmtree(output / PARTIAL, ignore_errors=True)
        wait()
        self._is_saving = True
        try:
            super()._save_checkpoint(*args, **kwargs)
            wait()
            self._publish(output, f"checkpoint-{self.state.global_step}", writes)
            wait()
        except Exception as error:  # every library that writes may raise anything
            if writes:
                shutil.rmtree(output / PARTIAL, ignore_errors=True)
            raise OutputError(
                f"the checkpoint of step {self.state.global_step} cannot be written to '{output}' "
                f"({one_line(error)}); {what_is_left(output)}; free some space or repair this, then run again"
                f"{' with ' + switched('resume') if find_checkpoint(output) else ''}"
            ) from error
        finally:
            self._is_saving = False
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(output / f"checkpoint-{self.state.global_step}"))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._is_saving:  # not before it has its name
            super()._push_from_checkpoint(checkpoint_folder)

    def _publish(self, output: Path, name: str, writes: bool) -> None:
        """Complete a checkpoint that was written, move it into place, and remove old ones."""
        made, state = output / PARTIAL / name, self.state
        if state.best_global_step == state.global_step:  # the name that it had while it was written
            state.best_model_checkpoint = str(output / name)
        if not writes:
            return
        state.save_to_json(str(made / "trainer_state.json"))
        write_record(made, self.record)
        shutil.rmtree(output / name, ignore_errors=True)  # saved twice: after the step and after the epoch
        os.replace(made, output / name)
        made.parent.rmdir()
        rotate_checkpoints(str(output), self.args.save_total_limit, state.best_model_checkpoint)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The loss, or (loss, outputs); in training with the distillation, if there is a teacher."""
        if not model.training or (self.teacher is None and not self._adds_router_losses):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        hidden = {"output_hidden_states": True} if self.teacher and self.run.hidden_weight else {}
        joined = {"output_router_logits": False} if self._adds_router_losses else {}  # all of them
        loss, outputs = super().compute_loss(model, inputs | hidden | joined, True, num_items_in_batch)
        share = self._share_of_step(inputs["labels"], num_items_in_batch)
        if self._adds_router_losses:
            own: HoldsMixtures = self.accelerator.unwrap_model(model)
            loss = own.add_router_losses(loss, share)
        if self.teacher is not None:
            with torch.no_grad():
                taught = self.teacher(**{k: v for k, v in inputs.items() if k != "task_ids"}, **hidden)
            extra = self.distillation(outputs, taught, inputs["labels"])
            loss = (1 - self.run.teacher_weight) * loss + share * extra
        return (loss, outputs) if return_outputs else loss

    def _share_of_step(
        self, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
    ) -> torch.Tensor | float:
        """A pass's share of the step's mean, scaled as Trainer scales the loss; one if it averages itself.

        Args:
            labels: (B, T) or (B,), -100 where none counts.
            num_items_in_batch: how many count in the step, of all devices if tokens are averaged across them.
        """
        if num_items_in_batch is None or not self.model_accepts_loss_kwargs:
            return 1.0
        share = (labels[..., int(self._loss_shifts_labels) :] != -100).sum() / num_items_in_batch
        if not self.args.average_tokens_across_devices:
            return share
        return share * (self.args.n_gpu if self.args.n_gpu > 1 else self._num_batches())

    def _num_batches(self) -> int:
        """How many processes have a batch of their own."""
        return self.accelerator.num_processes // self.get_tp_size()

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
            logs["eval_loss"] = logs.pop("eval_mean_loss", logs["eval_loss"])  # of all tokens, not of batches
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
