"""Perplexity, accuracy and the like of a model on data, beside another model's on the same examples."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from . import corpus, recording
from .corpus import Columns
from .errors import DataError, TrainingError
from .libraries import need
from .loading import from_pretrained, load_tokenizer, max_length, task_of
from .request import takes_options
from .runs import Scoring

if TYPE_CHECKING:
    from datasets import Dataset

RESAMPLES = 1000
# Libraries that score a task, beside datasets.
_NEEDS = {"seq2seq": ("sacrebleu", "rouge_score"), "classification": ("sklearn",)}
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Metric:
    """A number with its 95 % bootstrap interval over examples (windows, for perplexity)."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        data, split: what was read; settings: length, and where they matter stride, limit and seed.
        count: what was scored: tokens for language models, examples for the rest.
        metrics / against: of the model, and of the one it is compared with (None: alone).
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

    def to_json(self) -> dict:
        return asdict(self)


@takes_options(Scoring)
def evaluate(
    model: str,
    data: str | Sequence[str],
    *,
    columns: Columns | None = None,
    token: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Evaluation:
    """Score a model, and another one on the same examples: `score_models` of a `Scoring`.

    Args:
        model, data, options: the fields of `Scoring`, which describes them.
        columns: names of the columns, in place of `text_column` and its like.
        token, progress: as for `score_models`.
    """
    sources = (data,) if isinstance(data, str) else tuple(data)
    names = {} if columns is None else columns.as_options()
    return score_models(Scoring(model, sources, **names, **options), token=token, progress=progress)


def score_models(
    request: Scoring, *, token: str | None = None, progress: Progress | None = None
) -> Evaluation:
    """Score a model, and another one on the same examples.

    causal: perplexity by strided windows: each holds `length` tokens and starts `stride` after the last one;
    every token of a text but its first is scored once, with at least `length - stride` tokens before it where
    the text has them. masked: perplexity and accuracy of 15 % of the tokens, masked by the seed, in windows
    that do not overlap. seq2seq: greedy generation; exact match, BLEU and chrF (sacrebleu), ROUGE-L
    (rouge-score). classification: accuracy and macro F1 (scikit-learn).

    Args:
        token: for models and data of the Hub; by default the stored login.
        progress: called as progress(model, batches done, batches).

    Raises:
        CheckpointError: the model, in which to record, is no artifact's folder.
        TrainingError: a model cannot be loaded or used, or options contradict each other.
        DataError: the data cannot be read or do not fit the task.
        MachineError: a library that scores the task is not installed.
    """
    import transformers

    model, against, columns, trust = request.model, request.against, request.columns, request.trust
    limit, batch_size, seed = request.limit, request.batch_size, request.seed
    if request.record:
        recording.check(Path(model))
    task, auto_class = task_of(model, request.task, token, **trust)
    need(f"evaluate, task {task},", "datasets", *_NEEDS.get(task, ()), extra="train")
    loaded = load_tokenizer(request.tokenizer or model, token, **trust)
    longest = max_length(model, token, **trust)
    length = request.length or min(512, longest or 512)
    stride = request.stride or max(length // 2, 1)
    if not 1 <= stride <= length or (longest and length > longest):
        raise TrainingError(
            f"length is {length} and stride {stride}; expected stride <= length <= {longest or 'any'}"
        )
    rows = corpus.read(request.data, columns, task, request.split, token)
    device = _device(request.device)

    @functools.cache  # models with the same classes are scored on the same batches
    def batches_of(labels: tuple[str, ...]) -> list[tuple[str | None, list]]:
        made = []
        for routed, part in _by_route(rows, columns.routed_by):
            try:
                examples = _EXAMPLES[task](part, loaded, columns, length, stride, labels, seed)[:limit]
            except DataError as error:
                raise DataError(f"{routed}: {error}" if routed else str(error)) from None
            made += [(routed, examples[i : i + batch_size]) for i in range(0, len(examples), batch_size)]
        if not made:
            raise DataError("the data hold no example to score; expected more text")
        return made

    def score(name: str) -> Scores:
        network = from_pretrained(getattr(transformers, auto_class), name, token=token, **trust)
        network = network.to(device).eval()
        if columns.routed_by is None and getattr(network.config, "router_tasks", None) is not None:
            raise TrainingError(f"the routers of {name} choose by task; expected --routed-by, the column")
        labels = network.config.id2label if task == "classification" else {}
        batches = batches_of(tuple(labels[number] for number in sorted(labels)))
        found = []
        for done, (routed, batch) in enumerate(batches, 1):
            if routed is not None and getattr(network.config, "router_tasks", None) is not None:
                _route(network, routed)
            with torch.no_grad():
                found += _SCORES[task](network, loaded, batch, length)
            if progress is not None:
                progress(name, done, len(batches))
        return Scores(task, found)

    ours = score(model)
    theirs = score(against) if against else None
    draws = np.random.default_rng(seed).integers(len(ours.rows), size=(RESAMPLES, len(ours.rows)))
    metrics = ours.metrics(draws)
    others = theirs.metrics(draws) if theirs else None
    found = Evaluation(
        task=task,
        model=model,
        other=against,
        data=request.data,
        split=request.split,
        settings=_settings(task, length, stride, limit, seed),
        count=ours.count,
        metrics=_intervals(metrics),
        against=_intervals(others) if others else None,
        differences=_intervals(_differences(metrics, others)) if others else None,
    )
    if request.record:
        recording.record(model, found.to_json())
    return found


def _settings(task: str, length: int, stride: int, limit: int | None, seed: int) -> dict[str, int]:
    """What somebody needs to know to repeat it."""
    more = {"causal": {"stride": stride}, "masked": {"seed": seed}}.get(task, {})
    return {"length": length, **more, **({"limit": limit} if limit else {})}


def _by_route(rows: Dataset, column: str | None) -> list[tuple[str | None, Dataset]]:
    """(task that routers choose by, its rows), or all rows."""
    if column is None:
        return [(None, rows)]
    found = rows[column]
    return [
        (name, rows.select([i for i, value in enumerate(found) if str(value) == name]))
        for name in corpus.task_names(rows, column)
    ]


def _route(network, task: str) -> None:
    try:
        network.route_by(task)
    except ValueError as error:
        raise TrainingError(str(error)) from None


def _device(name: str) -> torch.device:
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


# ---------------------------------------------------------------------------------------------------
# From per-example scores to numbers with intervals

# Of a metric: its value on the examples, and on every bootstrap sample of them.
Samples = tuple[float, np.ndarray]


class Scores:
    """Per-example scores of one model, in the order of the examples."""

    def __init__(self, task: str, rows: list):
        self.task, self.rows = task, rows

    @property
    def count(self) -> int:
        return int(sum(row[1] for row in self.rows)) if self.task in ("causal", "masked") else len(self.rows)

    def metrics(self, draws: np.ndarray) -> dict[str, Samples]:
        every = np.arange(len(self.rows))
        return {
            name: (float(metric(self.rows, every)), np.array([metric(self.rows, draw) for draw in draws]))
            for name, metric in _METRICS[self.task].items()
        }


def _intervals(metrics: dict[str, Samples]) -> dict[str, Metric]:
    return {
        name: Metric(value, *(float(q) for q in np.quantile(samples, (0.025, 0.975))))
        for name, (value, samples) in metrics.items()
    }


def _differences(ours: dict[str, Samples], theirs: dict[str, Samples]) -> dict[str, Samples]:
    found = {}
    for name, (value, samples) in ours.items():
        other, others = theirs[name]
        if name == "perplexity":
            found["perplexity ratio"] = value / other, samples / others
        else:
            found[name] = value - other, samples - others
    return found


def _perplexity(rows: list, which: np.ndarray) -> float:
    losses, counts = np.array([(row[0], row[1]) for row in rows])[which].sum(0)
    return float(np.exp(losses / counts))


def _mean(place: int) -> Callable[[list, np.ndarray], float]:
    return lambda rows, which: float(np.array([row[place] for row in rows], dtype=float)[which].mean())


def _corpus(name: str, place: int) -> Callable[[list, np.ndarray], float]:
    """A corpus score of sacrebleu from its statistics per example."""

    def score(rows: list, which: np.ndarray) -> float:
        from sacrebleu import metrics

        statistics = np.array([row[place] for row in rows])[which].sum(0)
        return float(getattr(metrics, name)()._compute_score_from_stats(statistics.tolist()).score)

    return score


def _masked_accuracy(rows: list, which: np.ndarray) -> float:
    right, counts = np.array([(row[2], row[1]) for row in rows])[which].sum(0)
    return float(right / counts)


def _macro_f1(rows: list, which: np.ndarray) -> float:
    from sklearn.metrics import f1_score

    found, expected = np.array(rows)[which].T
    return float(f1_score(expected, found, average="macro", zero_division=0.0))


def _classified(rows: list, which: np.ndarray) -> float:
    found, expected = np.array(rows)[which].T
    return float((found == expected).mean())


_METRICS = {
    "causal": {"perplexity": _perplexity},
    "masked": {"perplexity": _perplexity, "accuracy": _masked_accuracy},
    "seq2seq": {
        "exact_match": _mean(0),
        "bleu": _corpus("BLEU", 1),
        "chrf": _corpus("CHRF", 2),
        "rouge_l": _mean(3),
    },
    "classification": {"accuracy": _classified, "f1": _macro_f1},
}


# ---------------------------------------------------------------------------------------------------
# Examples and their scores


def windows(num_tokens: int, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, first scored place) of a text's windows; all tokens but the first are scored once."""
    scored = 1
    for start in range(0, max(num_tokens - 1, 0), stride):
        end = min(start + length, num_tokens)
        yield start, end, scored
        scored = end
        if end == num_tokens:
            return


def _causal_examples(rows: Dataset, tokenizer, columns, length, stride, labels, seed) -> list:
    found = []
    for text in rows[columns.text]:
        ids = tokenizer(text, verbose=False)["input_ids"]
        for start, end, scored in windows(len(ids), length, stride):
            found.append((ids[start:end], scored - start))
    return found


def _causal_scores(model, tokenizer, batch: list, length: int) -> list[tuple[float, int]]:
    """(summed negative log-likelihood, tokens) per window."""
    width = max(len(ids) for ids, _ in batch)
    tokens = torch.full((len(batch), width), tokenizer.pad_token_id or 0)
    mask = torch.zeros_like(tokens)
    for row, (ids, _) in enumerate(batch):
        tokens[row, : len(ids)], mask[row, : len(ids)] = torch.tensor(ids), 1
    tokens, mask = tokens.to(model.device), mask.to(model.device)
    logits = model(input_ids=tokens, attention_mask=mask).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits.mT, tokens[:, 1:], reduction="none")
    return [
        (losses[row, first - 1 : len(ids) - 1].double().sum().item(), len(ids) - first)
        for row, (ids, first) in enumerate(batch)
    ]


def _masked_examples(rows: Dataset, tokenizer, columns, length, stride, labels, seed) -> list:
    from transformers import DataCollatorForLanguageModeling

    if tokenizer.mask_token is None:
        raise TrainingError("the tokenizer has no mask token; expected one that was made for task masked")
    blocks = corpus.language_blocks(rows, tokenizer, columns.text, length)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=True, seed=seed)
    return [collator([row]) for row in blocks]


