"""The command line: parse, one library call, render."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from importlib.util import find_spec

import click
from click.shell_completion import CompletionItem

from . import __version__
from .decomposition import SVDS
from .decomposition.sites import LAYOUTS
from .errors import HubError, MpoeError, RecipeError, RunError
from .experts import KINDS
from .exports.targets import TARGETS, Export
from .extras import need
from .planning.recipe import (
    ALLOCATIONS,
    BIASES,
    DTYPES,
    GAUGES,
    METRICS,
    NEURON_ORDERS,
    Recipe,
    normalised,
    read_recipe,
)
from .source.texts import TASKS
from .training.request import PRECISIONS, Finetuning
from .training.roles import FROZEN, UNITS

EXAMPLE = """\
mpoe-convert gpt2 --experts 8 --bond-dim 64 -o out/
mpoe-convert plan gpt2 --layout balanced
mpoe-convert verify out/
"""
DEFAULTS = {
    field.name: field.default
    for field in (*fields(Recipe), *fields(Finetuning), *fields(Export))
    if field.default is not MISSING
}


# ---------------------------------------------------------------------------------------------------
# Click: option groups in --help, and a command that needs no name


class GroupedOption(click.Option):
    """An option that `--help` lists under a heading."""

    def __init__(self, *args, heading: str = "General", **kwargs):
        super().__init__(*args, **kwargs)
        self.heading = heading


def format_options_by_heading(command: click.Command, ctx: click.Context, formatter) -> None:
    """Write one definition list per heading, in the order of first appearance."""
    headings: dict[str, list] = {}
    for param in command.get_params(ctx):
        record = None if isinstance(param, click.Argument) else param.get_help_record(ctx)
        if record:
            headings.setdefault(getattr(param, "heading", "General"), []).append(record)
    for heading, records in headings.items():
        with formatter.section(heading):
            formatter.write_dl(records)


class GroupedCommand(click.Command):
    def format_options(self, ctx, formatter):
        format_options_by_heading(self, ctx, formatter)


class ConvertByDefault(click.Group):
    """A group whose first argument, if it names no command, is the model for `convert`."""

    def parse_args(self, ctx, args):
        own = {name for param in self.get_params(ctx) for name in param.opts}
        if args and args[0] not in self.commands and args[0] not in own:
            args = ["convert", *args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx):
        with stopped_once():
            return super().invoke(ctx)

    def shell_complete(self, ctx, incomplete):
        return [*super().shell_complete(ctx, incomplete), CompletionItem(incomplete, type="dir")]

    def format_usage(self, ctx, formatter):
        formatter.write_usage(ctx.command_path, "MODEL -o OUTPUT [OPTIONS]")
        formatter.write_usage(ctx.command_path, "COMMAND [ARGS]...", prefix="   or: ")

    def format_options(self, ctx, formatter):
        with formatter.section("Commands (MODEL without one converts it)"):
            formatter.write_dl(
                [(name, command.get_short_help_str(80)) for name, command in self.commands.items()]
            )
        format_options_by_heading(self.commands["convert"], ctx, formatter)

    def format_epilog(self, ctx, formatter):
        with formatter.section("Examples"):
            for line in EXAMPLE.splitlines():
                formatter.write(f"{'':>{formatter.current_indent}}{line}\n")


# ---------------------------------------------------------------------------------------------------
# Shared options. None means "not given": the recipe file, then the default of Recipe, decides.


def option(*names: str, heading: str, help: str, **kwargs) -> Callable:
    default = DEFAULTS.get(names[-1].lstrip("-").replace("-", "_"))
    if default is not None and default != ():
        help = f"{help}  [default: {default}]"
    return click.option(*names, cls=GroupedOption, heading=heading, help=help, **kwargs)


def calibration_text_options(heading: str) -> tuple[Callable, ...]:
    """Which part of the data of --calibrate is read, and where in them."""
    return (
        option("--calibration-tokens", heading=heading, type=int, help="How many of its tokens."),
        option("--calibration-split", heading=heading, help="Split of Hub datasets."),
        option("--text-column", heading=heading, help="Column with the text."),
        option(
            "--target-column",
            heading=heading,
            help="Column with the target text, of encoder-decoders, or the answer to a text, of models that say the next token.",
        ),
    )


def trust_option(help: str, heading: str = "Source") -> Callable:
    return option("--trust-remote-code", heading=heading, is_flag=True, default=None, help=help)


RECIPE_OPTIONS = (
    option("--revision", heading="Source", help="Branch, tag or commit of a Hub model."),
    trust_option("Run code of its own that the source has; it goes into the artifact."),
    option(
        "--ffn",
        heading="Source",
        help='Where the FFNs are, for families outside the table: "layers.{}.mlp:gate_proj,up_proj,down_proj".',
    ),
    option(
        "--layers",
        heading="Source",
        help="Layer numbers to convert, such as 0-5,8; the rest stays dense.",
    ),
    option(
        "--include",
        heading="Source",
        multiple=True,
        metavar="GLOB",
        help="Convert only FFNs whose name matches, such as 'decoder.*'. Repeatable.",
    ),
    option(
        "--exclude",
        heading="Source",
        multiple=True,
        metavar="GLOB",
        help="Leave FFNs whose name matches dense. Repeatable.",
    ),
    option("--experts", heading="Experts", type=int, help="Experts per FFN."),
    option("--top-k", heading="Experts", type=int, help="Experts chosen per token."),
    option(
        "--kind",
        heading="Experts",
        type=click.Choice(KINDS),
        help="What an expert is made of: cores around a shared one, a whole copy, a low-rank matrix beside a shared whole one, or an adapter behind a shared FFN.",
    ),
    option(
        "--noise",
        heading="Experts",
        type=float,
        help="Perturbation of experts 1.. relative to each core's scale; 0: exact clones. Of --kind mpo and dense.",
    ),
    option(
        "--bias",
        heading="Experts",
        type=click.Choice(BIASES),
        help="Biases once or per expert.  [default: shared; per-expert for dense]",
    ),
    option("--seed", heading="Experts", type=int, help="Seed of the perturbation and the router."),
    option(
        "--bond-dim",
        heading="Decomposition",
        metavar="INT|LIST",
        help="Upper limit of the bonds: a number, or one per bond, as 12,64,64,16. Of --kind low-rank: the rank; of --kind adapter: its width.",
    ),
    option(
        "--layout",
        heading="Decomposition",
        type=click.Choice(LAYOUTS),
        help="How a matrix is split; one-sided and two-sided are exact at any bond limit, balanced is truncated by it.",
    ),
    option(
        "--sites",
        heading="Decomposition",
        type=int,
        help="Cores per chain, odd.  [default: 3; balanced: 5]",
    ),
    option(
        "--factors",
        heading="Decomposition",
        metavar="LISTxLIST",
        help="Site sizes by hand, hidden x inner: 3,4,4,4,4x4,4,8,6,4.",
    ),
    option(
        "--svd",
        heading="Decomposition",
        type=click.Choice(SVDS),
        help="How singular vectors are computed.",
    ),
    option(
        "--gauge",
        heading="Decomposition",
        type=click.Choice(GAUGES),
        help="Where the shared centre stands: TT-SVD's orthogonality centre, or the matrix itself between identities.",
    ),
    option(
        "--neuron-order",
        heading="Decomposition",
        type=click.Choice(NEURON_ORDERS),
        help="Where bonds are cut: put hidden neurons that look alike next to each other if that loses less, or leave them as in the source.",
    ),
    option("--device", heading="Decomposition", help="auto, cpu, cuda, cuda:N or mps."),
    option(
        "--dtype",
        heading="Output",
        type=click.Choice(DTYPES),
        help="Dtype of the stored tensors.  [default: as in the source]",
    ),
    option("--max-shard-size", heading="Output", metavar="SIZE", help="Largest weight file."),
    option(
        "--keep",
        heading="Compression",
        type=float,
        help="Numbers that the FFNs may store, all experts included, as a share of the dense FFNs': 0.6.",
    ),
    option(
        "--max-error",
        heading="Compression",
        type=float,
        help="Largest relative error of a matrix in the metric; alone: as small as that allows.",
    ),
    option(
        "--allocation",
        heading="Compression",
        type=click.Choice(ALLOCATIONS),
        help="How ranks are shared out under --keep: least expected change of the loss, the same as measured by cutting every matrix alone, least squared relative error, or the same share of every matrix.  [default: loss with --metric loss, else energy]",
    ),
    option(
        "--metric",
        heading="Compression",
        type=click.Choice(METRICS),
        help="What a compressed matrix, or a chain whose bonds are cut, is to be near in: its outputs on the calibration text as the model's loss weighs them (gradients, the whole model in memory), its outputs, its inputs' sizes, or its weights.  [default: loss with --calibrate (outputs for chains that --bond-dim cuts), else weights]",
    ),
    option(
        "--correct",
        heading="Compression",
        is_flag=True,
        default=None,
        help="Fit every matrix behind those that are compressed already to the dense model's outputs.",
    ),
    option(
        "--search",
        heading="Compression",
        is_flag=True,
        default=None,
        help="Of --metric loss and outputs, each with its own --allocation, measured and uniform, with and without --correct, as far as they are left open: write all, compare them with the dense model on calibration text, and keep the nearest.",
    ),
    option(
        "--calibrate",
        heading="Compression",
        multiple=True,
        metavar="FILE|ID",
        help="Calibration text: files or Hub datasets as for finetune, or builtin (Python's language reference). Repeatable.",
    ),
    *calibration_text_options("Compression"),
)


def token_option(heading: str) -> Callable:
    return option(
        "--token", heading=heading, envvar="HF_TOKEN", help="Hub token; by default the stored login."
    )


SOURCE_OPTIONS = (
    option(
        "--config",
        heading="Source",
        type=click.Path(dir_okay=False),
        help="Recipe file (YAML) with the same names, output included; the command line wins.",
    ),
    token_option("Source"),
)
COMMON_OPTIONS = (
    option(
        "--json",
        "as_json",
        heading="General",
        is_flag=True,
        help="Print one JSON document on stdout and nothing else there.",
    ),
    option("-q", "--quiet", heading="General", is_flag=True, help="Print no tables and no progress."),
    option(
        "-v",
        "--verbose",
        heading="General",
        count=True,
        help="One line per matrix in the final table instead of one per layer; twice: tracebacks of errors.",
    ),
)

PUSH_OPTIONS = (
    option("--private", heading="Hub", is_flag=True, help="Make the repository private, if it is made."),
    option("--create-pr", heading="Hub", is_flag=True, help="Open a pull request instead of committing."),
    option(
        "--branch",
        heading="Hub",
        help="Branch to commit to, made if it is not there.  [default: main]",
    ),
    option(
        "--commit-message",
        heading="Hub",
        metavar="TEXT",
        help="First line of the commit.  [default: what was converted, and by which version]",
    ),
)
PUSH_NAMES = ("private", "create_pr", "branch", "commit_message")
COLUMN_OPTIONS = (
    option("--text-column", heading="Data", help="Column with the text."),
    option("--target-column", heading="Data", help="Column with the target text, for seq2seq."),
    option("--label-column", heading="Data", help="Column with the class, for classification."),
    option(
        "--routed-by",
        heading="Data",
        metavar="COLUMN",
        help="Column that names the row's task: the routers choose by task, not by token.",
    ),
    option(
        "--task",
        heading="Data",
        type=click.Choice(TASKS),
        help="What to train.  [default: what the model's head is for]",
    ),
    option(
        "--tokenizer",
        heading="Data",
        metavar="MODEL",
        help="Folder or Hub id of the tokenizer.  [default: the model's]",
    ),
)
FINETUNING_OPTIONS = (
    option(
        "--data",
        heading="Data",
        multiple=True,
        metavar="FILE|ID",
        help="Text (.txt), rows (.jsonl, .csv, .tsv, .parquet), or a Hub dataset as owner/name[:subset]. Repeatable.",
    ),
    option(
        "--eval-data",
        heading="Data",
        multiple=True,
        metavar="FILE|ID",
        help="The same, to evaluate on; the best checkpoint is kept.",
    ),
    option("--split", heading="Data", help="Split of Hub datasets."),
    option("--eval-split", heading="Data", help="Split of Hub datasets to evaluate on."),
    *COLUMN_OPTIONS,
    option(
        "--length",
        heading="Data",
        type=int,
        help="Tokens per example.  [default: the model's limit, at most 512]",
    ),
    option(
        "--steps",
        heading="Training",
        type=int,
        help="Optimizer's steps.  [default: as many as --epochs take]",
    ),
    option("--epochs", heading="Training", type=float, help="Passes over the data."),
    option("--batch-size", heading="Training", type=int, help="Examples per device and pass."),
    option("--accumulate", heading="Training", type=int, help="Passes per step."),
    option("--learning-rate", heading="Training", type=float, help="Peak learning rate."),
    option("--central-lr", heading="Training", type=float, help="Factor on it for central tensors."),
    option(
        "--auxiliary-lr",
        heading="Training",
        type=float,
        help="Factor on it for auxiliary tensors.  [default: 1; for --kind low-rank and adapter 3]",
    ),
    option("--router-lr", heading="Training", type=float, help="Factor on it for routers."),
    option("--weight-decay", heading="Training", type=float, help="Of matrices but routers."),
    option(
        "--schedule", heading="Training", help="Learning rate over the steps, a scheduler of transformers."
    ),
    option(
        "--warmup",
        heading="Training",
        type=float,
        help="Steps, or below 1 the share of the steps, to reach the peak.",
    ),
    option("--max-grad-norm", heading="Training", type=float, help="Clip the norm of all gradients."),
    option(
        "--skip-centre",
        heading="Training",
        type=float,
        help="MPOE's gradient mask: probability that central tensors sit a step out.",
    ),
    option("--skip-unit", heading="Training", type=click.Choice(UNITS), help="What is drawn for."),
    option(
        "--freeze",
        heading="Training",
        multiple=True,
        type=click.Choice(FROZEN),
        help="What is not trained. Repeatable.",
    ),
    option("--precision", heading="Training", type=click.Choice(PRECISIONS), help="Of the computation."),
    option("--seed", heading="Training", type=int, help="Seed of everything."),
    option(
        "--option",
        "options",
        heading="Training",
        multiple=True,
        metavar="NAME=VALUE",
        help="Option of the model's config, such as router_aux_loss_coef=0.02. Repeatable.",
    ),
    option(
        "--set",
        "arguments",
        heading="Training",
        multiple=True,
        metavar="NAME=VALUE",
        help="Any field of transformers.TrainingArguments. Repeatable.",
    ),
    option(
        "--teacher", heading="Distillation", metavar="MODEL", help="Dense model to distil from (healing)."
    ),
    option(
        "--teacher-weight",
        heading="Distillation",
        type=float,
        help="Weight of the teacher's part of the loss, below 1.",
    ),
    option("--temperature", heading="Distillation", type=float, help="Of both softmaxes."),
    option(
        "--hidden-weight",
        heading="Distillation",
        type=float,
        help="Weight of the hidden states' relative squared difference.",
    ),
    option(
        "--eval-every",
        heading="Progress",
        type=int,
        help="Steps between evaluations.  [default: as --save-every]",
    ),
    option("--save-every", heading="Progress", type=int, help="Steps between checkpoints."),
    option("--log-every", heading="Progress", type=int, help="Steps between lines of the log."),
    option(
        "--report-to",
        heading="Progress",
        multiple=True,
        metavar="NAME",
        help="Tracker, such as tensorboard or wandb. Repeatable.",
    ),
)


def add(*options: Callable) -> Callable:
    """One decorator out of several options, listed by --help in this order."""

    def decorate(function):
        for each in reversed(options):
            function = each(function)
        return function

    return decorate


def make_recipe(model: str | None, config: str | None, options: dict) -> tuple[Recipe, str | None]:
    """(recipe, output) of the recipe file, overridden by what the command line gives."""
    values = normalised(read_recipe(config)) if config else {}
    output = values.pop("output", None)
    given = {name: value for name, value in options.items() if value not in (None, ())}
    if model is not None:
        if values.get("model") not in (None, model):
            values.pop("revision", None)  # the recipe's commit belongs to the recipe's model
        given["model"] = model
    if not (values | given).get("model"):
        raise click.UsageError("Missing argument 'MODEL'.")
    return Recipe.from_mapping(values | given), output


@contextmanager
def told_in_one_line(verbose: int, quiet: bool) -> Iterator[None]:
    """The one place that turns errors into a line and an exit code: 1, or 2 for a bad request."""
    if quiet or not sys.stderr.isatty():  # read by huggingface_hub when it is imported
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        yield
    except MpoeError as error:
        if verbose > 1:
            traceback.print_exc()
        click.echo(f"Error: {' '.join(str(error).split())}", err=True)
        sys.exit(2 if isinstance(error, (RecipeError, RunError)) else 1)


@contextmanager
def stopped_once() -> Iterator[None]:
    """A run that is interrupted, terminated or hung up cleans up and exits with 128 + the signal.

    Another signal does not disturb the cleaning up. Signals that the caller ignores (nohup) stay so.
    """

    def stop(number, frame):
        nonlocal stopped_by
        stopped_by = number
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    stopped_by = signal.SIGINT
    numbers = [getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP")]
    before = {n: signal.getsignal(n) for n in numbers if n and signal.getsignal(n) != signal.SIG_IGN}
    if threading.current_thread() is not threading.main_thread():
        before = {}
    try:
        for number in before:
            signal.signal(number, stop)
        yield
    except KeyboardInterrupt as stopped:
        left = str(stopped) or "no output was written"
        click.echo(f"Stopped by {signal.Signals(stopped_by).name}; {left}.", err=True)
        sys.exit(128 + stopped_by)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def echo_json(value: object) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


# ---------------------------------------------------------------------------------------------------
# Commands


@click.group(
    cls=ConvertByDefault,
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
)
@click.version_option(__version__, package_name="mpoe-convert", prog_name="mpoe-convert")
def main() -> None:
    """Turn a pretrained dense transformer into a mixture of experts that share most of their parameters.

    MODEL is a Hub id or a local folder. Every feed-forward weight becomes a chain of cores (a matrix
    product operator): the big central core is stored once, the small outer ones once per expert.
    """


@main.command(cls=GroupedCommand)
@click.argument("model", required=False)
@add(
    option("-o", "--output", heading="Output", type=click.Path(), help="Folder to write."),
    option(
        "--overwrite",
        heading="Output",
        is_flag=True,
        help="Replace an artifact that is already there. With --push-to-hub also: commit over a repository that holds something else.",
    ),
    option(
        "--dry-run",
        heading="Output",
        is_flag=True,
        help="Show the plan and write nothing, like the command plan.",
    ),
    option(
        "--push-to-hub",
        "repo_id",
        heading="Hub",
        metavar="USER/NAME",
        help="Push the artifact to this repository; what can be checked there is checked first.",
    ),
    *PUSH_OPTIONS,
    *SOURCE_OPTIONS,
    *RECIPE_OPTIONS,
    *COMMON_OPTIONS,
)
def convert(
    model, output, overwrite, dry_run, repo_id, config, token, as_json, quiet, verbose, **options
) -> None:
    """Convert MODEL (the command's name may be left out)."""
    with told_in_one_line(verbose, quiet):
        pushing = {name: options.pop(name) for name in PUSH_NAMES}
        recipe, named = make_recipe(model, config, options)
        output = output or named
        if not (output or dry_run):
            raise click.UsageError("Missing option '-o' / '--output' (or use --dry-run).")
        check_push(repo_id, pushing, overwrite, token)
        if dry_run:
            show_plan(recipe, token, as_json, quiet)
            return
        report = run_conversion(recipe, output, overwrite, token, quiet)
        if not (as_json or quiet):
            show_conversion(report, output, verbose)
        pushed = {}
        if repo_id:
            with naming_what_is_left(output, repo_id, pushing, overwrite):
                pushed = {"pushed": run_push(output, repo_id, pushing, overwrite, token, as_json or quiet)}
        if as_json:
            echo_json(report.to_json() | pushed)


def run_conversion(recipe, output, overwrite, token, quiet):
    from . import render
    from .conversion.convert import convert as convert_checkpoint

    keep_calibration_quiet(recipe)
    with render.progress_bar(render.console(stderr=True), not quiet) as progress:
        return convert_checkpoint(recipe, output, overwrite=overwrite, token=token, progress=progress)


def show_conversion(report, output, verbose) -> None:
    from . import render

    render.print_report(report, output, render.console(), per_matrix=verbose > 0)


@main.command(cls=GroupedCommand)
@click.argument("artifact", type=click.Path())
@click.argument("repo_id", metavar="USER/NAME")
@add(
    *PUSH_OPTIONS,
    option(
        "--overwrite",
        heading="Hub",
        is_flag=True,
        help="Commit over a repository that holds something else; files that are not replaced stay.",
    ),
    token_option("Hub"),
    *COMMON_OPTIONS,
)
def push(artifact, repo_id, overwrite, token, as_json, quiet, verbose, **pushing) -> None:
    """Push an artifact to a repository of the Hub, which is made if need be.

    Only its own files, in one commit. A push that failed goes on when it is repeated.
    """
    with told_in_one_line(verbose, quiet):
        try:
            pushed = run_push(artifact, repo_id, pushing, overwrite, token, as_json or quiet)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("run it again to go on") from None
        if as_json:
            echo_json(pushed)


def check_push(repo_id, pushing, overwrite, token) -> None:
    """Before a conversion: whether its result could be pushed."""
    if repo_id is None:
        given = [name.replace("_", "-") for name, value in pushing.items() if value]
        if given:
            raise click.UsageError(f"--{given[0]} belongs to --push-to-hub USER/NAME, which is not given.")
        return
    from .artifact.destination import Destination, check_destination

    options = {name: value for name, value in pushing.items() if name != "commit_message"}
    check_destination(Destination(repo_id, overwrite=overwrite, **options), token)


def run_push(artifact, repo_id, pushing, overwrite, token, silent) -> dict:
    from dataclasses import asdict

    from . import render
    from .artifact.push import push as push_artifact

    render.quiet_hub()
    pushed = push_artifact(artifact, repo_id, overwrite=overwrite, token=token, **pushing)
    if not silent:
        render.print_push(pushed, render.console())
    return asdict(pushed)


@contextmanager
def naming_what_is_left(output: str, repo_id: str, pushing: dict, overwrite: bool) -> Iterator[None]:
    """When a push behind a conversion ends early, say that the artifact is there and how to go on."""
    words = ["mpoe-convert", "push", output, repo_id]
    for name, value in {**pushing, "overwrite": overwrite}.items():
        if value:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [value])]
    left = f"the artifact is in {output}, go on with: {shlex.join(words)}"
    try:
        yield
    except HubError as error:
        raise HubError(f"{error}; {left}") from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(left) from None


