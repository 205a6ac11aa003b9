"""`convert` and `plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ..errors import RequestError
from ..options import called, switched
from ..planning.recipe import Recipe
from ..ranks import is_first
from ..request import as_text
from ..source.repository import check_model
from ..source.text_options import check_calibration
from .app import announce, echo_json, one_line_errors
from .checks import check_output_first, check_recipe_first
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
@option(
    "--stream",
    heading="Source",
    is_flag=True,
    help="Leave the weights of a model on the Hub there, and read each tensor when it is needed. Not with "
    "--calibrate, which runs the whole model.",
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
    stream: bool,
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
        check_calibration(recipe)
        if not dry_run:
            check_output_first(output, overwrite, quiet, resume)
        check_push(repo_id, pushing, overwrite, token)
        check_recipe_first(recipe, stream=stream, whole=not dry_run)
        if dry_run:
            show_plan(recipe, token, as_json, quiet, stream=stream)
            return
        announce(f"Converting {recipe.model}", quiet)
        quiet = quiet or not is_first()
        report = run_conversion(recipe, output, overwrite, resume, stream, token, quiet)
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
    recipe: Recipe, output: str, overwrite: bool, resume: bool, stream: bool, token: str | None, quiet: bool
) -> Report:
    """Convert, with a bar unless quiet; one process of those that torchrun has started, if it has."""
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
            stream=stream,
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
@option(
    "--time",
    "timed",
    heading="General",
    is_flag=True,
    help="Show how long the conversion takes, from some seconds of its work on this machine.",
)
@option(
    "--disk-speed",
    heading="General",
    type=float,
    metavar="GB/S",
    help="With --time: what the disk reads or writes in a second; by default measured, in the page cache.",
)
@option(
    "--compute-speed",
    heading="General",
    type=float,
    metavar="GFLOP/S",
    help="With --time: float32 operations of one process of another machine; by default this one's.",
)
@RECIPE_OPTIONS
@COMMON
def plan(
    model: str | None,
    processes: int | None,
    timed: bool,
    disk_speed: float | None,
    compute_speed: float | None,
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
        check_shares(processes, timed, disk_speed, compute_speed)
        recipe, _ = request_of(Recipe, options, config, model)
        check_model(recipe.model, recipe.revision)
        check_calibration(recipe)
        check_recipe_first(recipe, whole=False)
        announce(f"Planning {recipe.model}", quiet)
        speeds = (disk_speed, compute_speed) if timed else None
        show_plan(recipe, token, as_json, quiet, processes, speeds)


def check_shares(
    processes: int | None, timed: bool, disk_speed: float | None, compute_speed: float | None
) -> None:
    """Raises RequestError for what `plan` cannot share out or time."""
    from ..planning.shares import check_count, check_speed

    if processes is not None:
        check_count(processes)
    for name, speed in (("disk_speed", disk_speed), ("compute_speed", compute_speed)):
        check_speed(name, speed)
        if speed is not None and not timed:
            raise RequestError(
                f"{called(name)} was given without {switched('time')}; expected both or neither"
            )


def show_plan(
    recipe: Recipe,
    token: str | None,
    as_json: bool,
    quiet: bool,
    processes: int | None = None,
    speeds: tuple[float | None, float | None] | None = None,
    stream: bool = False,
) -> None:
    """Print a plan; `speeds`: of disk (GB/s) and machine (GFLOP/s), None: times are left out."""
    from ..compression.plan import plan as plan_conversion
    from ..planning.shares import plan_shares
    from .progress import conversion_progress, silence_libraries
    from .tables import console

    if recipe.calibrate:
        silence_libraries()
    with conversion_progress(not quiet) as progress:
        result = plan_conversion(recipe, stream=stream, token=token, progress=progress)
    costs = None
    if speeds is not None:
        from ..conversion.times import measure  # torch, which plans of headers do without

        costs = measure(result, *(None if speed is None else speed * 1e9 for speed in speeds))
    is_shared = processes is not None or costs is not None
    shares = plan_shares(result, processes or 1, costs) if is_shared else None
    if as_json:
        echo_json(result.to_json() | (shares.to_json() if shares else {}))
    elif not quiet:
        console().print(*filter(None, (result, shares)), sep="\n")
