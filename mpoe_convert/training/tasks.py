"""The tasks: how each makes examples, for training and for scoring, and its scores.

A task is a class in `TASKS`, a score is a row of its task's `scores`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from ..artifact.limits import check_token_ids, counts_from_padding, embedding_rows
from ..errors import TrainingError
from ..options import called
from ..source import texts
from ..source.padding import pad_rows, padding_token
from ..source.texts import Columns

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# What a model did with one example; each task documents the fields.
Outcome = tuple[Any, ...]


@dataclass(frozen=True)
class Score:
    """One score of a task.

    Attributes:
        name: in results and reports.
        function: the score of n examples, from their statistics (n, ...). It is called for all examples and
            for every bootstrap sample of them.
        statistics: (N, ...), the numbers that the score needs of each example, from N outcomes.
        hub: the Hub's name of the metric (https://huggingface.co/metrics).
        label: the name in tables.
        is_ratio: two models are compared by the ratio of their scores, not by the difference.
        is_rate: the mean of statistics (N,) that are 0 or 1.
        undefined: why statistics have no score at all; None: they have one.
    """

    name: str
    function: Callable[[np.ndarray], float]
    statistics: Callable[[Sequence[Outcome]], np.ndarray]
    hub: str
    label: str
    is_ratio: bool = False
    is_rate: bool = False
    undefined: Callable[[np.ndarray], str | None] = lambda statistics: None


@dataclass(frozen=True)
class Task(ABC):
    """A task, bound to a tokenizer and to the columns of the data.

    Attributes:
        length: tokens per window or example.
        stride: tokens from window to window; of scoring causal models alone.
        seed: draws the tokens that are masked, in scoring.
        name: on the command line.
        unit: "tokens" or "examples", which `count` counts.
        sampled: "windows" or "examples", what outcomes are of.
        libraries: optional libraries that the scores need.
        has_labels: the model has classes, by names.
        min_length: tokens that an example has to have for anything to be learned from it.
    """

    tokenizer: PreTrainedTokenizerBase
    columns: Columns
    length: int
    stride: int = 1
    seed: int = 0

    name: ClassVar[str]
    unit: ClassVar[str] = "examples"
    sampled: ClassVar[str] = "examples"
    libraries: ClassVar[tuple[str, ...]] = ()
    has_labels: ClassVar[bool] = False
    min_length: ClassVar[int] = 1
    scores: ClassVar[tuple[Score, ...]]

    def __post_init__(self) -> None:
        if self.length < self.min_length:
            raise TrainingError(
                f"{called('length')} is {self.length}; task {self.name} needs at least {self.min_length}"
            )

    @property
    def settings(self) -> dict[str, int]:
        """What has to be known to repeat the scores."""
        return {"length": self.length}

    @abstractmethod
    def examples(self, rows: Dataset, labels: Sequence[str]) -> list:
        """The examples to score, in order; `labels` are the model's classes.

        Raises:
            DataError: the rows do not fit the task.
        """

    @abstractmethod
    def outcomes(self, model: PreTrainedModel, batch: Sequence) -> list[Outcome]:
        """What a model does with each example of a batch."""

    def count(self, outcomes: Sequence[Outcome]) -> int:
        """How many of `unit` were scored."""
        return len(outcomes)

    def counted(self, outcomes: Sequence[Outcome]) -> list[Outcome]:
        """The outcomes in which something was scored; the same ones for every model."""
        return list(outcomes)

    @abstractmethod
    def training_examples(self, rows: Dataset, labels: Sequence[str], tasks: texts.Tasks | None) -> Dataset:
        """The examples to train on.

        Args:
            labels: the model's classes.
            tasks: the tasks that routers choose by; None: they choose by token.

        Raises:
            DataError: the rows do not fit the task.
        """

    def held_out_examples(self, rows: Dataset, labels: Sequence[str], tasks: texts.Tasks | None) -> Dataset:
        """The examples to evaluate on while training: the same ones at every evaluation; as for training."""
        return self.training_examples(rows, labels, tasks)

    @abstractmethod
    def losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """(B, 2 or 3): summed loss in nats, what it is summed over, and right ones, of a batch's examples.

        Args:
            logits: (B, T, V) or (B, classes).
            labels: (B, T), -100 where a token does not count, or (B,).
        """

    @abstractmethod
    def collator(self, model: PreTrainedModel) -> Callable[[list], Mapping]:
        """Makes batches of training examples."""

    def prepare(self, model: PreTrainedModel) -> None:  # noqa: B027 - most models need nothing
        """Set in a loaded model's config what it has to know of the batches."""

    def largest_token(self, examples: Dataset) -> int:
        """The largest id in training examples, and of the tokens that training adds to them or to configs."""
        from datasets import Value

        special = (getattr(self.tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos"))
        largest = [token for token in special if isinstance(token, int)]
        for name in ("input_ids", "labels"):
            if isinstance(getattr(examples.features.get(name), "feature", None), Value):  # a list of numbers
                for chunk in examples.data.column(name).chunks:
                    largest += [int(ids.max()) for ids in [chunk.flatten().to_numpy()] if len(ids)]
        return max(largest, default=0)

    def model_inputs(
        self, model: PreTrainedModel, batch: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """A batch on the model's device.

        Raises:
            DataError: the model does not embed all of its tokens.
        """
        ids = batch["input_ids"]
        check_token_ids(model, str(model.name_or_path), int(ids.max()) if ids.numel() else 0, self.tokenizer)
        return {name: tensor.to(model.device) for name, tensor in batch.items()}


# ---------------------------------------------------------------------------------------------------
# Language models


LARGEST_LOSS = 700.0  # nats; exp of more is no float64


def windows(num_tokens: int, length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, first scored place) of a text's windows; all tokens but the first are scored once."""
    scored = 1
    for start in range(0, max(num_tokens - 1, 0), stride):
        end = min(start + length, num_tokens)
        yield start, end, scored
        scored = end
        if end == num_tokens:
            return


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(B, 2) float32: each row's summed negative log-likelihood in nats, and its number of labels.

    Args:
        logits: (B, T, V), of the tokens that `labels` names.
        labels: (B, T), -100 where a token does not count.
    """
    losses = torch.nn.functional.cross_entropy(logits.float().mT, labels, reduction="none")
    return torch.stack([losses.sum(-1), (labels != -100).sum(-1).float()], dim=-1)


def _losses_and_counts(outcomes: Sequence[Outcome]) -> np.ndarray:
    """(N, 2) from outcomes that begin with (summed loss, tokens)."""
    return np.array([outcome[:2] for outcome in outcomes])


def _perplexity(losses_and_counts: np.ndarray) -> float:
    """exp of the mean negative log-likelihood per token, in nats."""
    loss, count = losses_and_counts.sum(0)
    return float(np.exp(min(loss / count, LARGEST_LOSS)))


def _hits_and_counts(outcomes: Sequence[Outcome]) -> np.ndarray:
    """(N, 2) from outcomes (summed loss, tokens, right ones)."""
    return np.array([(hits, count) for _, count, hits in outcomes])


def _hit_rate(hits_and_counts: np.ndarray) -> float:
    hits, count = hits_and_counts.sum(0)
    return float(hits / count)


PERPLEXITY = Score(
    "perplexity", _perplexity, _losses_and_counts, hub="perplexity", label="Perplexity", is_ratio=True
)


class _LanguageTask(Task):
    """Scores tokens; outcomes begin with (summed negative log-likelihood in nats, tokens)."""

    unit = "tokens"
    sampled = "windows"

    def count(self, outcomes: Sequence[Outcome]) -> int:
        return int(sum(outcome[1] for outcome in outcomes))

    def counted(self, outcomes: Sequence[Outcome]) -> list[Outcome]:
        return [outcome for outcome in outcomes if outcome[1]]

    def training_examples(self, rows: Dataset, labels: Sequence[str], tasks: texts.Tasks | None) -> Dataset:
        return texts.language_blocks(rows, self.tokenizer, self.columns.text, self.length, tasks)


class Causal(_LanguageTask):
    """The next token. An example is (token ids of a window, place of the first token that is scored)."""

    name = "causal"
    min_length = 2  # nothing predicts the first token
    scores = (PERPLEXITY,)

    @property
    def settings(self) -> dict[str, int]:
        return super().settings | {"stride": self.stride}

    def examples(self, rows: Dataset, labels: Sequence[str]) -> list:
        found = []
        for text in rows[self.columns.text]:
            ids = self.tokenizer(text, verbose=False)["input_ids"]
            for start, end, scored in windows(len(ids), self.length, self.stride):
                found.append((ids[start:end], scored - start))
        return found

    def outcomes(self, model: PreTrainedModel, batch: Sequence) -> list[Outcome]:
        rows = [{"input_ids": ids} for ids, _ in batch]
        pad = padding_token(self.tokenizer, embedding_rows(model))
        inputs = self.model_inputs(model, pad_rows(rows, pad))
        labels = torch.full_like(inputs["input_ids"], -100)
        for row, (ids, first) in enumerate(batch):
            labels[row, first : len(ids)] = inputs["input_ids"][row, first : len(ids)]
        losses = self.losses(model(**inputs).logits, labels)
        return [(loss, int(count)) for loss, count in losses.tolist()]

    def losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return token_losses(logits[:, :-1], labels[:, 1:])

    def collator(self, model: PreTrainedModel) -> Callable[[list], Mapping]:
        return _next_tokens


def _next_tokens(blocks: Sequence[Mapping]) -> dict[str, torch.Tensor]:
    """A batch of blocks, whose tokens are all to be predicted: blocks have no padding."""
    batch = pad_rows(blocks, pad=0)
    return batch | {"labels": batch["input_ids"].clone()}


class Masked(_LanguageTask):
    """Masked tokens. An outcome is (summed loss, masked tokens, right ones) of a window."""

    name = "masked"
    scores = (PERPLEXITY, Score("accuracy", _hit_rate, _hits_and_counts, hub="accuracy", label="Accuracy"))

    @property
    def settings(self) -> dict[str, int]:
        return super().settings | {"seed": self.seed}

    def examples(self, rows: Dataset, labels: Sequence[str]) -> list:
        collator = self._masking(seed=self.seed)
        blocks = texts.language_blocks(rows, self.tokenizer, self.columns.text, self.length)
        return [collator([row]) for row in blocks]

    def outcomes(self, model: PreTrainedModel, batch: Sequence) -> list[Outcome]:
        inputs = self.model_inputs(model, {name: torch.cat([b[name] for b in batch]) for name in batch[0]})
        labels = inputs.pop("labels")
        found = self.losses(model(**inputs).logits, labels).tolist()
        return [(loss, int(count), int(hits)) for loss, count, hits in found]

    def losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        hits = (logits.argmax(-1) == labels).sum(-1, keepdim=True)
        return torch.cat([token_losses(logits, labels), hits.float()], dim=-1)

    def held_out_examples(self, rows: Dataset, labels: Sequence[str], tasks: texts.Tasks | None) -> Dataset:
        masking = self._masking(seed=self.seed)

        def mask(block: dict) -> dict:
            return {name: values[0].tolist() for name, values in masking([block]).items()}

        blocks = self.training_examples(rows, labels, tasks)
        return blocks.map(mask, load_from_cache_file=False)  # a cached one may be of another seed

    def collator(self, model: PreTrainedModel) -> Callable[[list], Mapping]:
        masking = self._masking()

        def collate(blocks: list) -> Mapping:  # those of held-out data are masked already
            return pad_rows(blocks, pad=0) if "labels" in blocks[0] else masking(blocks)

        return collate

    def largest_token(self, examples: Dataset) -> int:
        return max(super().largest_token(examples), len(self.tokenizer) - 1)  # a tenth is any token

    def _masking(self, seed: int | None = None) -> Callable[[list], Mapping]:
        """Masks 15 % of the tokens of blocks, never the special ones.

        Raises:
            TrainingError: the tokenizer has no mask token.
        """
        from transformers import DataCollatorForLanguageModeling

        if self.tokenizer.mask_token is None:
            raise TrainingError("the tokenizer has no mask token; expected one that was made for task masked")
        masking = DataCollatorForLanguageModeling(self.tokenizer, seed=seed)

        def collate(blocks: list) -> Mapping:
            batch = pad_rows(blocks, pad=0)  # blocks have no padding
            return batch | masking(list(batch["input_ids"]))

        return collate


# ---------------------------------------------------------------------------------------------------
# Encoder-decoders


BLEU_WORDS = 4  # of its longest n-grams


def _mean(values: np.ndarray) -> float:
    return float(values.mean())


def _exact(outcomes: Sequence[Outcome]) -> np.ndarray:
    return np.array([float(text == target.strip()) for text, target in outcomes])


def _corpus_statistics(metric: str, outcomes: Sequence[Outcome]) -> np.ndarray:
    """Counts per example from which sacrebleu computes a corpus score."""
    from sacrebleu import metrics

    options = {"force": True} if metric == "BLEU" else {}  # no warning of texts that look tokenized
    found, targets = zip(*outcomes, strict=True)
    return np.array(getattr(metrics, metric)(**options)._extract_corpus_statistics(found, [list(targets)]))


def _corpus_score(metric: str, statistics: np.ndarray) -> float:
    from sacrebleu import metrics

    totals = statistics.sum(0).tolist()
    return float(getattr(metrics, metric)()._compute_score_from_stats(totals).score)


def _rouge_l(outcomes: Sequence[Outcome]) -> np.ndarray:
    """F-measure of the longest common subsequence, in per cent."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    return np.array([100 * scorer.score(target, text)["rougeL"].fmeasure for text, target in outcomes])


def _of_corpus(name: str, metric: str, **options: Any) -> Score:
    """A corpus score of sacrebleu; `metric` is its class."""
    function, statistics = partial(_corpus_score, metric), partial(_corpus_statistics, metric)
    return Score(name, function, statistics, **options)


def _too_short_for_bleu(statistics: np.ndarray) -> str | None:
    """BLEU multiplies the precisions of 1 to 4 words; of shorter targets no text can match four."""
    longest = int(statistics[:, 1].max())  # lengths of text and target, then counts
    if longest >= BLEU_WORDS:
        return None
    return f"BLEU matches {BLEU_WORDS} words in a row, and the longest target has {longest}"


class Seq2Seq(Task):
    """Text from text. An example is (source, target), an outcome (generated text, target)."""

    name = "seq2seq"
    libraries = ("sacrebleu", "rouge_score")
    scores = (
        Score("exact_match", _mean, _exact, hub="exact_match", label="Exact match", is_rate=True),
        _of_corpus("bleu", "BLEU", hub="sacrebleu", label="BLEU", undefined=_too_short_for_bleu),
        _of_corpus("chrf", "CHRF", hub="chrf", label="chrF"),
        Score("rouge_l", _mean, _rouge_l, hub="rouge", label="ROUGE-L"),
    )

    def examples(self, rows: Dataset, labels: Sequence[str]) -> list:
        return list(zip(rows[self.columns.text], rows[self.columns.target], strict=True))

    def outcomes(self, model: PreTrainedModel, batch: Sequence) -> list[Outcome]:
        sources, targets = zip(*batch, strict=True)
        encoded = self.tokenizer(list(sources), truncation=True, max_length=self.length)["input_ids"]
        rows = [{"input_ids": ids} for ids in encoded]
        pad = padding_token(self.tokenizer, embedding_rows(model))
        inputs = self.model_inputs(model, pad_rows(rows, pad))
        generator: Any = model  # not every `PreTrainedModel` can; those of this task can
        tokens = generator.generate(**inputs, max_new_tokens=self.length, do_sample=False, num_beams=1)
        found = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [(text.strip(), target) for text, target in zip(found, targets, strict=True)]

    def losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return token_losses(logits, labels)

    def training_examples(self, rows: Dataset, labels: Sequence[str], tasks: texts.Tasks | None) -> Dataset:
        return texts.pairs(rows, self.tokenizer, self.columns, self.length, tasks)

    def collator(self, model: PreTrainedModel) -> Callable[[list], Mapping]:
        shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)

        def collate(rows: list) -> Mapping:
            batch = pad_rows(rows, padding_token(self.tokenizer, embedding_rows(model)))
            # Label smoothing takes the labels from what the model is given.
            return batch | ({"decoder_input_ids": shift(batch["labels"])} if shift else {})

        return collate


# ---------------------------------------------------------------------------------------------------
# Classification


def _hits(outcomes: Sequence[Outcome]) -> np.ndarray:
    return np.array([float(found == expected) for found, expected in outcomes])


def _macro_f1(found_and_expected: np.ndarray) -> float:
    from sklearn.metrics import f1_score

    found, expected = found_and_expected.T
    options: dict[str, Any] = {"zero_division": 0.0}  # the default is a text
    return float(f1_score(expected, found, average="macro", **options))


def class_names(config: PretrainedConfig) -> tuple[str, ...]:
    """The names of a model's classes, in the order of their indices."""
    known: dict[Any, str] = config.id2label or {}
    return tuple(str(known[number]) for number in sorted(known))


class Classification(Task):
    """A class for a text. An outcome is (index of the class found, index of the one expected)."""

    name = "classification"
    libraries = ("sklearn",)
    has_labels = True
    scores = (
        Score("accuracy", _mean, _hits, hub="accuracy", label="Accuracy", is_rate=True),
        Score("f1", _macro_f1, np.array, hub="f1", label="F1, macro average"),
    )

    def examples(self, rows: Dataset, labels: Sequence[str]) -> list:
        return list(texts.labelled(rows, self.tokenizer, self.columns, self.length, labels))

    def outcomes(self, model: PreTrainedModel, batch: Sequence) -> list[Outcome]:
        pad = padding_token(self.tokenizer, embedding_rows(model))
        inputs = self.model_inputs(model, pad_rows(batch, pad))
        expected = inputs.pop("labels").tolist()
        return list(zip(model(**inputs).logits.argmax(-1).tolist(), expected, strict=True))

    def losses(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
        hits = (logits.argmax(-1) == labels).float()
        return torch.stack([loss, torch.ones_like(loss), hits], dim=-1)

    def training_examples(self, rows: Dataset, labels: Sequence[str], tasks: texts.Tasks | None) -> Dataset:
        return texts.labelled(rows, self.tokenizer, self.columns, self.length, labels, tasks)

    def collator(self, model: PreTrainedModel) -> Callable[[list], Mapping]:
        return partial(pad_rows, pad=padding_token(self.tokenizer, embedding_rows(model)))

    def prepare(self, model: PreTrainedModel) -> None:
        """Name the padding of the batches in the config, and in a tokenizer that names none.

        Heads of decoders read the last token that is not the config's padding token, by its number. The
        config of a model that counts positions from its padding token is left as it is.
        """
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if not counts_from_padding(model):
            pad = padding_token(self.tokenizer, embedding_rows(model))
            model.config.get_text_config().pad_token_id = pad


TASKS: dict[str, type[Task]] = {task.name: task for task in (Causal, Masked, Seq2Seq, Classification)}