def keep_calibration_quiet(recipe: Recipe) -> None:
    """The libraries that calibration uses keep quiet."""
    if recipe.calibrate and find_spec("datasets"):
        from . import render

        render.quiet_libraries()


@main.command(cls=GroupedCommand)
@click.argument("model", required=False)
@add(*SOURCE_OPTIONS, *RECIPE_OPTIONS, *COMMON_OPTIONS)
def plan(model, config, token, as_json, quiet, verbose, **options) -> None:
    """Show what a conversion would do; nothing is written.

    Sites, bonds, parameters, bytes, weight files and peak memory, from the headers alone; with --keep or
    --max-error the weights are read, and calibrated with --calibrate.
    """
    with told_in_one_line(verbose, quiet):
        recipe, _ = make_recipe(model, config, options)
        show_plan(recipe, token, as_json, quiet)


def show_plan(recipe: Recipe, token: str | None, as_json: bool, quiet: bool) -> None:
    from . import render
    from .compression.prepare import plan as plan_conversion

    keep_calibration_quiet(recipe)
    with render.progress_bar(render.console(stderr=True), not quiet) as progress:
        result = plan_conversion(recipe, token=token, progress=progress)
    if as_json:
        echo_json(render.plan_json(result))
    elif not quiet:
        render.print_plan(result, render.console())


