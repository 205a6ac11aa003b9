"""`prune`."""

from __future__ import annotations

from typing import Any

import click

from ..pruning.request import Pruning
from ..request import as_text
from ..source.text_options import check_calibration
from .app import announce, echo_json, one_line_errors
from .checks import check_artifact_first, check_output_first
from .options import COMMON, GroupedCommand, option, options_of, output_option, request_of, token_option


@click.command(cls=GroupedCommand)
@click.argument("artifact")
@output_option(required=True)
@option(
    "--overwrite", heading="Output", is_flag=True, help="Replace an export or artifact that is already there."
)
@token_option("Source")
@options_of(Pruning)
@COMMON
def prune(
    artifact: str,
    output: str,
    overwrite: bool,
    token: str | None,
    as_json: bool,
    quiet: bool,
    verbose: int,
    **options: Any,
) -> None:
    """Write ARTIFACT with fewer experts, without training.

    Those that are left stay as they are, and the routers keep their rows. What it costs is measured on
    held-out text.
    """
    with one_line_errors(verbose, quiet):
        request, _ = request_of(Pruning, options)
        artifact, output = as_text("artifact", artifact), as_text("output", output)
        check_output_first(output, overwrite, quiet)
        check_calibration(request)
        check_artifact_first(artifact)
        announce(f"Pruning {artifact}", quiet)
        from ..pruning.prune import prune as write
        from .progress import export_progress, silence_libraries
        from .tables import console, print_pruning

        silence_libraries()
        with export_progress(not quiet) as progress:
            result = write(artifact, output, request, overwrite=overwrite, token=token, progress=progress)
    if as_json:
        echo_json(result.to_json())
    elif not quiet:
        print_pruning(result, output, console())
