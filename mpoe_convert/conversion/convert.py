"""The conversion: lazy read, fit, clone, write shard by shard."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from math import prod
from os import PathLike
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import experts
from ..allocator import keeping_freed_memory
from ..artifact.card_file import source_license
from ..artifact.folder import (
    check_apart,
    check_output,
    check_space,
    count_finished,
    output_error,
    scratch,
    staged,
)
from ..artifact.layout import CARD_FILE, RECIPE_FILE, REPORT_FILE, base_path, file_names
from ..artifact.weight_files import stream_shard, write_index
from ..compression.batches import Batch
from ..compression.mixtures import PreparedMixture, prepare_mixture
from ..compression.prepare import Prepared, alternatives, prepare, prepare_each
from ..compression.shared import help_collect
from ..devices import pick_device
from ..errors import MachineError, MpoeError, counted, reworded
from ..experts.ffn import Fitted
from ..extras import need
from ..options import called, named_by_flags, switched
from ..planning.fewer_experts import by_size
from ..planning.mixtures import StackPlan, plan_mixture, resolve_mixture
from ..planning.plan import FFNPlan, MatrixPlan, Plan
from ..planning.planner import plan_checkpoint
from ..planning.recipe import Recipe
from ..planning.resolve import check_text_options, resolve_recipe
from ..planning.shares import check_shared, share_out
from ..ranks import ALONE, Ranks, joined
from ..request import as_path, check_function, check_token
from ..source.checkpoint import Checkpoint
from ..source.in_memory import InMemory
from ..source.json_files import write_json
from ..source.matrices import read_wide
from ..source.opening import check_stream, open_source
from ..source.state_dict import is_buffer
from ..source.text_options import check_calibration
from ..tensors import cast, check_finite
from . import card
from .build import FFNTargets, choose_order, finish_projection, seeded
from .mixtures import MixtureReport, build_stack
from .report import MatrixReport, NeuronOrder, Report, Trial
from .rounding import round_ffn
from .shards import Records, resume_run
from .slices import finish_slices
from .write import write_companions, write_recipe

# Router rows start small: their softmax is near uniform, yet the top k differ from token to token.
ROUTER_STD = 0.02

Progress = Callable[[str, int, int, MatrixReport | None], None]


def convert(
    recipe: Recipe | str | PathLike[str],
    output: str | Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    distributed: bool = False,
    stream: bool = False,
    token: str | None = None,
    calibration: Sequence[Batch] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Convert a checkpoint, dense or a mixture, into an artifact folder that plain transformers loads.

    Args:
        recipe: what to convert and how; or a model alone, which is converted by the defaults.
        output: the folder to write; appears whole or not at all.
        overwrite: replace an artifact of this tool that is already there.
        resume: keep the weight files that are finished when this run is interrupted, and go on from those
            that an interrupted run of the same recipe has kept.
        distributed: share the calibration's batches and the weight files out over the processes that torchrun
            has started, which all call this with the same arguments. They need a folder that all of them see.
        stream: leave the weights of a model on the Hub there, and read each tensor, by requests for its
            bytes, when it is needed. Not with a calibration, which runs the whole model.
        token: Hub token for gated or private models and data; by default the stored login.
        calibration: batches of the model's inputs to calibrate on, instead of the recipe's text; `labels` of
            -100 leave a token out of what the model is to say.
        progress: called with (what is worked on, FFNs done, FFNs in all, a matrix's report when it is done).

    Returns:
        The report that is also written as conversion_report.json.

    Raises:
        MpoeError: anything wrong with the source, the recipe or the output; nothing is left behind, but
            for `resume`. Every process raises the same error.

    >>> from mpoe_convert import Recipe, convert
    >>> report = convert(Recipe("examples/tiny-gpt2", experts=2, bond_dim=8), "out-python")
    >>> report.max_error < 1e-5
    True
    """
    recipe, output = Recipe.of(recipe), as_path("output", output)
    check_token(token)
    check_function("progress", progress, "what, done, total, report")
    with joined(distributed) as ranks, ExitStack() as stack:
        checkpoint = _open_everywhere(
            ranks, partial(_open, recipe, output, overwrite, stream, token, bool(calibration))
        )
        prepared, trials = ranks.first(
            lambda: _prepare(recipe, checkpoint, output, calibration, progress, token, ranks),
            lambda passes: help_collect(passes, checkpoint, ranks.device(recipe.device), ranks),
        )
        ranks.together(prepared.check_reachable)
        folder = ranks.first(lambda: stack.enter_context(staged(output, overwrite, resume)))
        job = _Job(folder, output, prepared, prepared.source(checkpoint), ranks, resume)
        finished = ranks.first(job.begin)
        with job.telling_what_is_kept():
            job.write_weights(progress, finished)
            return ranks.first(lambda: job.finish(trials, stack))


