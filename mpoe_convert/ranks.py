"""The processes of one run, as torchrun starts them: which of them this is, and what one tells the others."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from .devices import pick_device
from .errors import MachineError, MpoeError, reworded

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")

# So long processes wait for each other. One that ends is noticed at once.
_PATIENCE = timedelta(days=7)


def is_distributed() -> bool:
    """Whether torchrun has started this process beside others. Does not import torch."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"


def is_first() -> bool:
    """Whether this process speaks for its run. Does not import torch."""
    return not is_distributed() or os.environ.get("RANK", "0") == "0"


@dataclass(frozen=True)
class _Failure:
    """What went wrong in a process, as another one raises it."""

    rank: int
    error: MpoeError | None  # None: a bug, whose traceback is the text
    text: str

    @classmethod
    def of(cls, rank: int, error: Exception) -> _Failure:
        if isinstance(error, MpoeError):
            return cls(rank, error, str(error))
        return cls(rank, None, "".join(traceback.format_exception(error)))

    def as_error(self) -> Exception:
        if self.error is not None:
            return reworded(self.error, f"process {self.rank}: {self.text}")
        return RuntimeError(f"process {self.rank}:\n{self.text}")


class _Known(Exception):
    """Carries an error that every process has been told, out of work that they do together."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


@dataclass(frozen=True)
class Ranks:
    """The processes that work on one command. By default there is this one alone.

    Attributes:
        rank: of this process, from 0.
        count: of all.
        group: in which they talk, of torch.distributed; None for the default one.
    """

    rank: int = 0
    count: int = 1
    group: Any = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def first(self, work: Callable[[], T], help: Callable[[Any], None] | None = None) -> T:
        """What `work` gives in the first process, in all; it is run there alone, and its error raised in all.

        Args:
            help: what the other processes do meanwhile with each task that `work` gives to `share`.

        Raises:
            MachineError: a process has ended.
        """
        if self.count == 1:
            return work()
        error: Exception | None = None
        made: list = [None, None, None]  # value, failure, task
        if self.is_first:
            try:
                made[0] = work()
            except Exception as caught:  # raised below, when the others know
                error, made[1] = caught, _Failure.of(0, caught)
        self._broadcast(made)
        while made[2] is not None:
            assert help is not None, "tasks are shared among processes that help"
            self._try_to_help(partial(help, made[2]))
            self._broadcast(made)
        if error is not None:
            raise error
        if made[1] is not None:
            raise self._told(made[1].as_error())
        return made[0]

    def share(self, task: object, work: Callable[[], None]) -> None:
        """In the work of `first`: do a task with the other processes, which are given it, and wait for all.

        Args:
            task: can be pickled.
            work: what the first process does.

        Raises:
            the first error, as `together`.
        """
        if self.count > 1:
            self._broadcast([None, None, task])
        self.together(work)

    def together(self, work: Callable[[], None]) -> None:
        """Run `work` in every process and wait for all; the first error is raised in all.

        The work may call `gathered` and `add_up`, every process as often as the others.

        Raises:
            MachineError: a process has ended.
        """
        if self.count == 1:
            return work()
        error: Exception | None = None
        try:
            work()
        except _Known as known:
            raise known.error from known
        except Exception as caught:  # raised by the exchange, in all processes
            error = caught
        try:
            self._exchange(None, error)
        except _Known as known:
            raise known.error from error

    def gathered(self, value: T) -> list[T]:
        """What every process has, by rank; in the work of `together`."""
        return [value] if self.count == 1 else self._exchange(value)

    def add_up(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """The sums of all processes, on the CPU; whole in the first process alone. In the work of `together`.

        Args:
            sums: tensors, which are used up; one that a process lacks counts as zeros.
        """
        if self.count == 1:
            return {name: value.cpu() for name, value in sums.items()}
        import torch

        own = {name: sums.pop(name).cpu().contiguous() for name in sorted(sums)}
        known: dict[str, tuple] = {}
        for each in self.gathered({name: (value.shape, value.dtype) for name, value in own.items()}):
            known |= each
        for name in known.keys() - own.keys():
            own[name] = torch.zeros(known[name][0], dtype=known[name][1])
        self.gathered(None)  # one that fails between two reductions would leave the others waiting
        for name in sorted(known):
            self._talk(lambda dist, value=own[name]: dist.reduce(value, dst=0, group=self.group))
        return own

    def device(self, name: str) -> torch.device:
        """As `pick_device`; with several GPUs each process of a machine takes its own."""
        import torch

        device = pick_device(name)
        if self.count == 1 or device.type != "cuda" or device.index is not None:
            return device
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())

    def _try_to_help(self, work: Callable[[], None]) -> None:
        """As `together`; the first process raises what goes wrong, and tells all."""
        with suppress(Exception):
            self.together(work)

    def _broadcast(self, made: list) -> None:
        self._talk(lambda dist: dist.broadcast_object_list(made, src=0, group=self.group))

    def _exchange(self, value: T, error: Exception | None = None) -> list[T]:
        """What every process has. Raises _Known with the first error if some have one."""
        found: list = [None] * self.count
        own = (value, None if error is None else _Failure.of(self.rank, error))
        self._talk(lambda dist: dist.all_gather_object(found, own, group=self.group))
        if failure := next((failed for _, failed in found if failed), None):
            is_own = error is not None and failure.rank == self.rank
            raise _Known(self._told(error if is_own and error else failure.as_error()))
        return [value for value, _ in found]

    def _talk(self, exchange: Callable[[Any], object]) -> None:
        import torch.distributed as dist

        try:
            exchange(dist)
        except (RuntimeError, ValueError) as error:  # gloo's, when a connection is closed
            lost = MachineError(
                "another process of this run has ended before its work was done, perhaps for lack of memory; "
                "no output was written, run it again"
            )
            raise self._told(lost) from error

    def _told(self, error: Exception) -> Exception:
        """An error that all processes raise, and the first one tells."""
        if isinstance(error, MpoeError) and not self.is_first:
            error.is_told = True
        return error


ALONE = Ranks()


@contextmanager
def joined(distributed: bool) -> Iterator[Ranks]:
    """Join the processes that torchrun has started, by gloo.

    Args:
        distributed: False: this process works alone, whoever started it.

    Raises:
        MachineError: they cannot be reached.
    """
    if not (distributed and is_distributed()):
        yield ALONE
        return
    import torch.distributed as dist

    ours = not dist.is_initialized()
    try:
        if ours:
            dist.init_process_group("gloo", timeout=_PATIENCE)
        group = None if ours else dist.new_group(backend="gloo", timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise MachineError(f"the processes of this run cannot reach each other: {error}") from error
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), group)
    finally:
        if ours:
            dist.destroy_process_group()