@main.command(cls=GroupedCommand)
@click.argument("artifact", type=click.Path())
@add(*COMMON_OPTIONS)
def inspect(artifact, as_json, quiet, verbose) -> None:
    """Show what an artifact is made of."""
    from . import render
    from .artifact.inspect import inspect as summarise

    with told_in_one_line(verbose, quiet):
        summary = summarise(artifact)
        if as_json:
            echo_json(summary.to_json())
        elif not quiet:
            render.print_summary(summary, render.console())


@main.command(cls=GroupedCommand)
@click.argument("artifact", type=click.Path())
@add(*COMMON_OPTIONS)
def report(artifact, as_json, quiet, verbose) -> None:
    """Draw an artifact's errors, sizes, losses and expert load into it.

    PNG and SVG in its folder pictures/, shown by its model card. Losses and load are there after finetune.
    """
    from . import render

    with told_in_one_line(verbose, quiet):
        need("report", "matplotlib", extra="report")
        from .artifact.pictures import draw_pictures

        written = draw_pictures(artifact)
    if as_json:
        echo_json({"folder": artifact, "pictures": written})
    elif not quiet:
        render.print_pictures(artifact, written, render.console())


@main.command(cls=GroupedCommand)
@click.argument("artifact", type=click.Path())
@add(
    option(
        "--against",
        heading="Source",
        metavar="MODEL",
        help="Dense model to compare with.  [default: the one it was converted from]",
    ),
    trust_option("Run code of its own that the dense model has."),
    token_option("Source"),
    option(
        "--tolerance",
        heading="General",
        type=float,
        help="Allowed relative difference of the outputs.  [default: rounding, plus what the report's errors explain, at most 0.1, or 0.5 if compressed]",
    ),
    *COMMON_OPTIONS,
)
def verify(artifact, against, trust_remote_code, token, tolerance, as_json, quiet, verbose) -> None:
    """Compare an artifact with its dense model.

    A fresh process without this package loads both as a Hub user would. Exit code 1: they differ.
    """
    from dataclasses import asdict

    from . import render
    from .artifact.verify import verify as verify_artifact

    with told_in_one_line(verbose, quiet):
        result = verify_artifact(
            artifact,
            against=against,
            tolerance=tolerance,
            token=token,
            trust_remote_code=bool(trust_remote_code),
        )
    if as_json:
        echo_json(asdict(result) | {"ok": result.ok})
    elif not quiet:
        render.print_verification(result, render.console())
    sys.exit(0 if result.ok else 1)


