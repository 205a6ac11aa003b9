"""Measure how far an artifact is from its dense model on held-out calibration text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..artifact.loading import load_alone
from ..errors import DataError
from ..source.architecture import main_auto_class
from .batches import NOTHING_COUNTS, TOKENS_PER_IMAGE, Batch, is_divisible, num_examples, prediction_mask
from .dense_run import DenseRun
from .stream import keep_no_cache, run_batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.utils.generic import ModelOutput

# Logits of so many tokens are compared; they are kept in memory.
MAX_TOKENS = 4096
# Perplexities end at e**700: no number of tokens is as large.
MAX_LOSS = 700.0


@dataclass(frozen=True)
class Divergence:
    """Means over held-out tokens.

    Attributes:
        tokens: number of tokens.
        nats: Kullback-Leibler divergence of the artifact's distribution over tokens (or classes) from the
            dense model's, in nats per token; None for models without logits.
        difference: relative difference of the last hidden states, for those.
        dense_perplexity / perplexity: of the dense model and of the artifact; None for models that do not
            generate text.
    """

    tokens: int
    nats: float | None
    difference: float | None
    dense_perplexity: float | None
    perplexity: float | None

    @property
    def distance(self) -> float:
        """`nats` or `difference`, whichever there is; infinite if it is not finite."""
        found = self.difference if self.nats is None else self.nats
        return found if found is not None and math.isfinite(found) else math.inf

    def in_words(self, reference: str = "the dense model") -> str:
        """One sentence. `reference`: what the artifact is compared with."""
        measured = f"Measured on {self.tokens:,} held-out tokens:"
        if self.nats is None:
            return f"{measured} the relative difference of the last hidden states is {self.difference:.3f}."
        line = f"{measured} {self.nats:.3g} nats of divergence from {reference}"
        if self.perplexity is None:
            return f"{line}."
        return f"{line}, perplexity {self.perplexity:.4g} instead of {self.dense_perplexity:.4g}."


def measure_divergence(run: DenseRun, folder: Path) -> Divergence:
    """Compare the artifact in a folder with its dense model on the batches that are held out.

    Raises:
        DataError: no token is scored.
    """
    import transformers

    held_out = limited(run.held_out, MAX_TOKENS)
    auto_class = main_auto_class(run.checkpoint.config, run.plan.model_type)
    sums = DivergenceSums(auto_class, run.is_causal)
    with torch.no_grad():
        with run.streamed() as model:
            expected = [compared_output(run_batch(model, batch)) for batch in held_out]
        cls = getattr(transformers, auto_class)
        model = load_alone(cls, str(folder), run.device, dtype="auto", trust_remote_code=True)
        keep_no_cache(model)
        for batch in held_out:
            sums.add(model, batch, expected.pop(0), compared_output(run_batch(model, batch)))
    return sums.result()


@dataclass(frozen=True, eq=False)
class ComparedOutput:
    """Outputs that two models are compared by, in float32 on the CPU.

    Attributes:
        values: (…, classes) logits, or (…, features) last hidden states.
    """

    values: Tensor
    has_logits: bool


def compared_output(output: ModelOutput) -> ComparedOutput:
    """The logits; of a model without logits its first output, the last hidden states."""
    logits = output.get("logits")
    return ComparedOutput((output[0] if logits is None else logits).float().cpu(), logits is not None)


class DivergenceSums:
    """Sums over batches of how far one model's outputs are from a dense model's.

    Args:
        auto_class: the Auto class of both; it says whether the text itself can be scored.
        is_causal: see `batches.is_causal`.
    """

    def __init__(self, auto_class: str, is_causal: bool) -> None:
        self.auto_class, self.is_causal = auto_class, is_causal
        self.tokens = self.labels = 0
        self.nats = self.squares = self.norm = 0.0
        self.losses = [0.0, 0.0]  # dense model, artifact
        self.has_logits = False

    def add(self, model: PreTrainedModel, batch: Batch, dense: ComparedOutput, ours: ComparedOutput) -> None:
        """Add the outputs of both models for a batch, where they are scored (see `prediction_mask`)."""
        mask = self._mask(model, batch, ours.values)
        if dense.has_logits:
            labels = text_labels(batch, self.auto_class)
            labels = None if labels is None else labels[mask]
            self._add_logits(dense.values[mask], ours.values[mask], labels)
        else:
            self._add_states(dense.values[mask], ours.values[mask])

    @property
    def loss(self) -> float:
        """Divergence in nats per token; without logits half the squared difference of the hidden states.

        Raises DataError if no token is scored.
        """
        self._check_counted()
        return (self.nats if self.has_logits else self.squares / 2) / self.tokens

    def result(self) -> Divergence:
        """The means. Raises DataError if no token is scored."""
        self._check_counted()
        if not self.has_logits:
            difference = (self.squares / self.norm) ** 0.5 if self.norm else 0.0
            return Divergence(self.tokens, None, difference, None, None)
        dense, ours = (self._perplexity(loss) for loss in self.losses)
        return Divergence(self.tokens, self.nats / self.tokens, None, dense, ours)

    def _perplexity(self, loss: float) -> float | None:
        return math.exp(min(loss / self.labels, MAX_LOSS)) if self.labels else None

    def _check_counted(self) -> None:
        if not self.tokens:
            raise DataError(NOTHING_COUNTS.format("on which models are compared"))

    def _mask(self, model: PreTrainedModel, batch: Batch, output: Tensor) -> Tensor:
        """Boolean mask of the scored positions of an output, without its last axis."""
        mask = prediction_mask(model, batch, self.is_causal)
        if mask is None or mask.shape != output.shape[:-1]:
            return torch.ones(output.shape[:-1], dtype=torch.bool)
        return mask.bool().cpu()

    def _add_states(self, dense: Tensor, ours: Tensor) -> None:
        """Hidden states (tokens, features)."""
        self.tokens += len(ours)
        self.squares += float((ours - dense).square().sum())
        self.norm += float(dense.square().sum())

    def _add_logits(self, dense: Tensor, ours: Tensor, labels: Tensor | None) -> None:
        """Logits (tokens, classes) and the text's own labels (tokens,)."""
        self.has_logits = True
        self.tokens += len(ours)
        dense, ours = dense.log_softmax(-1), ours.log_softmax(-1)
        kl = nn.functional.kl_div(ours, dense, log_target=True, reduction="sum")
        self.nats += float(kl)
        if labels is not None:
            self.labels += int((labels != -100).sum())
            for k, log_probabilities in enumerate((dense, ours)):
                loss = nn.functional.nll_loss(log_probabilities, labels, ignore_index=-100, reduction="sum")
                self.losses[k] += float(loss)


