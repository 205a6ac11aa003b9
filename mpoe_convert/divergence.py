"""How far an artifact is from its dense model on calibration text that it was not fitted to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .calibration import Batch, is_held_out, run_batch, streamed_model
from .card import main_auto_class
from .checkpoint import Checkpoint
from .loading import from_pretrained
from .planning import Plan
from .report import Divergence

# Logits of so many tokens are compared; they are kept in memory.
MAX_TOKENS = 8192


def measure(
    plan: Plan, checkpoint: Checkpoint, folder: Path, batches: Sequence[Batch], device: torch.device
) -> Divergence:
    """Compare the artifact in a folder with its dense model on the batches that are held out."""
    import transformers

    held_out = _limited([batch for number, batch in enumerate(batches) if is_held_out(number, batches)])
    auto_class = main_auto_class(checkpoint.config, plan.model_type)
    with torch.no_grad():
        with streamed_model(plan, checkpoint, device) as model:
            outputs = [run_batch(model, batch) for batch in held_out]
        has_logits = outputs[0].get("logits") is not None
        expected = [_output(output) for output in outputs]
        model = (
            from_pretrained(getattr(transformers, auto_class), str(folder), dtype="auto").to(device).eval()
        )
        found = [_output(run_batch(model, batch)) for batch in held_out]
    masks = [_mask(model, batch, output) for batch, output in zip(held_out, found, strict=True)]
    theirs, ours = (
        torch.cat([output[mask] for output, mask in zip(outputs, masks, strict=True)])
        for outputs in (expected, found)
    )
    if not has_logits:
        difference = float((ours - theirs).norm() / theirs.norm())
        return Divergence(len(ours), None, difference, None, None)
    ours, theirs = ours.log_softmax(-1), theirs.log_softmax(-1)
    nats = float((theirs.exp() * (theirs - ours)).sum(-1).mean())
    said = [_next(batch, auto_class) for batch in held_out]
    if any(labels is None for labels in said):
        return Divergence(len(ours), nats, None, None, None)
    labels = torch.cat([label[mask] for label, mask in zip(said, masks, strict=True)])
    perplexities = [
        math.exp(nn.functional.nll_loss(odds, labels, ignore_index=-100)) for odds in (theirs, ours)
    ]
    return Divergence(len(ours), nats, None, *perplexities)


def _limited(batches: list[Batch]) -> list[Batch]:
    """The first batches with at most `MAX_TOKENS` tokens; at least a part of one."""
    found, left = [], MAX_TOKENS
    for batch in batches:
        first = batch[next(iter(batch))]
        rows = max(left * len(first) // first.shape[:2].numel(), 0 if found else 1)
        if rows:
            found.append({name: tensor[:rows] for name, tensor in batch.items()})
        left -= first[:rows].shape[:2].numel()
    return found


def _output(output) -> Tensor:
    """Logits, or the first of what there is (last hidden states)."""
    value = output.get("logits")
    return (output[0] if value is None else value).float().cpu()


def _mask(model, batch: Batch, output: Tensor) -> Tensor:
    """Which places of an output count."""
    mask = batch.get("attention_mask")
    if model.config.is_encoder_decoder:
        mask = batch["labels"] != -100 if "labels" in batch else None
    if mask is None or mask.shape != output.shape[:-1]:
        return torch.ones(output.shape[:-1], dtype=torch.bool)
    return mask.bool().cpu()


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
