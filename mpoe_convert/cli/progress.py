"""Progress on stderr while a command works, and silence of the libraries below it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

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
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    bar = Progress(*columns, console=out, transient=True)

    def update(name: str, done: int, total: int, report: MatrixReport | None) -> None:
        if not bar.tasks:  # not before: a download has bars of its own
            bar.add_task("")
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


def silence_hub() -> None:
    """No words of huggingface_hub on what a commit holds; what it says when it tries again stays."""
    logging.getLogger("huggingface_hub.hf_api").setLevel(logging.ERROR)


def is_main_process() -> bool:
    """Whether this process prints, where training runs in several."""
    from accelerate import PartialState

    return PartialState().is_main_process


@contextmanager
def training_progress(enabled: bool) -> Iterator:
    """A progress callback for `finetune`: a line for whatever is logged, a bar below on a terminal."""
    out = console(stderr=True)
    if not enabled:
        yield None
        return
    bar = Progress(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=out, transient=True)
    task = bar.add_task("")

    def update(step: int, steps: int, logs: Mapping[str, float]) -> None:
        bar.update(task, completed=step, total=steps)
        line = training_line(logs)
        if line:
            out.print(f"step {step}/{steps}  {line}", highlight=False)

    with bar if out.is_terminal else nullcontext():
        yield update


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
            tasks[model] = bar.add_task(escape(model))
        bar.update(tasks[model], completed=done, total=total)

    with bar:
        yield update


@contextmanager
def export_progress(enabled: bool) -> Iterator:
    """A progress callback for `export`: a bar over tensors on a terminal, nothing elsewhere."""
    out = console(stderr=True)
    if not (enabled and out.is_terminal):
        yield None
        return
    bar = Progress(
        BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), console=out, transient=True
    )
    task = bar.add_task("")
    with bar:
        yield lambda name, done, total: bar.update(
            task, description=escape(name), completed=done, total=total
        )
