"""`finetune` and `evaluate`."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..artifact.layout import read_artifact
from ..ranks import is_first
from ..request import as_text
from ..source.text_options import check_data
from ..training.checkpoints import check_place
from ..training.request import Finetuning, Scoring
from .app import announce, echo_json, one_line_errors
from .checks import check_models_first
from .options import (
    COMMON,
    GroupedCommand,
    config_option,
    option,
    options_of,
    output_option,
    request_of,
    token_option,
)

if TYPE_CHECKING:
    from .progress import TrainingProgress

TYPED = "mpoe_convert.typed"  # where a context keeps the arguments as they were typed


class RepeatableCommand(GroupedCommand):
    """A command that can say how it was called."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[TYPED] = [*args]
        return super().parse_args(ctx, args)


@click.command(cls=RepeatableCommand)
@click.argument("model", required=False)
@output_option()
@option("--resume", heading="Output", is_flag=True, help="Continue from the newest whole checkpoint in it.")
@config_option("Data")
@options_of(Finetuning, skip={"model"}, from_file=True)
@token_option("Data")
@COMMON
def finetune(
    model: str | None,
    output: str | None,
    resume: bool,
    config: str | None,
    token: str | None,
    as_json: bool,
    quiet: bool,
    verbose: int,
    **options: Any,
) -> None:
    """Train a converted (or any) MODEL on texts by transformers' Trainer.

    Several devices: accelerate launch -m mpoe_convert finetune MODEL ...
    """
    with one_line_errors(verbose, quiet):
        run, named = request_of(Finetuning, options, config, model)
        output = output or named
        if not output:
            raise click.UsageError("Missing option '-o' / '--output'.")
        output = as_text("output", output)
        check_place(Path(output), resume)
        check_models_first((run.model, run.teacher, run.tokenizer))
        check_data(run, (*run.data, *run.eval_data))
        announce(f"Fine-tuning {run.model}", quiet)
        run_finetuning(run, output, resume, token, as_json, quiet)


def run_finetuning(
    run: Finetuning, output: str, resume: bool, token: str | None, as_json: bool, quiet: bool
) -> None:
    from .progress import training_progress

    again = continuing_command(click.get_current_context())
    with _told_how_to_go_on(Path(output), again), training_progress(not quiet) as shown:
        report = _train(run, output, resume, token, shown)
    if not is_first():
        return
    if as_json:
        echo_json(report)
    elif not quiet:
        from .tables import console, print_training

        print_training(report, output, console())


def _train(
    run: Finetuning, output: str, resume: bool, token: str | None, shown: TrainingProgress | None
) -> dict:
    if shown is not None:
        shown.watch("loading transformers", 0, 0)
    from ..training.finetune import finetune as train
    from .progress import silence_libraries

    silence_libraries()
    progress, watch = (shown.log, shown.watch) if shown is not None else (None, None)
    return train(run, output, resume=resume, token=token, progress=progress, watch=watch)


@contextmanager
def _told_how_to_go_on(output: Path, again: str) -> Iterator[None]:
    """Say after a signal which checkpoint there is, and which command goes on from it."""
    try:
        yield
    except KeyboardInterrupt as stopped:
        from ..training.checkpoints import find_checkpoint

        number = getattr(stopped, "number", None)
        if number is None:
            if (last := find_checkpoint(output)) is None:
                raise
            raise KeyboardInterrupt(f"{last} is whole. Go on with: {again}") from None
        if is_first():
            click.echo(f"{stopped}. Go on with: {again}", err=True)
        raise SystemExit(128 + number) from None


def continuing_command(ctx: click.Context) -> str:
    """The command that goes on with a run: as it was typed, without a token, and with --resume."""
    if "RANK" in os.environ:
        return "the command that started it, and --resume"
    kept, secret = [], False
    for word in ctx.meta[TYPED]:
        if not secret and word.partition("=")[0] not in ("--token", "--resume"):
            kept.append(word)
        secret = word == "--token"
    return shlex.join([*ctx.command_path.split(), *kept, "--resume"])


@click.command(cls=GroupedCommand)
@click.argument("model")
@options_of(Scoring, skip={"model"})
@token_option("Data")
@COMMON
def evaluate(model: str, token: str | None, as_json: bool, quiet: bool, verbose: int, **options: Any) -> None:
    """Score MODEL on data: perplexity, accuracy, F1, BLEU, chrF, ROUGE-L.

    With 95 % intervals, and those of the paired difference with --against.
    Several processes: torchrun --nproc-per-node 4 -m mpoe_convert evaluate MODEL ...
    """
    with one_line_errors(verbose, quiet):
        request, _ = request_of(Scoring, options, model=model)
        if request.record:
            read_artifact(Path(request.model))
        check_models_first((request.model, request.against, request.tokenizer))
        check_data(request, request.data)
        announce(f"Scoring {model}", quiet)
        from ..training.evaluate import score_models
        from .progress import evaluation_progress, silence_libraries
        from .tables import console, print_evaluation

        silence_libraries()
        with evaluation_progress(not quiet and is_first()) as progress:
            result = score_models(request, distributed=True, token=token, progress=progress)
    if not is_first():
        return
    if as_json:
        echo_json(result.to_json())
    elif not quiet:
        print_evaluation(result, console())