@main.command(cls=GroupedCommand)
@click.argument("model", required=False)
@add(
    option("-o", "--output", heading="Output", type=click.Path(), help="Folder to write."),
    option("--resume", heading="Output", is_flag=True, help="Continue from the last checkpoint in it."),
    option(
        "--config",
        heading="Data",
        type=click.Path(dir_okay=False),
        help="File (YAML) with the same names; the command line wins.",
    ),
    *FINETUNING_OPTIONS,
    trust_option(
        "Run code that model, tokenizer or teacher bring along, other than this release's modeling_mpoe.py.",
        "Data",
    ),
    token_option("Data"),
    *COMMON_OPTIONS,
)
def finetune(model, output, resume, config, token, as_json, quiet, verbose, **options) -> None:
    """Train a converted (or any) MODEL on texts by transformers' Trainer.

    Several devices: accelerate launch -m mpoe_convert finetune MODEL ...
    """
    with told_in_one_line(verbose, quiet):
        values = normalised(read_recipe(config)) if config else {}
        output = output or values.pop("output", None)
        for name in ("options", "arguments"):
            options[name] = values.get(name, {}) | dict(map(assignment, options[name]))
        given = {name: value for name, value in options.items() if value not in (None, (), {})}
        if model is not None:
            given["model"] = model
        run = Finetuning.from_mapping(values | given)
        if not output:
            raise click.UsageError("Missing option '-o' / '--output'.")
        run_finetuning(run, output, resume, token, as_json, quiet)


