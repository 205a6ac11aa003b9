"""How far an artifact is from its dense model on calibration text that it was not fitted to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..artifact.loading import from_pretrained
from ..errors import DataError
from ..planning.plan import Plan
from ..source.architecture import main_auto_class
from ..source.checkpoint import Checkpoint
from .batches import NOTHING_COUNTS, Batch, prediction_mask, says_next, split
from .stream import keep_no_cache, run_batch, streamed_model

# Logits of so many tokens are compared; they are kept in memory.
MAX_TOKENS = 4096
IMAGE_TOKENS = 256  # for as many counts an example that is not made of tokens


@dataclass(frozen=True)
class Divergence:
    """Means over held-out tokens.

    Attributes:
        tokens: number of tokens.
        nats: Kullback-Leibler divergence of the artifact's distribution over tokens (or classes) from the
            dense model's; None for models without logits.
        difference: relative difference of the last hidden states, for models without logits.
        dense_perplexity / perplexity: of the dense model and of the artifact; None where the model predicts
            no text of its own.
    """

    tokens: int
    nats: float | None
    difference: float | None
    dense_perplexity: float | None
    perplexity: float | None

    @property
    def distance(self) -> float:
        """The number that is compared; infinite if the artifact's outputs are not finite."""
        found = self.difference if self.nats is None else self.nats
        return found if math.isfinite(found) else math.inf

    def in_words(self) -> str:
        measured = f"Measured on {self.tokens:,} held-out tokens:"
        if self.nats is None:
            return f"{measured} the relative difference of the last hidden states is {self.difference:.3f}."
        line = f"{measured} {self.nats:.3g} nats of divergence from the dense model"
        if self.perplexity is None:
            return f"{line}."
        return f"{line}, perplexity {self.perplexity:.4g} instead of {self.dense_perplexity:.4g}."


def measure(
    plan: Plan, checkpoint: Checkpoint, folder: Path, batches: Sequence[Batch], device: torch.device
) -> Divergence:
    """Compare the artifact in a folder with its dense model on the batches that are held out."""
    import transformers

    held_out = limited(split(batches)[1], MAX_TOKENS)
    auto_class = main_auto_class(checkpoint.config, plan.model_type)
    comparison = Comparison(auto_class, says_next(checkpoint))
    with torch.no_grad():
        with streamed_model(plan, checkpoint, device) as model:
            expected = [compared_output(run_batch(model, batch)) for batch in held_out]
        model = (
            from_pretrained(
                getattr(transformers, auto_class), str(folder), dtype="auto", trust_remote_code=True
            )
            .to(device)
            .eval()
        )
        keep_no_cache(model)
        for batch in held_out:
            comparison.add(model, batch, expected.pop(0), compared_output(run_batch(model, batch)))
    return comparison.result()


class Comparison:
    """Sums over batches of how far one model's outputs are from another's.

    Args:
        auto_class: whose heads both are; says whether the text itself can be scored.
        says_next: see `batches.says_next`.
    """

    def __init__(self, auto_class: str, says_next: bool):
        self.auto_class, self.says_next = auto_class, says_next
        self.tokens = self.labels = 0
        self.nats = self.squares = self.norm = 0.0
        self.losses = [0.0, 0.0]  # dense model, artifact
        self.has_logits = False

    def add(self, model, batch: Batch, theirs: tuple[Tensor, bool], ours: tuple[Tensor, bool]) -> None:
        """Outputs of both models for a batch, as `compared_output` gives them; see `prediction_mask`."""
        (theirs, has_logits), ours = theirs, ours[0]
        mask = self._mask(model, batch, ours)
        if has_logits:
            self._add_odds(theirs[mask], ours[mask], _next(batch, self.auto_class), mask)
        else:
            self._add_states(theirs[mask], ours[mask])

    @property
    def loss(self) -> float:
        """Divergence in nats per token; without logits half the squared difference of the hidden states.

        Raises DataError if no place counted.
        """
        self._check_counted()
        return (self.nats if self.has_logits else self.squares / 2) / self.tokens

    def _check_counted(self) -> None:
        if not self.tokens:
            raise DataError(NOTHING_COUNTS.format("on which models are compared"))

    def _mask(self, model, batch: Batch, output: Tensor) -> Tensor:
        """Which places of an output count."""
        mask = prediction_mask(model, batch, self.says_next)
        if mask is None or mask.shape != output.shape[:-1]:
            return torch.ones(output.shape[:-1], dtype=torch.bool)
        return mask.bool().cpu()

    def _add_states(self, theirs: Tensor, ours: Tensor) -> None:
        self.tokens += len(ours)
        self.squares += float((ours - theirs).square().sum())
        self.norm += float(theirs.square().sum())

    def _add_odds(self, theirs: Tensor, ours: Tensor, labels: Tensor | None, mask: Tensor) -> None:
        """Logits (tokens, classes) and what the text says there, before the mask."""
        self.has_logits = True
        self.tokens += len(ours)
        theirs, ours = theirs.log_softmax(-1), ours.log_softmax(-1)
        kl = nn.functional.kl_div(ours, theirs, log_target=True, reduction="sum")
        self.nats += float(kl)
        if labels is not None:
            labels = labels[mask]
            self.labels += int((labels != -100).sum())
            for k, odds in enumerate((theirs, ours)):
                loss = nn.functional.nll_loss(odds, labels, ignore_index=-100, reduction="sum")
                self.losses[k] += float(loss)

    def result(self) -> Divergence:
        """Raises DataError if no place counted."""
        self._check_counted()
        if not self.has_logits:
            difference = (self.squares / self.norm) ** 0.5 if self.norm else 0.0
            return Divergence(self.tokens, None, difference, None, None)
        # No number of tokens is as large as e**700.
        losses = [min(loss / self.labels, 700.0) if self.labels else None for loss in self.losses]
        perplexities = [None if loss is None else math.exp(loss) for loss in losses]
        return Divergence(self.tokens, self.nats / self.tokens, None, *perplexities)


def limited(batches: list[Batch], tokens: int) -> list[Batch]:
    """The first batches with at most so many tokens; at least a part of one."""
    found, left = [], tokens
    for batch in batches:
        count = len(next(iter(batch.values())))
        each = batch["input_ids"].shape[1:].numel() if "input_ids" in batch else IMAGE_TOKENS
        rows = min(max(left // each, 0 if found else 1), count)
        if rows:
            found.append({name: tensor[:rows] for name, tensor in batch.items()})
        left -= rows * each
    return found


def compared_output(output) -> tuple[Tensor, bool]:
    """(logits, True), or (the first of what there is, the last hidden states, False)."""
    value = output.get("logits")
    return (output[0] if value is None else value).float().cpu(), value is not None


def _next(batch: Batch, auto_class: str) -> Tensor | None:
    """What the text says at every place, -100 where it says nothing."""
    if auto_class == "AutoModelForCausalLM" and "input_ids" in batch:
        ids = batch["input_ids"]
        labels = torch.full_like(ids, -100)
        labels[:, :-1] = ids[:, 1:]
        if "attention_mask" in batch:
            labels[:, :-1][batch["attention_mask"][:, 1:] == 0] = -100
        return labels.cpu()
    if auto_class == "AutoModelForSeq2SeqLM" and "labels" in batch:
        return batch["labels"].cpu()
    return None
