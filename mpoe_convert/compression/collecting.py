"""Walks that collect something at the FFNs of the dense model, on the batches of this process."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from ..planning.plan import FFNPlan, MatrixPlan
from .batches import is_held_out, token_rows
from .dense_run import DenseRun
from .lockstep import LockstepWalk
from .stream import run_batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CollectingWalk(LockstepWalk):
    """One pass per batch. All wait in front of every FFN, so that what is found at one is in memory alone.

    Attributes:
        wanted: paths of the FFNs that are looked at.
    """

    def __init__(self, run: DenseRun, model: PreTrainedModel, wanted: Collection[str]) -> None:
        super().__init__(run, model)
        self.wanted = set(wanted)
        self._own = run.own
        self._inside: FFNPlan | None = None
        self._times_left = {ffn.ffn.path: ffn.runs_per_token for ffn in run.plan.ffns}
        self._calls_left = [sum(self._times_left.values())] * len(self._own)

    @abstractmethod
    def see(self, ffn: FFNPlan, place: str, x: Tensor) -> None:
        """A batch brings x (..., features) to a place of an FFN that is looked at; see `rows`."""

    @abstractmethod
    def finish(self, path: str) -> None:
        """All batches are behind an FFN that is looked at, for the last time where layers share it."""

    def walk_batches(self) -> None:
        """Run all batches of this process."""
        self.walk([partial(run_batch, self.model, self.run.batches[number]) for number in self._own])

    @property
    def number(self) -> int:
        """Of the batch whose pass runs."""
        return self._own[self.current]

    @property
    def holds_out(self) -> bool:
        """Whether that batch only measures."""
        return is_held_out(self.number, self.run.batches)

    def sees(self, ffn: FFNPlan) -> bool:
        """Whether the FFN is looked at, by this process."""
        return ffn.ffn.path in self.wanted and not self.run.is_spare

    def rows(self, path: str, x: Tensor) -> Tensor:
        """(tokens, features) in float32 of activations of that batch, without padding."""
        return token_rows(self.model, self.run.batches[self.number], path, x)

    def meet(self, ffn: FFNPlan, place: str, x: Tensor) -> None:
        if place == "inputs":
            self.wait_at(ffn, place)
        if self.sees(ffn):
            self.see(ffn, place, x)

    def release(self, ffn: FFNPlan | None, place: str) -> None:
        if self._inside is not None:
            path = self._inside.ffn.path
            self._times_left[path] -= 1
            if not self._times_left[path] and path in self.wanted:
                self.finish(path)
        self._inside = ffn

    def leave(self, ffn: FFNPlan, matrices: Sequence[MatrixPlan], x: Tensor, y: Tensor) -> None:
        if any(matrix.role == "down" for matrix in matrices):
            self._calls_left[self.current] -= 1
            if not self._calls_left[self.current]:
                self.stop()  # behind the last FFN