def _open_everywhere(ranks: Ranks, opening: Callable[[], Checkpoint]) -> Checkpoint:
    """The source as every process opens it: first the first one, which downloads."""
    opened: list[Checkpoint] = []
    ranks.first(lambda: opened.append(opening()))
    ranks.together(lambda: None if opened else opened.append(opening()))
    return opened[0]


def _open(
    recipe: Recipe, output: Path, overwrite: bool, stream: bool, token: str | None, is_calibrated: bool
) -> Checkpoint:
    """The source, once everything that can be told without it is right."""
    check_stream(stream, bool(recipe.calibrate) or is_calibrated)
    check_output(output, overwrite)
    check_text_options(recipe, is_calibrated)
    check_calibration(recipe)
    pick_device(recipe.device)
    if recipe.bits and (recipe.calibrate or is_calibrated):  # the artifact is run, to measure its divergence
        need(f"{called('bits')} with calibration", "compressed_tensors", extra="bits")
    checkpoint = open_source(
        recipe.model,
        revision=recipe.revision,
        token=token,
        stream=stream,
        trust_remote_code=recipe.trust_remote_code,
        experts_at=recipe.experts_at,
    )
    if checkpoint.revision is None:  # else it is in the Hub's cache
        check_apart(output, checkpoint.folder)
    return checkpoint


def _prepare(
    recipe: Recipe,
    checkpoint: Checkpoint,
    output: Path,
    calibration: Sequence[Batch] | None,
    progress: Progress | None,
    token: str | None,
    ranks: Ranks,
) -> tuple[Prepared, tuple[Trial, ...]]:
    """What is made of the source for all processes to write, and what a search tried."""
    trials: tuple[Trial, ...] = ()
    if ranks.count > 1:  # told before hours of calibration
        check_shared(_uncompressed(recipe, checkpoint, bool(recipe.calibrate or calibration)), ranks.count)
    if isinstance(checkpoint, InMemory):
        prepared: Prepared = prepare_mixture(
            recipe, checkpoint, calibration, progress, token=token, ranks=ranks
        )
    elif recipe.search:
        prepared, trials = _search(recipe, checkpoint, output, calibration, progress, token, ranks)
    else:
        prepared = prepare(recipe, checkpoint, calibration, progress, token=token, ranks=ranks)
    check_space(output, prepared.plan.totals.stored_bytes)
    return prepared, trials


def _uncompressed(recipe: Recipe, checkpoint: Checkpoint, is_calibrated: bool) -> Plan:
    """The plan from the headers, without ranks."""
    if isinstance(checkpoint, InMemory):
        checkpoint, fewer = by_size(recipe, checkpoint)
        return plan_mixture(resolve_mixture(recipe, checkpoint), checkpoint, fewer=fewer)
    return plan_checkpoint(resolve_recipe(recipe, checkpoint, calibrated=is_calibrated), checkpoint)