def limited(batches: list[Batch], tokens: int) -> list[Batch]:
    """The first batches with at most so many tokens in all; at least one example."""
    found: list[Batch] = []
    left = tokens
    for batch in batches:
        count = num_examples(batch)
        each = batch["input_ids"].shape[1:].numel() if "input_ids" in batch else TOKENS_PER_IMAGE
        rows = min(max(left // each, 0 if found else 1), count)
        if rows and not is_divisible(batch):
            found.append(batch)
        elif rows:
            found.append({name: tensor[:rows] for name, tensor in batch.items()})
        left -= rows * each
    return found


def text_labels(batch: Batch, auto_class: str) -> Tensor | None:
    """The labels that the text itself gives at every position, -100 for none; None: the model has no text."""
    causal = auto_class in ("AutoModelForCausalLM", "AutoModelForImageTextToText")
    if causal and "input_ids" in batch and "pixel_values" not in batch:  # places of images are no text
        ids = batch["input_ids"]
        labels = torch.full_like(ids, -100)
        labels[:, :-1] = ids[:, 1:]
        if "attention_mask" in batch:
            labels[:, :-1][batch["attention_mask"][:, 1:] == 0] = -100
        return labels.cpu()
    if auto_class == "AutoModelForSeq2SeqLM" and "labels" in batch:
        return batch["labels"].cpu()
    return None
