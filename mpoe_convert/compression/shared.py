"""Passes of the dense model over calibration batches that the processes of a run share.

The first process decides what is collected; each process runs its share of the batches, and the first one
saves the sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..planning.plan import Plan
from ..ranks import Ranks
from ..source.checkpoint import Checkpoint
from .batches import Batch
from .dense_run import DenseRun, Progress

# Called with (run, paths of FFNs, what saves, what shows the progress). Not a closure: it is named to others.
Collect = Callable[[DenseRun, Sequence[str], Callable[[str, Any], None], Progress], None]


@dataclass(frozen=True)
class Passes:
    """A task, as the first process gives it to the others.

    Attributes:
        collect: what runs the model and adds up.
        wanted: paths of the FFNs that are looked at.
    """

    collect: Collect
    wanted: tuple[str, ...]
    plan: Plan
    batches: tuple[Batch, ...]


def collect_shared(
    run: DenseRun,
    collect: Collect,
    wanted: Sequence[str],
    save: Callable[[str, Any], None],
    progress: Progress,
) -> None:
    """Collect at the wanted FFNs, by all processes of the run. Raises the first error of any."""
    task = Passes(collect, tuple(wanted), run.plan, run.batches)
    run.ranks.share(task, lambda: collect(run, wanted, save, progress))


def help_collect(task: Passes, checkpoint: Checkpoint, device: torch.device, ranks: Ranks) -> None:
    """What a process does that is not the first."""
    run = DenseRun(task.plan, checkpoint, task.batches, device, ranks)
    task.collect(run, task.wanted, _nothing, _nothing)


def _nothing(*_: object) -> None:
    pass
