"""`push`, and pushing what a conversion wrote."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import click

from ..errors import HubError
from .app import announce, echo_json, one_line_errors
from .options import COMMON, GroupedCommand, add, option, token_option

PUSH_OPTIONS = add(
    option("--private", heading="Hub", is_flag=True, help="Make the repository private, if it is new."),
    option("--create-pr", heading="Hub", is_flag=True, help="Open a pull request instead of committing."),
    option("--branch", heading="Hub", help="Branch to commit to; it is made if it is new.  [default: main]"),
    option(
        "--commit-message",
        heading="Hub",
        metavar="TEXT",
        help="First line of the commit.  [default: what was converted, and by which version]",
    ),
)
PUSH_NAMES = ("private", "create_pr", "branch", "commit_message")


@click.command(cls=GroupedCommand)
@click.argument("artifact", type=click.Path())
@click.argument("repo_id", metavar="USER/NAME")
@PUSH_OPTIONS
@option(
    "--overwrite",
    heading="Hub",
    is_flag=True,
    help="Commit over a repository that holds something else; files that are not replaced stay.",
)
@token_option("Hub")
@COMMON
def push(
    artifact: str,
    repo_id: str,
    overwrite: bool,
    token: str | None,
    as_json: bool,
    quiet: bool,
    verbose: int,
    **pushing: Any,
) -> None:
    """Push an artifact to a repository on the Hub.

    The repository is made if it is new. Only the artifact's own files go, in one commit. A push that failed
    goes on when it is repeated.
    """
    with one_line_errors(verbose, quiet):
        try:
            pushed = run_push(artifact, repo_id, pushing, overwrite, token, as_json or quiet)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("run it again to go on") from None
        if as_json:
            echo_json(pushed)


def check_push(repo_id: str | None, pushing: Mapping[str, Any], overwrite: bool, token: str | None) -> None:
    """Before a conversion: whether its result could be pushed."""
    if repo_id is None:
        given = [name.replace("_", "-") for name, value in pushing.items() if value]
        if given:
            raise click.UsageError(f"--{given[0]} belongs to --push-to-hub USER/NAME, which is not given.")
        return
    from ..artifact.destination import Destination, check_destination

    options = {name: value for name, value in pushing.items() if name != "commit_message"}
    check_destination(Destination(repo_id, overwrite=overwrite, **options), token)


def run_push(
    artifact: str, repo_id: str, pushing: Mapping[str, Any], overwrite: bool, token: str | None, silent: bool
) -> dict[str, Any]:
    announce(f"Pushing '{artifact}' to {repo_id}", silent)
    from ..artifact.push import push as push_artifact
    from .progress import silence_hub
    from .tables import console, print_push

    silence_hub()
    pushed = push_artifact(artifact, repo_id, overwrite=overwrite, token=token, **pushing)
    if not silent:
        print_push(pushed, console())
    return asdict(pushed)


@contextmanager
def resumable_push(output: str, repo_id: str, pushing: Mapping[str, Any], overwrite: bool) -> Iterator[None]:
    """When a push behind a conversion ends early, say that the artifact is there and how to go on."""
    words = ["mpoe-convert", "push", output, repo_id]
    for name, value in {**pushing, "overwrite": overwrite}.items():
        if value:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [value])]
    left = f"the artifact is in '{output}', go on with: {shlex.join(words)}"
    try:
        yield
    except HubError as error:
        raise HubError(f"{error}; {left}") from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(left) from None