def _search(
    recipe: Recipe,
    checkpoint: Checkpoint,
    output: Path,
    batches: Sequence[Batch] | None,
    progress: Progress | None,
    token: str | None,
    ranks: Ranks,
) -> tuple[Prepared, tuple[Trial, ...]]:
    """The variant of `prepare_each` whose artifact is nearest to the dense model, and all that were tried."""
    count = len(alternatives(recipe))
    trials: list[Trial] = []
    nearest: Prepared | None = None

    def report(what: str, done: int, total: int, _: object) -> None:
        if progress:
            progress(f"variant {len(trials) + 1} of at most {count}: {what}", done, total, None)

    for prepared in prepare_each(recipe, checkpoint, batches, report, token=token, ranks=ranks):
        check_space(output, prepared.plan.totals.stored_bytes)
        with scratch(output) as folder:
            job = _Job(folder, output, prepared, checkpoint)
            job.begin()
            job.write_weights(report)
            divergence = job.finish().divergence
        assert divergence is not None, "a search is calibrated"
        if all(divergence.distance < trial.divergence.distance for trial in trials):
            nearest = prepared
        variant = prepared.plan.recipe
        assert variant.metric and variant.allocation, "variants name both"
        trials.append(Trial(variant.metric, variant.allocation, variant.correct, divergence))
    assert nearest is not None, "a search has a variant"
    return nearest, tuple(trials)


class _Job:
    """The writing of one artifact, by one process or several.

    Args:
        folder: to write to; all processes see it.
        output: what it becomes.
        resume: go on from the weight files that an interrupted run has finished, and keep those of this one.
    """

    def __init__(
        self,
        folder: Path,
        output: Path,
        prepared: Prepared,
        checkpoint: Checkpoint,
        ranks: Ranks = ALONE,
        resume: bool = False,
    ) -> None:
        self.folder, self.output, self.prepared, self.checkpoint = folder, output, prepared, checkpoint
        self.plan, self.ranks, self.resume = prepared.plan, ranks, resume
        self.records = Records(folder, hashed=resume)

    def begin(self) -> list[str]:
        """Write the files beside the weights; the weight files that are finished already. For one process.

        Raises:
            RecipeError: what an interrupted run has left is of something else.
        """
        self.records.begin()
        finished = resume_run(self.records, self.prepared, self.checkpoint) if self.resume else []
        write_companions(self.folder, self.plan, self.checkpoint)
        return finished

    def write_weights(self, progress: Progress | None, finished: Collection[str] = ()) -> None:
        """Make the weight files that are not finished yet, each process its share."""
        shares = share_out(self.plan, self.ranks.count, finished)
        self.ranks.together(lambda: self._make(shares[self.ranks.rank], progress))

    def _make(self, files: Sequence[str], progress: Progress | None) -> None:
        """Make some of the weight files. Raises OutputError for what the operating system says."""
        if not self.folder.is_dir():
            raise MachineError(
                f"'{self.folder.parent}' of the first process is not there for this one: on several machines "
                "the output has to be in a folder that all of them see"
            )
        with self._telling_what_failed(), keeping_freed_memory():
            self._make_files(files, progress)

    def _make_files(self, files: Sequence[str], progress: Progress | None) -> None:
        device = self.ranks.device(self.plan.recipe.device)
        builder = _Builder(self.prepared, self.checkpoint, files, device, progress)
        for file in files:
            names = self.plan.shards[file]
            made = ((name, builder.take(name)) for name in names)
            stream_shard([self.plan.by_name[name] for name in names], made, self.folder / file)
            self.records.add(file, builder.reports, builder.orders, builder.rounding)
            builder.forget_reports()

    def finish(self, trials: tuple[Trial, ...] = (), stack: ExitStack | None = None) -> Report:
        """The index, the divergence and the report; then `stack` is closed. Raises as `write_weights`."""
        with self._telling_what_failed():
            report = self._report(trials)
            if stack is not None:
                stack.close()
            return report

    def _report(self, trials: tuple[Trial, ...]) -> Report:
        plan = self.plan
        if len(plan.shards) > 1:
            write_index(self.folder, plan.shards, sum(tensor.num_bytes for tensor in plan.tensors))
        reports, orders, rounding = self.records.collect(plan)
        divergence = self.prepared.divergence(self.folder)
        license = source_license(self.checkpoint.folder)
        kind = MixtureReport if isinstance(self.prepared, PreparedMixture) else Report
        report = kind(plan, reports, license, divergence, orders, trials, rounding)
        with named_by_flags():  # files are the same, whoever called
            _write_texts(self.folder, self.output, report, self.checkpoint)
        return report

    @contextmanager
    def _telling_what_failed(self) -> Iterator[None]:
        """Says of the operating system's errors what they mean for the output."""
        try:
            yield
        except OSError as error:
            raise output_error(error, self.output) from error

    @contextmanager
    def telling_what_is_kept(self) -> Iterator[None]:
        """Adds to what ends the run how many weight files stay for another one."""
        try:
            yield
        except (MpoeError, KeyboardInterrupt) as error:
            done = count_finished(self.folder.parent) if self.resume else 0
            if not done:
                raise
            kept = (
                f"{done} of {counted(len(self.plan.shards), 'weight file')} are kept in "
                f"'{self.folder.parent}': run it again with {switched('resume')} to go on"
            )
            if isinstance(error, MpoeError):
                raise reworded(error, f"{error}; {kept}") from error
            raise KeyboardInterrupt(kept) from error


