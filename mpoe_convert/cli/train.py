"""`finetune` and `evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..artifact.layout import read_artifact
from ..source.texts import check_sources
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


@click.command(cls=GroupedCommand)
@click.argument("model", required=False)
@output_option()
@option("--resume", heading="Output", is_flag=True, help="Continue from the last checkpoint in it.")
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
        check_models_first((run.model, run.teacher, run.tokenizer))
        check_sources((*run.data, *run.eval_data))
        announce(f"Fine-tuning {run.model}", quiet)
        run_finetuning(run, output, resume, token, as_json, quiet)


def run_finetuning(
    run: Finetuning, output: str, resume: bool, token: str | None, as_json: bool, quiet: bool
) -> None:
    from ..training.finetune import finetune as train
    from .progress import is_main_process, silence_libraries, training_progress
    from .tables import console, print_training

    silence_libraries()
    try:
        with training_progress(not quiet) as progress:
            report = train(run, output, resume=resume, token=token, progress=progress)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"checkpoints in {output}, if any, are continued with --resume") from None
    if not is_main_process():
        return
    if as_json:
        echo_json(report)
    elif not quiet:
        print_training(report, output, console())


@click.command(cls=GroupedCommand)
@click.argument("model")
@options_of(Scoring, skip={"model"})
@token_option("Data")
@COMMON
def evaluate(model: str, token: str | None, as_json: bool, quiet: bool, verbose: int, **options: Any) -> None:
    """Score MODEL on data: perplexity, accuracy, exact match, BLEU, ROUGE.

    With 95 % bootstrap intervals, and those of the paired difference with --against.
    """
    with one_line_errors(verbose, quiet):
        request, _ = request_of(Scoring, options, model=model)
        if request.record:
            read_artifact(Path(model))
        check_models_first((model, request.against, request.tokenizer))
        check_sources(request.data)
        announce(f"Scoring {model}", quiet)
        from ..training.evaluate import score_models
        from .progress import evaluation_progress, silence_libraries
        from .tables import console, print_evaluation

        silence_libraries()
        with evaluation_progress(not quiet) as progress:
            result = score_models(request, token=token, progress=progress)
    if as_json:
        echo_json(result.to_json())
    elif not quiet:
        print_evaluation(result, console())