@main.command(cls=GroupedCommand)
@click.argument("model")
@add(
    option(
        "--against",
        heading="Data",
        metavar="MODEL",
        help="Another model to score on the same examples, such as the dense one.",
    ),
    option(
        "--data",
        heading="Data",
        multiple=True,
        required=True,
        metavar="FILE|ID",
        help="Text (.txt), rows (.jsonl, .csv, .tsv, .parquet), or a Hub dataset as owner/name[:subset]. Repeatable.",
    ),
    click.option(
        "--split",
        cls=GroupedOption,
        heading="Data",
        default="test",
        show_default=True,
        help="Split of Hub datasets.",
    ),
    *COLUMN_OPTIONS,
    option(
        "--length",
        heading="Scoring",
        type=int,
        help="Tokens per window or example.  [default: the model's limit, at most 512]",
    ),
    option(
        "--stride",
        heading="Scoring",
        type=int,
        help="Tokens from window to window, for perplexity.  [default: half of --length]",
    ),
    option("--batch-size", heading="Scoring", type=int, help="Windows or examples per pass."),
    option("--limit", heading="Scoring", type=int, help="Score so many windows or examples only."),
    option("--device", heading="Scoring", help="auto, cpu, cuda, cuda:N or mps."),
    option("--seed", heading="Scoring", type=int, help="Seed of the bootstrap, and of what is masked."),
    option(
        "--record",
        heading="General",
        is_flag=True,
        help="Write the results into MODEL, an artifact's folder: evaluation_report.json, its card and the card's metadata.",
    ),
    trust_option("Run code that a model brings along, other than this release's modeling_mpoe.py.", "Data"),
    token_option("Data"),
    *COMMON_OPTIONS,
)
def evaluate(model, as_json, quiet, verbose, **options) -> None:
    """Score MODEL on data: perplexity, accuracy, exact match, BLEU, ROUGE.

    With 95 % bootstrap intervals, and those of the paired difference with --against.
    """
    with told_in_one_line(verbose, quiet):
        need("evaluate", "datasets", "sacrebleu", "rouge_score", "sklearn", extra="train")
        from . import render

        render.quiet_libraries()
        from .source.texts import Columns
        from .training.evaluate import evaluate as score

        given = {name: value for name, value in options.items() if value is not None}
        names = {
            name: given.pop(f"{name}_column")
            for name in ("text", "target", "label")
            if f"{name}_column" in given
        }
        names |= {"routed_by": given.pop("routed_by", None)}
        with render.evaluation_progress(render.console(stderr=True), not quiet) as progress:
            result = score(model, given.pop("data"), columns=Columns(**names), progress=progress, **given)
    if as_json:
        echo_json(result.to_json())
    elif not quiet:
        render.print_evaluation(result, render.console())