def _write_texts(folder: Path, output: Path, report: Report, checkpoint: Checkpoint) -> None:
    """The card, the recipe, and the report with the names of all files."""
    plan = report.plan
    card.write(folder / CARD_FILE, report, checkpoint)
    write_recipe(folder / RECIPE_FILE, plan.recipe, isinstance(report, MixtureReport))
    files = sorted({*file_names(folder), REPORT_FILE})
    place = None if checkpoint.revision else base_path(checkpoint.folder, output)
    write_json(folder / REPORT_FILE, report.to_json() | {"base_path": place, "files": files})


class _Builder:
    """Makes tensors of some of the artifact's weight files in any order, one FFN in memory at a time.

    Attributes:
        reports, orders, rounding: of the FFNs made since they were last forgotten.
    """

    def __init__(
        self,
        prepared: Prepared,
        checkpoint: Checkpoint,
        files: Sequence[str],
        device: torch.device,
        progress: Progress | None,
    ) -> None:
        self.prepared, self.checkpoint, self.device = prepared, checkpoint, device
        self.plan = plan = prepared.plan
        self.progress = progress or (lambda *_: None)
        self.out = {tensor.name: tensor for tensor in plan.tensors}
        self.ffns = {ffn.ffn.key: ffn for ffn in plan.ffns}
        self.names = {name for file in files for name in plan.shards[file]}
        self.num_ffns = len({self.out[name].ffn for name in self.names} - {None})
        self.ffns_done = 0
        self.at = ""  # what is in work, for messages
        self.pending: dict[str, Tensor] = {}
        self.reports: list[MatrixReport] = []
        self.orders: list[NeuronOrder] = []
        self.rounding: dict[str, float] = {}

    def forget_reports(self) -> None:
        self.reports, self.orders, self.rounding = [], [], {}

    def take(self, name: str) -> Tensor:
        """The named tensor; what else its FFN yields for these files is kept until it is asked for."""
        ffn = self.out[name].ffn
        if ffn is None:
            return self._copy(name)
        if name not in self.pending:
            made = self._stored(self.ffns[ffn])
            self.pending |= {each: made[each] for each in made.keys() & self.names}
        return self.pending.pop(name)

    def _stored(self, plan: FFNPlan) -> dict[str, Tensor]:
        tensors, bits = self._build(plan), self.plan.recipe.bits
        if bits is None:
            return tensors
        stored, errors = round_ffn(plan, tensors, bits)
        self.rounding |= errors
        return stored

    def _copy(self, name: str) -> Tensor:
        tensor = self.checkpoint.read(name)
        dtype = getattr(torch, self.out[name].dtype)
        if tensor.dtype != dtype and tensor.is_floating_point() and not is_buffer(name):
            check_finite(tensor, name)  # what is not cast is checked when it is written
            return cast(name, tensor, dtype).contiguous()
        return tensor.to(dtype).contiguous()

    def _build(self, plan: FFNPlan) -> dict[str, Tensor]:
        if isinstance(self.prepared, PreparedMixture):
            tensors = self._build_experts(plan, self.prepared)
        else:
            tensors = self._build_ffn(plan)
        for name, (shape, dtype) in plan.tensors.items():
            assert tensors[name].shape == shape and str(tensors[name].dtype) == f"torch.{dtype}", name
        return tensors

    def _build_experts(self, plan: FFNPlan, prepared: PreparedMixture) -> dict[str, Tensor]:
        """The experts of a layer of a mixture."""
        self.at, tensors = plan.ffn.path, {}
        moments = prepared.expert_moments(plan.ffn.path)
        with _naming(lambda: self.at):
            for matrix in plan.matrices:
                assert isinstance(matrix, StackPlan)
                self._begin(matrix)
                made, report = build_stack(matrix, self.checkpoint, self.device, moments)
                tensors |= {f"{matrix.name}.{tail}": tensor for tail, tensor in made.items()}
                self._report(report, is_last=matrix is plan.matrices[-1])
        return tensors

    def _build_ffn(self, plan: FFNPlan) -> dict[str, Tensor]:
        recipe, order, corrections = self.plan.recipe, self._neuron_order(plan), self.prepared.corrections
        moments = self.prepared.moments(plan.ffn.path)
        targets = FFNTargets(
            plan,
            recipe,
            self.checkpoint,
            self.device,
            moments=None if moments is None else moments.reordered(order),
            corrected=corrections.load if corrections else lambda name: (),
            order=order,
            asked=self._begin,
            activations=self.prepared.activations(plan.ffn.path),
        )
        kind = experts.load(recipe.kind)
        router = f"{plan.ffn.key}.router.weight"
        tensors = {router: _router(self.out[router].shape, recipe.seed, router)}
        self.at = plan.ffn.path
        with _naming(lambda: self.at):
            for part, built in kind.build(targets, plan.form, recipe.own_options):
                if isinstance(built, Fitted):
                    built = self._finish(targets, part, built)
                for tail, tensor in built.items():
                    name = f"{plan.ffn.key}.{part}.{tail}"
                    tensors[name] = tensor.to(getattr(torch, plan.tensors[name][1]))
        thresholds = f"{plan.ffn.key}.router.threshold_bias"
        if thresholds in plan.tensors:  # experts pass where the cosine is above zero
            tensors[thresholds] = torch.zeros(plan.tensors[thresholds][0])
            tensors[router] = F.normalize(tensors[router], dim=-1)
        return tensors

    def _begin(self, matrix: MatrixPlan) -> None:
        self.at = matrix.name
        self.progress(matrix.name, self.ffns_done, self.num_ffns, None)

    def _finish(self, targets: FFNTargets, role: str, fitted: Fitted) -> dict[str, Tensor]:
        finish = finish_projection if fitted.neurons is None else finish_slices
        tensors, report = finish(targets, role, fitted)
        self._report(report, is_last=role == targets.plan.matrices[-1].role)
        return tensors

    def _report(self, report: MatrixReport, is_last: bool) -> None:
        self.reports.append(report)
        self.ffns_done += is_last
        self.progress(report.name, self.ffns_done, self.num_ffns, report)

    def _neuron_order(self, plan: FFNPlan) -> Tensor | None:
        """An order in which truncated chains lose less; None: that of the source."""
        if not self.plan.seeks_order(plan):
            return None
        self.progress(f"order of the neurons of {plan.ffn.path}", self.ffns_done, self.num_ffns, None)
        with _naming(lambda: plan.ffn.path):
            matrices = {m.role: read_wide(self.checkpoint, m.source, self.device) for m in plan.matrices}
            order, report = choose_order(plan, matrices, self.plan.recipe)
        self.orders.append(report)
        return order


@contextmanager
def _naming(name: Callable[[], str]) -> Iterator[None]:
    """Adds the name of what is in work to errors from the parts that do not know it."""
    try:
        yield
    except MpoeError as error:
        if name() in str(error):
            raise
        raise reworded(error, f"{name()}: {error}") from error
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _is_out_of_memory(error):
            raise
        raise MachineError(
            f"out of memory while working on {name()}; `mpoe-convert plan` estimates what a conversion needs"
        ) from error


def _is_out_of_memory(error: RuntimeError) -> bool:
    # On the CPU torch raises a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def _router(shape: tuple[int, ...], seed: int, name: str) -> Tensor:
    assert len(shape) == 2 and prod(shape), shape
    return ROUTER_STD * torch.randn(shape, generator=seeded(seed, name))
