"""`convert` and `plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ..planning.recipe import Recipe
from ..ranks import is_first
from ..request import as_text
from ..source.repository import check_model
from ..source.texts import check_sources
from .app import announce, echo_json, one_line_errors
from .checks import check_output_first
from .options import (
    COMMON,
    GroupedCommand,
    add,
    config_option,
    option,
    options_of,
    output_option,
    request_of,
    token_option,
)
from .push import PUSH_NAMES, PUSH_OPTIONS, check_push, resumable_push, run_push

if TYPE_CHECKING:
    from ..conversion.report import Report

RECIPE_OPTIONS = add(
    config_option("Source"), token_option("Source"), options_of(Recipe, skip={"model"}, from_file=True)
)


@click.command(cls=GroupedCommand)
@click.argument("model", required=False)
@output_option()
@option(
    "--overwrite",
    heading="Output",
    is_flag=True,
    help="Replace an artifact that is already there. With --push-to-hub also: commit over a repository that "
    "holds something else.",
)
@option(
    "--resume",
    heading="Output",
    is_flag=True,
    help="Keep the weight files that are finished when this run is interrupted, and go on from those that an "
    "interrupted run with --resume has kept.",
)
@option("--dry-run", heading="Output", is_flag=True, help="Show the plan and write nothing, as `plan` does.")
@option(
    "--push-to-hub",
    "repo_id",
    heading="Hub",
    metavar="USER/NAME",
    help="Push the artifact to this repository. Whether that is possible is checked before the conversion.",
)
@PUSH_OPTIONS
@RECIPE_OPTIONS
@COMMON
def convert(
    model: str | None,
    output: str | None,
    overwrite: bool,
    resume: bool,
    dry_run: bool,
    repo_id: str | None,
    config: str | None,
    token: str | None,
    as_json: bool,
    quiet: bool,
    verbose: int,
    **options: Any,
) -> None:
    """Convert MODEL (the command's name may be left out)."""
    with one_line_errors(verbose, quiet):
        pushing = {name: options.pop(name) for name in PUSH_NAMES}
        recipe, named = request_of(Recipe, options, config, model)
        output = as_text("output", output or named) if output or named else ""
        if not (output or dry_run):
            raise click.UsageError("Missing option '-o' / '--output' (or use --dry-run).")
        check_model(recipe.model, recipe.revision)
        check_sources(recipe.calibrate)
        if not dry_run:
            check_output_first(output, overwrite, quiet, resume)
        check_push(repo_id, pushing, overwrite, token)
        if dry_run:
            show_plan(recipe, token, as_json, quiet)
            return
        announce(f"Converting {recipe.model}", quiet)
        quiet = quiet or not is_first()
        report = run_conversion(recipe, output, overwrite, resume, token, quiet)
        if not is_first():
            return
        if not (as_json or quiet):
            show_conversion(report, output, verbose)
        pushed = {}
        if repo_id:
            with resumable_push(output, repo_id, pushing, overwrite):
                pushed = {"pushed": run_push(output, repo_id, pushing, overwrite, token, as_json or quiet)}
        if as_json:
            echo_json(report.to_json() | pushed)


def run_conversion(
    recipe: Recipe, output: str, overwrite: bool, resume: bool, token: str | None, quiet: bool
) -> Report:
    from ..conversion.convert import convert as convert_checkpoint
    from .progress import conversion_progress, silence_libraries

    if recipe.calibrate:
        silence_libraries()
    with conversion_progress(not quiet) as progress:
        return convert_checkpoint(
            recipe,
            output,
            overwrite=overwrite,
            resume=resume,
            distributed=True,
            token=token,
            progress=progress,
        )


def show_conversion(report: Report, output: str, verbose: int) -> None:
    from .tables import console, print_report

    print_report(report, output, console(), per_matrix=verbose > 0)


@click.command(cls=GroupedCommand)
@click.argument("model", required=False)
@option(
    "--processes",
    heading="General",
    type=int,
    metavar="N",
    help="Show what each of N processes that torchrun starts reads, writes and holds in memory.",
)
@RECIPE_OPTIONS
@COMMON
def plan(
    model: str | None,
    processes: int | None,
    config: str | None,
    token: str | None,
    as_json: bool,
    quiet: bool,
    verbose: int,
    **options: Any,
) -> None:
    """Show what a conversion would do; nothing is written.

    Sites, bonds, parameters, bytes, weight files and peak memory, from the headers alone; with --keep or
    --max-error the weights are read, and calibrated with --calibrate.
    """
    with one_line_errors(verbose, quiet):
        if processes is not None:
            from ..planning.shares import check_count

            check_count(processes)
        recipe, _ = request_of(Recipe, options, config, model)
        check_model(recipe.model, recipe.revision)
        check_sources(recipe.calibrate)
        announce(f"Planning {recipe.model}", quiet)
        show_plan(recipe, token, as_json, quiet, processes)


def show_plan(
    recipe: Recipe, token: str | None, as_json: bool, quiet: bool, processes: int | None = None
) -> None:
    from ..compression.plan import plan as plan_conversion
    from ..planning.shares import plan_shares
    from .progress import conversion_progress, silence_libraries
    from .tables import console

    if recipe.calibrate:
        silence_libraries()
    with conversion_progress(not quiet) as progress:
        result = plan_conversion(recipe, token=token, progress=progress)
    shares = None if processes is None else plan_shares(result, processes)
    if as_json:
        echo_json(result.to_json() | ({"processes": shares.to_json()} if shares else {}))
    elif not quiet:
        console().print(*filter(None, (result, shares)), sep="\n")
