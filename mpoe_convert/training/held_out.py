"""What training did to the loss on held-out data, example by example: before the first step and after all."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import TrainingError
from .intervals import bootstrap, bootstrap_interval, draw_samples
from .library import TrainerCallback
from .tasks import PERPLEXITY, Task

if TYPE_CHECKING:
    from transformers import EvalPrediction, Trainer, TrainerControl, TrainerState, TrainingArguments

# Of the first evaluation's entry in Trainer's log, which checkpoints hold: its losses, example by example.
UNITS = "units"


class HeldOut(TrainerCallback):
    """Measures held-out examples for `transformers.Trainer`, and evaluates the last step too.

    Attributes:
        latest: (N, 2 or 3) of the last evaluation, as `Task.losses` gives them.
    """

    def __init__(self, task: Task):
        self.task = task
        self.latest = np.empty((0, 2))

    def attach(self, trainer: Trainer, *, at_start: bool) -> None:
        """Measure what a trainer evaluates; `at_start`: before the first step too."""
        trainer.preprocess_logits_for_metrics = self.reduce
        trainer.compute_metrics = self.metrics
        trainer.args.eval_on_start = at_start
        trainer.add_callback(self)

    def reduce(self, logits: Any, labels: torch.Tensor) -> torch.Tensor:
        """(B, 2 or 3) from a batch's outputs; the logits are the first of them with an axis per example."""
        if isinstance(logits, (tuple, list)):
            logits = next(each for each in logits if isinstance(each, torch.Tensor) and each.dim() > 1)
        return self.task.losses(logits, labels)

    def metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """The mean loss over all tokens or examples, and the accuracy of a classifier.

        Raises:
            TrainingError: the loss is not finite, or nothing was scored.
        """
        self.latest = np.asarray(prediction.predictions, dtype=np.float64)
        loss, count, *hits = self.latest.sum(0).tolist()
        if not np.isfinite(loss) or not count:
            broken = int((~np.isfinite(self.latest[:, 0])).sum())
            found = f"is not finite in {broken} of {len(self.latest)} examples" if count else "is of no token"
            raise TrainingError(
                f"the loss on the held-out data {found}; look at these data, or lower the learning rate"
            )
        accuracy = {"accuracy": hits[0] / count} if self.task.has_labels else {}
        return {"mean_loss": loss / count} | accuracy

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step >= state.max_steps:  # otherwise what was learnt since could not be the best
            control.should_evaluate = True

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0:  # in the log, so that a resumed run knows it
            state.log_history[-1][UNITS] = self.latest[:, :2].tolist()

    def change(self, log: list[dict], seed: int) -> dict | None:
        """The ratio of perplexities, at the last evaluation to before the first step, with a paired interval.

        Args:
            log: of the Trainer; the losses of the first evaluation are taken out of it.
            seed: draws the bootstrap samples.

        Returns:
            The fields of a `Metric`; None: it was not evaluated before the first step.
        """
        before = next((np.array(entry.pop(UNITS)) for entry in log if UNITS in entry), None)
        if before is None or len(before) != len(self.latest):
            return None
        counted = before[:, 1] > 0
        before, after = before[counted], self.latest[counted, :2]
        draws, function = draw_samples(len(after), seed), PERPLEXITY.function
        samples = bootstrap(function, after, draws) / bootstrap(function, before, draws)
        value = function(after) / function(before)
        return asdict(bootstrap_interval(value, samples, len(after), self.task.sampled))
