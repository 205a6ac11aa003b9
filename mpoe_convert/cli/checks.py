"""What a command can tell before it imports what takes seconds: wrong names, options against the source."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..artifact.block import check_folder, refuse_unconverted
from ..artifact.folder import check_output, count_finished, find_resumable, remove_leftovers
from ..errors import OutputError, counted
from ..ranks import is_first
from ..source.checkpoint import open_checkpoint, read_config, readable
from ..source.repository import Folder, check_model, local_folder

if TYPE_CHECKING:
    from ..planning.recipe import Recipe


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
    """Check that models are folders, or Hub ids that could be looked up, and that artifacts are whole.

    Raises MpoeError.
    """
    for model in filter(None, models):
        check_model(model)
        if folder := local_folder(model):
            check_folder(str(folder))


def check_artifact_first(artifact: str, revision: str | None = None) -> None:
    """Check that an artifact is a folder that holds one, or a Hub id that could be looked up.

    Raises MpoeError.
    """
    check_model(artifact, revision)
    if folder := local_folder(artifact):
        with readable(artifact):
            refuse_unconverted(read_config(Folder(artifact, folder)), str(folder / "config.json"))
            check_folder(str(folder))


def check_recipe_first(recipe: Recipe, *, stream: bool = False, whole: bool = True) -> None:
    """Check a recipe against the headers of a folder, as far as its code need not be run.

    What is on the Hub, custom code and experts that are named by hand are left to the conversion.

    Args:
        stream: whether `--stream` was given, which a folder refuses.
        whole: also resolve and plan a dense source, as `plan` does; without it, only options that mixtures do
            not take and a search without text are refused.

    Raises:
        MpoeError: the source or its combination with the recipe cannot be converted.
    """
    if local_folder(recipe.model) is None or recipe.trust_remote_code or recipe.experts_at:
        return
    from ..planning.planner import plan_checkpoint
    from ..planning.resolve import check_for_mixtures, check_search, resolve_recipe
    from ..source.families import FAMILIES
    from ..source.mixtures import is_mixture

    checkpoint = open_checkpoint(recipe.model, headers_only=True, stream=stream)
    if is_mixture(checkpoint):
        dense_types = {name for family in FAMILIES for name in family.model_types}
        if checkpoint.config["model_type"] not in dense_types:  # there, experts are a mistake, told later
            check_for_mixtures(recipe)
    elif recipe.search:
        check_search(recipe, bool(recipe.calibrate))
    elif whole:
        resolved = resolve_recipe(recipe, checkpoint, calibrated=bool(recipe.calibrate))
        if not (recipe.compresses or recipe.metric or recipe.calibrate):
            plan_checkpoint(resolved, checkpoint)