@main.command(cls=GroupedCommand)
@click.argument("artifact")
@add(
    option(
        "--to",
        heading="Target",
        type=click.Choice(TARGETS),
        help="dense: one expert or their average in the base's architecture; moe: all of them in transformers' mixture of the family; lora: low-rank experts as PEFT adapters; onnx: the whole model as a graph.",
    ),
    option("-o", "--output", heading="Output", type=click.Path(), required=True, help="Folder to write."),
    option(
        "--overwrite", heading="Output", is_flag=True, help="Replace an export or artifact that is there."
    ),
    option("--max-shard-size", heading="Output", metavar="SIZE", help="Largest weight file."),
    option("--revision", heading="Source", help="Branch, tag or commit of a Hub model."),
    token_option("Source"),
    option("--expert", heading="Dense", type=int, help="Which expert.  [default: 0]"),
    option(
        "--calibrate",
        heading="Dense",
        multiple=True,
        metavar="FILE|ID",
        help="Average the experts, weighted by the combine weights that the routers give them on this text: files or Hub datasets, or builtin (Python's language reference). Repeatable.",
    ),
    *calibration_text_options("Dense"),
    option(
        "--base",
        heading="LoRA",
        metavar="MODEL",
        help="Folder or Hub id of the model that the adapters go on, if what the experts share is still its own.  [default: it is written beside them]",
    ),
    option("--base-revision", heading="LoRA", help="Revision of a base on the Hub."),
    option(
        "--check/--no-check",
        heading="General",
        default=None,
        help="Load what was written beside the artifact and compare.  [default: check]",
    ),
    *COMMON_OPTIONS,
)
def export(artifact, output, overwrite, revision, token, as_json, quiet, verbose, **options) -> None:
    """Write ARTIFACT in a form that needs no code of its own.

    Dense again, as a mixture that transformers has, as adapters for PEFT, or as an ONNX graph. Exit code 1
    and no output: there is no exact form, or what was written computes something else.
    """
    with told_in_one_line(verbose, quiet):
        from . import render
        from .exports.export import export as write

        if options["to"] == "onnx":
            need("export --to onnx", "onnx", "onnxruntime", "onnxscript", extra="onnx")
        request = Export(**{name: value for name, value in options.items() if value not in (None, ())})
        if request.calibrate:
            need("export --calibrate", "datasets", extra="calibrate")
            render.quiet_libraries()
        with render.export_progress(render.console(stderr=True), not quiet) as progress:
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
        render.print_export(result, output, render.console())


