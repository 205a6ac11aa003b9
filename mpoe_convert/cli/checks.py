"""What a command can tell before it imports what takes seconds: names that are not there."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import click

from ..artifact.folder import check_output, remove_leftovers
from ..errors import OutputError
from ..source.repository import check_model


def check_output_first(output: str, overwrite: bool, quiet: bool) -> None:
    """Check the output, and name and remove what a killed run left beside it. Raises OutputError."""
    check_output(Path(output), overwrite)
    try:
        leftovers = remove_leftovers(Path(output))
    except OSError as error:
        raise OutputError(f"the folder of the output '{output}' cannot be read: {error.strerror}") from error
    if not quiet:
        for folder in leftovers:
            click.echo(f"Removed '{folder}', which a run that was killed had left.", err=True)


def check_models_first(models: Iterable[str | None]) -> None:
    """Check that models are folders, or Hub ids that could be looked up. Raises MpoeError."""
    for model in filter(None, models):
        check_model(model)
