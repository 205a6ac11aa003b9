"""`export`."""

from __future__ import annotations

from typing import Any

import click

from ..exports.targets import Export
from ..request import as_text
from ..source.repository import check_model
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
@option("--revision", heading="Source", help="Branch, tag or commit of an artifact on the Hub.")
@token_option("Source")
@options_of(Export)
@COMMON
def export(
    artifact: str,
    output: str,
    overwrite: bool,
    revision: str | None,
    token: str | None,
    as_json: bool,
    quiet: bool,
    verbose: int,
    **options: Any,
) -> None:
    """Write ARTIFACT in a form that needs no custom code.

    Dense again, as a mixture that transformers has, as adapters for PEFT, or as an ONNX graph. Exit code 1
    and no output: there is no exact form, or what was written computes something else.
    """
    with one_line_errors(verbose, quiet):
        request, _ = request_of(Export, options)
        artifact, output = as_text("artifact", artifact), as_text("output", output)
        check_output_first(output, overwrite, quiet)
        check_calibration(request)
        if request.base:
            check_model(request.base, request.base_revision)
        check_artifact_first(artifact, revision)
        announce(f"Exporting {artifact}", quiet)
        from ..exports.export import export as write
        from .progress import export_progress, silence_libraries
        from .tables import console, print_export

        if request.calibrate:
            silence_libraries()
        with export_progress(not quiet) as progress:
            result = write(
                artifact,
                output,
                request,
                overwrite=overwrite,
                revision=revision,
                token=token,
                progress=progress,
            )
    if as_json:
        echo_json(result.to_json())
    elif not quiet:
        print_export(result, output, console())
