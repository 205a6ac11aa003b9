"""Scores of a model on data, compared with those of another model on the same examples."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from ..artifact.limits import block_length, check_length, positions
from ..artifact.loading import AUTO_CLASSES, HoldsMixtures, load_alone, load_config, load_tokenizer, task_of
from ..errors import DataError, RequestError, TrainingError, few, one_line
from ..extras import need
from ..options import called
from ..ranks import Ranks, joined
from ..request import check_function, check_token, takes_options
from ..source import texts
from ..source.text_options import check_data
from ..source.texts import Columns
from ..tensors import broken_weights
from .intervals import Metric, bootstrap, bootstrap_interval, draw_samples, notes, rate_interval
from .record import record_evaluation, recorded_evaluations
from .request import Scoring, check_stride
from .tasks import TASKS, Outcome, Score, Task, class_names

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel


# Called as progress(model, batches done, batches).
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`.

    Attributes:
        task: causal, masked, seq2seq or classification.
        model / other: the model, and the one that it is compared with (None: alone).
        data / split: files or Hub datasets, and the split of the latter.
        settings: length, and where they matter stride, limit and seed.
        count: tokens that were scored by language models, examples of other tasks.
        units: windows or examples, between which the intervals are.
        metrics / against: scores of the model, and of the other.
        differences: model minus the other, on the same examples (paired); of perplexity, the ratio.
    """

    task: str
    model: str
    other: str | None
    data: tuple[str, ...]
    split: str
    settings: dict[str, int]
    count: int
    metrics: dict[str, Metric]
    against: dict[str, Metric] | None
    differences: dict[str, Metric] | None
    units: int = 0

    @property
    def notes(self) -> tuple[str, ...]:
        """Why scores or intervals are missing, as sentences."""
        return tuple(notes(self.metrics, self.against, self.differences))

    def to_json(self) -> dict:
        """A dictionary of plain values."""
        return asdict(self)


