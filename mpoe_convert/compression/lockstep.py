"""Run several passes of the dense model side by side, so that every block is read once for all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor, nn

from ..planning.plan import FFNPlan, MatrixPlan
from ..source.checkpoint import Checkpoint
from ..source.ffn import Source
from ..source.matrices import read_bias
from .dense_run import DenseRun
from .stream import projection_modules

if TYPE_CHECKING:
    from greenlet import greenlet
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel


class Lockstep:
    """Functions that run side by side: one that calls `wait` goes on when all others wait or have returned.

    Attributes:
        current: index of the function that runs.
    """

    def __init__(self) -> None:
        self.current = 0
        self._main: greenlet | None = None

    def run(self, functions: Sequence[Callable[[], object]], all_wait: Callable[[], None]) -> None:
        """Run all functions to their ends; nothing keeps running when this returns or raises.

        Args:
            all_wait: called whenever every function waits or has returned.

        Raises:
            whatever a function raises.
        """
        from greenlet import getcurrent, greenlet

        self._main = getcurrent()
        walkers = [greenlet(function) for function in functions]
        try:
            while not all(walker.dead for walker in walkers):
                for self.current, walker in enumerate(walkers):
                    if not walker.dead:
                        walker.switch()
                all_wait()
        finally:
            for walker in walkers:
                if not walker.dead:
                    walker.throw()

    def wait(self) -> None:
        assert self._main is not None  # only functions that `run` has started wait
        self._main.switch()

    @staticmethod
    def stop() -> NoReturn:
        """End the function that calls."""
        from greenlet import GreenletExit

        raise GreenletExit


class LockstepWalk(ABC):
    """Passes of the dense model that wait for each other in front of FFNs.

    A subclass says where they wait and what happens on the way. All passes meet the FFNs in the same order.
    An FFN has two places: "inputs", in front of gate and up, and "inner", in front of down.

    Attributes:
        model: the streamed dense model of `run`.
    """

    def __init__(self, run: DenseRun, model: PreTrainedModel) -> None:
        self.run, self.model = run, model
        self._lockstep = Lockstep()
        self._waiting_at: tuple[FFNPlan, str] | None = None

    @abstractmethod
    def meet(self, ffn: FFNPlan, place: str, x: Tensor) -> None:
        """A pass reaches a place with inputs x; here it may call `wait_at`, or `stop`."""

    @abstractmethod
    def release(self, ffn: FFNPlan | None, place: str) -> None:
        """All passes wait at a place and are about to go on; None: all passes are over."""

    @abstractmethod
    def leave(self, ffn: FFNPlan, matrices: Sequence[MatrixPlan], x: Tensor, y: Tensor) -> Tensor | None:
        """A pass has computed y from x with these matrices (two of a fused module).

        Returns another y to go on with, or None.
        """

    @property
    def current(self) -> int:
        """Index of the pass that runs."""
        return self._lockstep.current

    def wait_at(self, ffn: FFNPlan, place: str) -> None:
        """Let the pass that runs wait for all others."""
        self._waiting_at = (ffn, place)
        self._lockstep.wait()

    def stop(self) -> NoReturn:
        """End the pass that runs."""
        self._lockstep.stop()

    def walk(self, passes: Sequence[Callable[[], object]]) -> None:
        """Run the passes, functions that call `model`. Raises whatever they raise; no hook is left."""
        handles = [handle for ffn in self.run.plan.ffns for handle in self._watch(ffn)]
        try:
            with torch.no_grad():
                self._lockstep.run(passes, self._release)
        finally:
            for handle in handles:
                handle.remove()

    def _release(self) -> None:
        ffn, place = self._waiting_at or (None, "")
        self._waiting_at = None
        self.release(ffn, place)

    def _watch(self, ffn: FFNPlan) -> Iterator[RemovableHandle]:
        modules = projection_modules(self.model, self.run.plan.family, ffn)

        def before(place: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.meet(ffn, place, args[0])

        def behind(
            matrices: list[MatrixPlan], module: nn.Module, args: tuple[Tensor, ...], output: Tensor
        ) -> Tensor | None:
            return self.leave(ffn, matrices, args[0], output)

        module2matrices: dict[nn.Module, list[MatrixPlan]] = {}
        for matrix in ffn.matrices:
            module2matrices.setdefault(modules[matrix.role], []).append(matrix)
        first = modules.get("gate", modules["up"])
        yield first.register_forward_pre_hook(partial(before, "inputs"))
        yield modules["down"].register_forward_pre_hook(partial(before, "inner"))
        for module, matrices in module2matrices.items():
            yield module.register_forward_hook(partial(behind, matrices))


def project(checkpoint: Checkpoint, source: Source, x: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """What a projection computes with the product of `parts`, (in, r) and (r, out), as its matrix.

    The bias is read from the checkpoint: a streamed module has given its own away.
    """
    y = x.to(parts[0])
    for part in parts:
        y = y @ part
    return y + read_bias(checkpoint, source).to(y) if source.bias else y