def assignment(text: str) -> tuple[str, object]:
    """("name", value) of "name=value"; the value is read as YAML."""
    import yaml

    name, equals, value = text.partition("=")
    if not equals:
        raise click.BadParameter(f"{text!r}; expected NAME=VALUE")
    return name, yaml.safe_load(value)


def run_finetuning(run: Finetuning, output, resume, token, as_json, quiet) -> None:
    need("finetune", "accelerate", "datasets", extra="train")
    from accelerate import PartialState

    from . import render
    from .training.finetune import finetune as train

    render.quiet_libraries()
    try:
        with render.training_progress(render.console(stderr=True), not quiet) as progress:
            report = train(run, output, resume=resume, token=token, progress=progress)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"checkpoints in {output}, if any, are continued with --resume") from None
    if not PartialState().is_main_process:
        return
    if as_json:
        echo_json(report)
    elif not quiet:
        render.print_training(report, output, render.console())


@main.command(cls=GroupedCommand)
@add(*COMMON_OPTIONS)
def families(as_json, quiet, verbose) -> None:
    """List the architectures that are supported."""
    from . import render

    if as_json:
        echo_json(render.families_rows())
    elif not quiet:
        render.print_families(render.console())


@main.command(cls=GroupedCommand)
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
def completion(shell) -> None:
    """Print a script for shell completion.

    For bash: eval "$(mpoe-convert completion bash)"
    """
    from click.shell_completion import get_completion_class

    script = get_completion_class(shell)(main, {}, "mpoe-convert", "_MPOE_CONVERT_COMPLETE")
    click.echo(script.source())
