"""Progress on stderr while a command works, and silence of the libraries below it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from ..ranks import is_first
from .tables import console, training_line

if TYPE_CHECKING:
    from ..conversion.report import MatrixReport


@contextmanager
def conversion_progress(enabled: bool, out: Console | None = None) -> Iterator:
    """A progress callback for `convert`: a bar over FFNs on a terminal, nothing elsewhere."""
    out = out or console(stderr=True)
    if not (enabled and out.is_terminal):
        yield None
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    bar = Progress(*columns, console=out, transient=True)

    def update(name: str, done: int, total: int, report: MatrixReport | None) -> None:
        if not bar.tasks:  # not before: a download has bars of its own
            bar.add_task("", total=total, completed=done)
            bar.start()
        text = name if report is None else f"{name}  error {report.relative_error:.1e}"
        bar.update(bar.task_ids[0], description=escape(text), completed=done, total=total)

    try:
        yield update
    finally:
        if bar.tasks:
            bar.stop()


def silence_libraries() -> None:
    """No progress bars and warnings of transformers and datasets among our own lines."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    if find_spec("datasets"):
        import datasets

        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(logging.CRITICAL)  # errors are told in our words


def silence_hub() -> None:
    """No words of huggingface_hub on what a commit holds; what it says when it tries again stays."""
    logging.getLogger("huggingface_hub.hf_api").setLevel(logging.ERROR)


@dataclass(frozen=True)
class TrainingProgress:
    """What `finetune` shows: a line for whatever is logged and for notes, bars below on a terminal."""

    out: Console
    bars: Progress

    def log(self, step: int, steps: int, logs: Mapping[str, float]) -> None:
        """A line for what Trainer logs."""
        if line := training_line(logs):
            self.out.print(f"step {step}/{steps}  {line}", highlight=False)

    def watch(self, what: str, done: int, total: int) -> None:
        """A line for a note; elsewhere a bar, which goes when an evaluation ends."""
        if not total:
            self.out.print(escape(what), highlight=False, soft_wrap=True)
        elif self.out.is_terminal:
            self._move_bar(what, done, total)

    def _move_bar(self, what: str, done: int, total: int) -> None:
        found = [task.id for task in self.bars.tasks if task.description == what]
        bar = found[0] if found else self.bars.add_task(what, total=total, completed=done)
        self.bars.start()
        if what != "training" and done >= total:
            self.bars.remove_task(bar)
        else:
            self.bars.update(bar, completed=done, total=total)


@contextmanager
def training_progress(enabled: bool, out: Console | None = None) -> Iterator[TrainingProgress | None]:
    """Progress for `finetune`; None if nothing is to be shown."""
    if not (enabled and is_first()):
        yield None
        return
    out = out or console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bars = Progress(*columns, console=out, transient=True)
    try:
        yield TrainingProgress(out, bars)
    finally:
        if bars.tasks:
            bars.stop()


@contextmanager
def evaluation_progress(enabled: bool) -> Iterator:
    """A progress callback for `evaluate`: a bar over batches on a terminal, nothing elsewhere."""
    out = console(stderr=True)
    if not (enabled and out.is_terminal):
        yield None
        return
    bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=out)
    tasks: dict[str, TaskID] = {}

    def update(model: str, done: int, total: int) -> None:
        if model not in tasks:
            tasks[model] = bar.add_task(escape(model), total=total, completed=done)
        bar.update(tasks[model], completed=done, total=total)

    with bar:
        yield update


class _Count(MofNCompleteColumn):
    """ "8/52"; nothing where the number of steps is not known."""

    def render(self, task: Task) -> Text:
        return Text() if task.total is None else super().render(task)


@contextmanager
def export_progress(enabled: bool, out: Console | None = None) -> Iterator:
    """A progress callback for `export` and `prune`: a bar over tensors on a terminal, nothing elsewhere.

    While something of no known length runs (in all 0) the bar moves to and fro.
    """
    out = out or console(stderr=True)
    if not (enabled and out.is_terminal):
        yield None
        return
    bar = Progress(BarColumn(), _Count(), TextColumn("{task.description}"), console=out, transient=True)
    bar.add_task("", total=None)

    def update(what: str, done: int, in_all: int) -> None:
        if (bar.tasks[0].total is None) != (not in_all):  # update() cannot take a total away
            bar.remove_task(bar.task_ids[0])
            bar.add_task("", total=in_all or None)
        bar.update(bar.task_ids[0], description=escape(what), completed=done, total=in_all or None)

    with bar:
        yield update
