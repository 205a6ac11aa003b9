"""What a command can tell before it imports what takes seconds: names that are not there."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import click

from ..artifact.folder import check_output, count_finished, find_resumable, remove_leftovers
from ..errors import OutputError, counted
from ..ranks import is_first
from ..source.repository import check_model


def check_output_first(output: str, overwrite: bool, quiet: bool, resume: bool = False) -> None:
    """Check the output, and name what an interrupted run left beside it.

    It is removed, unless this run goes on from it. Of several processes the first one does so.

    Raises:
        OutputError: the output cannot be written.
    """
    check_output(Path(output), overwrite)
    if not is_first():
        return
    try:
        kept = find_resumable(Path(output)) if resume else None
        leftovers = [] if kept else remove_leftovers(Path(output))
    except OSError as error:
        raise OutputError(f"the folder of the output '{output}' cannot be read: {error.strerror}") from error
    if not quiet:
        if kept:
            finished = counted(count_finished(kept), "weight file")
            click.echo(f"Going on with '{kept}', where an interrupted run left {finished}.", err=True)
        for folder in leftovers:
            click.echo(f"Removed '{folder}', which a run that was killed had left.", err=True)


def check_models_first(models: Iterable[str | None]) -> None:
    """Check that models are folders, or Hub ids that could be looked up. Raises MpoeError."""
    for model in filter(None, models):
        check_model(model)
