"""The command `mpoe-convert`: its help, what signals do, and errors in one line with an exit code."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
from click.shell_completion import CompletionItem

from .. import __version__
from ..errors import MachineError, MpoeError, RequestError, nearest
from ..options import named_by_flags
from ..ranks import is_first
from .options import format_options_by_heading

if TYPE_CHECKING:
    from types import FrameType

EXAMPLE = """\
mpoe-convert gpt2 --experts 8 --bond-dim 64 -o out/
mpoe-convert plan gpt2 --layout balanced
mpoe-convert verify out/
"""


class ConvertByDefault(click.Group):
    """A group whose first argument, if it names no command, is the model for `convert`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own = {name for param in self.get_params(ctx) for name in param.opts}
        if args and args[0] not in self.commands and args[0] not in own:
            self._refuse_misspelled(ctx, args)
            args = ["convert", *args]
        return super().parse_args(ctx, args)

    def _refuse_misspelled(self, ctx: click.Context, args: list[str]) -> None:
        """Raises UsageError for the name of no folder that is nearly a command's and stands like one.

        A conversion takes one word, and an output or a dry run.
        """
        meant = nearest(args[0], self.commands, alike=0.8)
        has_output = any(name in args for name in ("-o", "--output", "--dry-run", "--config"))
        is_alone = len(args) == 1 or args[1].startswith("-")
        if meant and not os.path.exists(args[0]) and not (has_output and is_alone):
            ctx.fail(f"No such command {args[0]!r}. Did you mean {meant!r}?")

    def invoke(self, ctx: click.Context) -> Any:
        with handle_signals():
            return super().invoke(ctx)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        return [*super().shell_complete(ctx, incomplete), CompletionItem(incomplete, type="dir")]

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(ctx.command_path, "MODEL -o OUTPUT [OPTIONS]")
        formatter.write_usage(ctx.command_path, "COMMAND [ARGS]...", prefix="   or: ")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands (MODEL without one converts it)"):
            formatter.write_dl(
                [(name, command.get_short_help_str(80)) for name, command in self.commands.items()]
            )
        format_options_by_heading(self.commands["convert"], ctx, formatter)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Examples"):
            for line in EXAMPLE.splitlines():
                formatter.write(f"{'':>{formatter.current_indent}}{line}\n")


def announce(what: str, quiet: bool) -> None:
    """Say on a terminal what begins, before libraries that take seconds are imported; once per run."""
    if not quiet and sys.stderr.isatty() and is_first():
        click.echo(f"{what} …", err=True)


@contextmanager
def one_line_errors(verbose: int, quiet: bool) -> Iterator[None]:
    """The one place that turns errors into a line and an exit code: 1, or 2 for a bad request.

    Of several processes of a run the first one speaks: they meet the same errors, but for those of a machine.
    """
    if quiet or not sys.stderr.isatty():  # read by huggingface_hub when it is imported
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        with named_by_flags():
            yield
    except MpoeError as error:
        if _STOPPED_BY:  # an interrupt that came out as something else
            raise KeyboardInterrupt from error
        if verbose > 1:
            traceback.print_exc()
        if is_first() or (isinstance(error, MachineError) and not error.is_told):
            click.echo(f"Error: {' '.join(str(error).split())}", err=True)
        sys.exit(2 if isinstance(error, RequestError) else 1)


# The signals that have stopped this run.
_STOPPED_BY: list[int] = []


@contextmanager
def handle_signals() -> Iterator[None]:
    """A run that is interrupted, terminated or hung up cleans up and exits with 128 + the signal.

    Another signal does not disturb the cleaning up. Signals that the caller ignores (nohup) stay so. While a
    command imports what it needs there is nothing to clean up: it ends at once, because an exception can be
    lost inside an import.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        _STOPPED_BY.append(number)
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        if _command_imports(frame):
            end_at_once(number)
        raise KeyboardInterrupt

    _STOPPED_BY.clear()
    numbers = [getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP")]
    before = {n: signal.getsignal(n) for n in numbers if n and signal.getsignal(n) != signal.SIG_IGN}
    if threading.current_thread() is not threading.main_thread():
        before = {}
    try:
        for number in before:
            signal.signal(number, stop)
        yield
    except KeyboardInterrupt as stopped:
        sys.exit(_say_stopped(str(stopped) or "no output was written"))
    except Exception:  # libraries may turn an interrupt into an error of their own
        if not _STOPPED_BY:
            raise
        sys.exit(_say_stopped("no output was written"))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_at_once(number: int) -> NoReturn:
    """End in one line by a signal that comes while nothing has been begun."""
    shown = "\r\x1b[K\x1b[?25h" if os.isatty(2) else ""  # a bar has its line, and hides the cursor
    os.write(2, f"{shown}{_stopped(number, 'no output was written')}\n".encode())
    os._exit(128 + number)


def _stopped(number: int, left: str) -> str:
    return f"Stopped by {signal.Signals(number).name}; {left}."


def _say_stopped(left: str) -> int:
    """Tell what stopped the run, and what it leaves; the exit code."""
    number = (_STOPPED_BY or [signal.SIGINT])[0]
    if is_first():
        click.echo(_stopped(number, left), err=True)
    return 128 + number


def _command_imports(frame: FrameType | None) -> bool:
    """Whether the code that was interrupted runs inside an import statement of a command itself."""
    outermost = None
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            outermost = frame
        frame = frame.f_back
    while outermost is not None and outermost.f_code.co_filename.startswith("<frozen importlib"):
        outermost = outermost.f_back
    return outermost is not None and Path(outermost.f_code.co_filename).parent == Path(__file__).parent


def echo_json(value: object) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


@click.group(
    cls=ConvertByDefault, context_settings={"help_option_names": ["-h", "--help"]}, no_args_is_help=True
)
@click.version_option(__version__, package_name="mpoe-convert", prog_name="mpoe-convert")
def main() -> None:
    """Turn a pretrained dense transformer into a mixture of experts that share most of their parameters.

    MODEL is a Hub id or a local folder. Every feed-forward weight becomes a chain of cores (a matrix
    product operator): the big central core is stored once, the small outer ones once per expert.
    """