def _masked_scores(model, tokenizer, batch: list, length: int) -> list[tuple[float, int, int]]:
    """(summed negative log-likelihood, masked tokens, right ones) per window."""
    inputs = {name: torch.cat([b[name] for b in batch]).to(model.device) for name in batch[0]}
    labels = inputs.pop("labels")
    logits = model(**inputs).logits.float()
    losses = torch.nn.functional.cross_entropy(logits.mT, labels, reduction="none")
    right = (logits.argmax(-1) == labels).sum(-1)
    counts = (labels != -100).sum(-1)
    return [
        (loss.double().sum().item(), int(count), int(hit))
        for loss, count, hit in zip(losses, counts, right, strict=True)
    ]


def _seq2seq_examples(rows: Dataset, tokenizer, columns, length, stride, labels, seed) -> list:
    return list(zip(rows[columns.text], rows[columns.target], strict=True))


def _seq2seq_scores(model, tokenizer, batch: list, length: int) -> list[tuple[float, ...]]:
    """(exact match, statistics of BLEU and of chrF, ROUGE-L in per cent) per example."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU, CHRF

    sources, targets = zip(*batch, strict=True)
    inputs = tokenizer(
        list(sources), return_tensors="pt", padding=True, truncation=True, max_length=length
    ).to(model.device)
    inputs.pop("token_type_ids", None)
    made = model.generate(**inputs, max_new_tokens=length, do_sample=False, num_beams=1)
    texts = [text.strip() for text in tokenizer.batch_decode(made, skip_special_tokens=True)]
    bleu, chrf = (m._extract_corpus_statistics(texts, [list(targets)]) for m in (BLEU(), CHRF()))
    rouge = RougeScorer(["rougeL"])
    return [
        (float(text == target.strip()), *stats, 100 * rouge.score(target, text)["rougeL"].fmeasure)
        for text, target, *stats in zip(texts, targets, bleu, chrf, strict=True)
    ]


def _classification_examples(rows: Dataset, tokenizer, columns, length, stride, labels, seed) -> list:
    return list(corpus.labelled(rows, tokenizer, columns, length, labels))


def _classification_scores(model, tokenizer, batch: list, length: int) -> list[tuple[int, int]]:
    """(class found, class expected) per example."""
    labels = [row["labels"] for row in batch]
    texts = [{name: value for name, value in row.items() if name != "labels"} for row in batch]
    inputs = tokenizer.pad(texts, return_tensors="pt").to(model.device)
    return list(zip(model(**inputs).logits.argmax(-1).tolist(), labels, strict=True))


_EXAMPLES = {
    "causal": _causal_examples,
    "masked": _masked_examples,
    "seq2seq": _seq2seq_examples,
    "classification": _classification_examples,
}
_SCORES = {
    "causal": _causal_scores,
    "masked": _masked_scores,
    "seq2seq": _seq2seq_scores,
    "classification": _classification_scores,
}