@takes_options(Scoring)
def evaluate(
    model: str | PathLike[str],
    data: str | PathLike[str] | Sequence[str | PathLike[str]],
    *,
    columns: Columns | None = None,
    distributed: bool = False,
    token: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Evaluation:
    """Score a model, and another one on the same examples: `score_models` of a `Scoring`.

    Args:
        model, data, options: the fields of `Scoring`, which describes them.
        columns: names of the columns, in place of `text_column` and its like.
        distributed, token, progress: as for `score_models`.

    >>> from mpoe_convert import evaluate
    >>> found = evaluate("out", "text.txt", against="out", length=16, limit=2)
    >>> found.task, found.differences["perplexity ratio"].value
    ('causal', 1.0)
    """
    if columns is not None and not isinstance(columns, Columns):
        raise RequestError(f"columns is {one_line(repr(columns), 60)}; expected Columns(text=...)")
    names = {} if columns is None else columns.as_options()
    request = Scoring(model, data, **names, **options)
    return score_models(request, distributed=distributed, token=token, progress=progress)


def score_models(
    request: Scoring, *, distributed: bool = False, token: str | None = None, progress: Progress | None = None
) -> Evaluation:
    """Score a model, and another one on the same examples.

    causal: perplexity by strided windows: each holds `length` tokens and starts `stride` after the last one;
    every token of a text but its first is scored once, with at least `length - stride` tokens before it where
    the text has them. masked: perplexity and accuracy of 15 % of the tokens, masked by the seed, in windows
    that do not overlap. seq2seq: greedy generation; exact match, BLEU and chrF (sacrebleu), ROUGE-L
    (rouge-score). classification: accuracy and macro F1 (scikit-learn).

    Intervals are Wilson's for rates of examples, else expanded percentile intervals of the bootstrap
    (`intervals`). Of fewer than ten windows or examples, or where nothing varies, there is none;
    `Evaluation.notes` says so.

    Args:
        request: what is scored on what; `limit` counts windows or examples, of every task by which routers
            choose.
        distributed: share the batches out over the processes that torchrun has started, which all call this
            with the same arguments and get the same scores.
        token: for models and data of the Hub; by default the stored login.
        progress: called as progress(model, batches done, batches).

    Raises:
        CheckpointError: the model, in which to record, is no artifact's folder.
        TrainingError: a model cannot be loaded or used, is damaged (NaN or infinities), or options contradict
            each other.
        DataError: the data cannot be read or do not fit the task.
        LibraryError: a library that scores the task is not installed.
        RequestError: there is no such device here.
        MachineError: another process has ended.
    """
    check_token(token)
    check_function("progress", progress, "model, done, total")
    found: list[Evaluation] = []
    with joined(distributed) as ranks:
        ranks.together(lambda: found.append(_score(request, ranks, token, progress)))
        if request.record:
            ranks.first(lambda: record_evaluation(request.model, found[0].to_json()))
    return found[0]


def _score(request: Scoring, ranks: Ranks, token: str | None, progress: Progress | None) -> Evaluation:
    where = ranks.device(request.device)
    model, against, columns, trust = request.model, request.against, request.columns, request.trust
    if request.record:
        recorded_evaluations(Path(model))
    check_data(request, request.data)
    config = load_config(model, token, **trust)
    kind = TASKS[request.task or task_of(config, model, **trust)]
    texts.check_columns(request.data, request.columns.needed(kind.name), f"task {kind.name}")
    need(f"evaluate, task {kind.name},", "datasets", *kind.libraries, extra="train")
    limits = {model: positions(config)}
    if against:
        limits[against] = positions(load_config(against, token, **trust))
    length, stride = _sizes(request.length, request.stride, limits)
    loaded = load_tokenizer(request.tokenizer or model, token, **trust)
    scored = kind(loaded, columns, length, stride, request.seed)
    rows = texts.read(request.data, columns, kind.name, request.split, token)
    examples = _Examples(scored, rows, request.batch_size, request.limit)
    load = partial(_load, auto_class=AUTO_CLASSES[kind.name], device=where, token=token, **trust)
    ours = _outcomes(load(model), model, examples, ranks, progress)
    theirs = _outcomes(load(against), against, examples, ranks, progress) if against else None
    draws = draw_samples(len(ours), request.seed)
    scores = _scores(scored, ours, draws)
    others = None if theirs is None else _scores(scored, theirs, draws)
    return Evaluation(
        task=kind.name,
        model=model,
        other=against,
        data=request.data,
        split=request.split,
        settings=scored.settings | ({"limit": request.limit} if request.limit else {}),
        count=scored.count(ours),
        metrics=_intervals(scored, scores),
        against=_intervals(scored, others) if others else None,
        differences=_differences(scored, scores, others) if others else None,
        units=len(ours),
    )


def _sizes(length: int | None, stride: int | None, limits: Mapping[str, int | None]) -> tuple[int, int]:
    """Length and stride with their defaults.

    Args:
        length, stride: as asked for.
        limits: by model how many positions it has; None: any number.

    Raises:
        TrainingError: they contradict each other or a model.
    """
    length = length or min(map(block_length, limits.values()))
    stride = stride or max(length // 2, 1)
    check_stride(length, stride)
    check_length(length, limits)
    return length, stride


# ---------------------------------------------------------------------------------------------------
# Models on examples


@dataclass(frozen=True)
class _Examples:
    """What every model is scored on. Models with the same classes get the same batches."""

    task: Task
    rows: Dataset
    batch_size: int
    limit: int | None
    _made: dict[tuple[str, ...], list[tuple[str | None, list]]] = field(default_factory=dict)

    def batches(self, labels: tuple[str, ...]) -> list[tuple[str | None, list]]:
        """(task that routers choose by, examples) for a model with these classes.

        Raises:
            DataError: the rows hold no example.
        """
        if labels not in self._made:
            self._made[labels] = list(self._make(labels))
        if not self._made[labels]:
            raise DataError("the data hold no example to score; expected more text")
        return self._made[labels]

    def _make(self, labels: tuple[str, ...]) -> Iterator[tuple[str | None, list]]:
        for routed, rows in _by_route(self.rows, self.task.columns.routed_by):
            try:
                examples = self.task.examples(rows, labels)[: self.limit]
            except DataError as error:
                raise DataError(f"{routed}: {error}" if routed else str(error)) from None
            for start in range(0, len(examples), self.batch_size):
                yield routed, examples[start : start + self.batch_size]


def _by_route(rows: Dataset, column: str | None) -> list[tuple[str | None, Dataset]]:
    """(task that routers choose by, its rows), or all rows."""
    if column is None:
        return [(None, rows)]
    found = rows[column]
    return [
        (name, rows.select([i for i, value in enumerate(found) if str(value) == name]))
        for name in texts.task_names(rows, column)
    ]


def _load(name: str, auto_class: str, device: torch.device, **options: Any) -> PreTrainedModel:
    import transformers

    model = load_alone(getattr(transformers, auto_class), name, device, **options)
    if damaged := broken_weights(model):
        raise TrainingError(f"'{name}' holds NaN or infinities in {few(damaged)}, so it has no scores")
    return model


def _outcomes(
    model: PreTrainedModel, name: str, examples: _Examples, ranks: Ranks, progress: Progress | None
) -> list[Outcome]:
    """What a model does with every example, in order; each process runs a share of the batches.

    Raises:
        TrainingError: its routers choose by task, and the rows do not name theirs.
        DataError: the rows do not fit the task, or hold nothing to score.
    """
    task, chooses_by_task = examples.task, getattr(model.config, "router_tasks", None) is not None
    if task.columns.routed_by is None and chooses_by_task:
        raise TrainingError(
            f"the routers of {name} choose by task; expected {called('routed_by')}, the column"
        )
    batches = examples.batches(class_names(model.config) if task.has_labels else ())
    task.prepare(model)
    numbers = range(len(batches))[ranks.rank :: ranks.count]
    own: dict[int, list[Outcome]] = {}
    for done, number in enumerate(numbers, 1):
        routed, batch = batches[number]
        if routed is not None and chooses_by_task:
            _route(model, routed)
        with torch.no_grad():
            own[number] = task.outcomes(model, batch)
        if progress is not None:
            progress(name, done, len(numbers))
    shares = ranks.gathered(own)
    found = [outcome for number in range(len(batches)) for outcome in shares[number % ranks.count][number]]
    if not (counted := task.counted(found)):
        raise DataError(f"none of {len(found)} {task.sampled} holds a token to score; expected more text")
    _check_finite(name, counted)
    return counted


def _check_finite(name: str, outcomes: Sequence[Outcome]) -> None:
    """Raises TrainingError if a model's loss is NaN or infinite somewhere."""
    strange = [v for outcome in outcomes for v in outcome if isinstance(v, float) and not math.isfinite(v)]
    if strange:
        raise TrainingError(
            f"the loss of {name} is {strange[0]} in {len(strange)} of {len(outcomes)} windows, "
            "so it has no scores"
        )


def _route(model: PreTrainedModel, task: str) -> None:
    try:
        cast(HoldsMixtures, model).route_by(task)
    except ValueError as error:
        raise TrainingError(str(error)) from None


# ---------------------------------------------------------------------------------------------------
# From outcomes to scores with intervals


@dataclass(frozen=True)
class _Samples:
    """A score of all units and of every bootstrap sample of them.

    Attributes:
        statistics: (N, ...) of the units.
        value: None: the statistics have no such score.
        samples: (R,).
    """

    score: Score
    statistics: np.ndarray
    value: float | None
    samples: np.ndarray


def _scores(task: Task, outcomes: Sequence[Outcome], draws: np.ndarray) -> list[_Samples]:
    """Every score of a task; `draws` (R, N) are the units of the bootstrap samples."""
    return [_samples(score, outcomes, draws) for score in task.scores]


def _samples(score: Score, outcomes: Sequence[Outcome], draws: np.ndarray) -> _Samples:
    statistics = score.statistics(outcomes)
    if score.undefined(statistics):
        return _Samples(score, statistics, None, np.empty(0))
    samples = bootstrap(score.function, statistics, draws)
    return _Samples(score, statistics, score.function(statistics), samples)


def _intervals(task: Task, scores: Sequence[_Samples]) -> dict[str, Metric]:
    return {each.score.name: _interval(task, each) for each in scores}


def _interval(task: Task, found: _Samples) -> Metric:
    if found.value is None:
        return Metric(None, note=found.score.undefined(found.statistics))
    if found.score.is_rate:
        return rate_interval(found.statistics)
    return bootstrap_interval(found.value, found.samples, len(found.statistics), task.sampled)


def _differences(task: Task, ours: Sequence[_Samples], theirs: Sequence[_Samples]) -> dict[str, Metric]:
    """Paired: both models' samples are of the same units."""
    found = {}
    for one, other in zip(ours, theirs, strict=True):
        name = f"{one.score.name} ratio" if one.score.is_ratio else one.score.name
        if one.value is None or other.value is None:
            lacks = one if one.value is None else other
            found[name] = Metric(None, note=lacks.score.undefined(lacks.statistics))
            continue
        combine = operator.truediv if one.score.is_ratio else operator.sub
        samples = combine(one.samples, other.samples)
        value = combine(one.value, other.value)
        found[name] = bootstrap_interval(value, samples, len(one.statistics), task.sampled)
    return found
