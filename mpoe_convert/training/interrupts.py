"""Ctrl-C and other signals that end a run: the running step is finished and its checkpoint is written."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from .library import TrainerCallback

if TYPE_CHECKING:
    from types import FrameType

    from transformers import TrainerControl, TrainerState, TrainingArguments

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


class Interrupted(KeyboardInterrupt):
    """A signal ended a run after its step's checkpoint was written.

    Attributes:
        number: of the signal.
        step: of the checkpoint.
    """

    def __init__(self, number: int, step: int):
        super().__init__(
            f"{signal.Signals(number).name} ended training at step {step}, whose checkpoint is saved"
        )
        self.number, self.step = number, step


class StopOnSignal(TrainerCallback):
    """Saves and stops at the end of the step in which a signal comes; the second signal ends at once.

    Of several processes, one signal to one of them ends all at the same step.

    Args:
        told: called as told(signal) when the first comes.
    """

    def __init__(self, told: Callable[[int], None] | None = None):
        self.told = told
        self.number = 0  # of the signal that came
        self._is_training = False
        self._before: dict[int, Any] = {}
        self._pid = os.getpid()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take signals inside the block; those that the caller ignores (nohup) stay ignored."""
        if threading.current_thread() is threading.main_thread():
            numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
            handlers = {number: signal.getsignal(number) for number in numbers}
            self._before = {n: h for n, h in handlers.items() if h not in (signal.SIG_IGN, None)}
        try:
            for number in self._before:
                signal.signal(number, self._take)
            yield
        finally:
            self._give_back()

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # a worker that loads data, which is needed for the rest of the step
        if self._is_training and not self.number:
            self.number = number
            if self.told is not None:
                self.told(number)
            return
        self._give_back()  # no step to wait for, or the second signal
        signal.raise_signal(number)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._is_training = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._agree(args):
            control.should_save = control.should_log = True

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._agree(args):
            raise Interrupted(self.number, state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._is_training = False
        if self._agree(args) and args.save_strategy != "no":
            raise Interrupted(self.number, state.global_step)

    def _agree(self, args: TrainingArguments) -> bool:
        """Whether a signal came to any of the processes."""
        if args.world_size > 1 and torch.distributed.is_initialized():
            number = torch.tensor(self.number, device=args.device)
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
            self.number = int(number)
        return self.number > 0
