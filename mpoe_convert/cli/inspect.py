"""`inspect`, `verify`, `report`: of an artifact. `families`, `completion`: of the tool."""

from __future__ import annotations

import sys
from dataclasses import asdict

import click

from .app import announce, echo_json, main, one_line_errors
from .options import COMMON, Choice, GroupedCommand, option, token_option


@click.command(cls=GroupedCommand)
@click.argument("artifact", type=click.Path())
@COMMON
def inspect(artifact: str, as_json: bool, quiet: bool, verbose: int) -> None:
    """Show what an artifact is made of."""
    from ..artifact.inspect import inspect as summarise
    from .tables import console, print_summary

    with one_line_errors(verbose, quiet):
        summary = summarise(artifact)
        if as_json:
            echo_json(summary.to_json())
        elif not quiet:
            print_summary(summary, console())


@click.command(cls=GroupedCommand)
@click.argument("artifact", type=click.Path())
@COMMON
def report(artifact: str, as_json: bool, quiet: bool, verbose: int) -> None:
    """Draw an artifact's errors, sizes, losses and expert load into it.

    PNG and SVG in its folder pictures/, shown by its model card. Losses and load are there after finetune.
    """
    from ..artifact.pictures import draw_pictures
    from .tables import console, print_pictures

    with one_line_errors(verbose, quiet):
        announce(f"Drawing the pictures of {artifact}", quiet)
        written = draw_pictures(artifact)
    if as_json:
        echo_json({"folder": artifact, "pictures": written})
    elif not quiet:
        print_pictures(artifact, written, console())


@click.command(cls=GroupedCommand)
@click.argument("artifact", type=click.Path())
@option(
    "--against",
    heading="Source",
    metavar="MODEL",
    help="Dense model to compare with.  [default: the one it was converted from]",
)
@option(
    "--trust-remote-code",
    heading="Source",
    is_flag=True,
    default=None,
    help="Run the custom code that the dense model brings along.",
)
@token_option("Source")
@option(
    "--tolerance",
    heading="General",
    type=float,
    help="Allowed relative difference of the outputs.  [default: rounding, plus what the report's errors "
    "explain, at most 0.1, or 0.5 if compressed; any after finetune]",
)
@COMMON
def verify(
    artifact: str,
    against: str | None,
    trust_remote_code: bool | None,
    token: str | None,
    tolerance: float | None,
    as_json: bool,
    quiet: bool,
    verbose: int,
) -> None:
    """Compare an artifact's outputs with its dense model's.

    A fresh process without this package loads both as a Hub user would. Exit code 1: they differ.
    After finetune the difference is information. Then it has to load, to be finite and to generate, and its
    reports have to be about its weights.
    """
    from ..artifact.verify import verify as verify_artifact
    from .tables import console, print_verification

    with one_line_errors(verbose, quiet):
        announce(f"Loading {artifact} and its dense model to compare them", quiet)
        result = verify_artifact(
            artifact,
            against=against,
            tolerance=tolerance,
            token=token,
            trust_remote_code=bool(trust_remote_code),
        )
    if as_json:
        echo_json(asdict(result) | {"ok": result.ok, "problems": result.problems()})
    elif not quiet:
        print_verification(result, console())
    sys.exit(0 if result.ok else 1)


@click.command(cls=GroupedCommand)
@COMMON
def families(as_json: bool, quiet: bool, verbose: int) -> None:
    """List the architectures that are supported."""
    from ..source.families import families_json
    from .tables import console, print_families

    if as_json:
        echo_json(families_json())
    elif not quiet:
        print_families(families_json(), console())


@click.command(cls=GroupedCommand)
@click.argument("shell", type=Choice(("bash", "zsh", "fish")))
def completion(shell: str) -> None:
    """Print a script for shell completion.

    For bash: eval "$(mpoe-convert completion bash)"
    """
    from click.shell_completion import get_completion_class

    # The shell is one of the choices, and click has a class for each.
    found = get_completion_class(shell)
    script = found(main, {}, "mpoe-convert", "_MPOE_CONVERT_COMPLETE")  # pyright: ignore[reportOptionalCall]
    click.echo(script.source())
