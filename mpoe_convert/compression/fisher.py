"""Collect second moments of the gradients at every FFN: the Fisher information of the model's predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import DataError
from ..planning.plan import MatrixPlan
from ..source.matrices import read_matrix
from .batches import (
    NOTHING_COUNTS,
    TOKENS_PER_IMAGE,
    Batch,
    evenly_spread,
    is_divisible,
    num_examples,
    prediction_mask,
    token_rows,
)
from .dense_run import DenseRun, Progress
from .moments import add_to, observed_side
from .stream import check_activations, projection_modules, run_batch

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel

# Gradients are taken on at most so many tokens, and on so many at a time.
GRADIENT_TOKENS = 32768
GRAPH_TOKENS = 2048
# Logits are divided by this before gradients are taken. At temperature 1 gradients vanish where the model is
# confident, although a deep truncation would change its mind.
TEMPERATURE = 2.0


def gradient_moments(
    run: DenseRun, model: PreTrainedModel, progress: Progress
) -> dict[str, dict[str, Tensor]]:
    """Per FFN and matrix, second moments of the gradient of `sampled_loss` on the matrix's thin side.

    Half of what they give is the expected divergence from the dense model at `TEMPERATURE`, times its square
    as in distillation, in nats per token.

    Args:
        model: the dense model, whole.

    Returns:
        Empty in other processes than the first. By path,
        "up.gradient" (n, n) and so on, and "up.gradient_mean" (), the mean square of the outputs'
        gradient: sums over the FFN's tokens per scored prediction, in float32.

    Raises:
        DataError: no label is scored.
        CheckpointError: a gradient is NaN or Inf.
    """
    sums = _GradientSums(run, model)

    def begin(batch: Batch) -> None:
        sums.batch = batch

    try:
        scored = run_backward(run, model, begin, progress)
    finally:
        sums.remove()
    return sums.per(scored)


def run_backward(
    run: DenseRun, model: PreTrainedModel, begin: Callable[[Batch], None], progress: Progress
) -> int:
    """Take gradients of `sampled_loss` at every activation, each process on its share of the batches.

    Labels are sampled by a generator per piece, so that they do not depend on the number of processes.

    Args:
        model: whole; its parameters get no gradients.
        begin: called with every batch before it runs.

    Returns:
        The number of scored predictions of all processes.

    Raises:
        DataError: no label is scored.
    """
    model.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)
    ranks, scored = run.ranks, 0
    pieces = list(enumerate(graph_sized(run.fitted_to)))[ranks.rank :: ranks.count]
    for done, (number, piece) in enumerate(pieces):
        begin(piece)
        with torch.enable_grad():
            generator = torch.Generator().manual_seed(number)
            loss, count = sampled_loss(model, piece, generator, run.is_causal)
            loss.backward()
        scored += count
        model.get_input_embeddings().zero_grad(set_to_none=True)
        progress("gradients", done + 1, len(pieces))
    total = sum(ranks.gathered(scored))
    if not total:
        raise DataError(NOTHING_COUNTS.format("that gradients are taken of"))
    return total


class _GradientSums:
    """Hooks that sum the products of gradients, FFN by FFN.

    Attributes:
        batch: the one that runs.
    """

    def __init__(self, run: DenseRun, model: PreTrainedModel) -> None:
        self.run, self.model = run, model
        self.batch: Batch = {}
        self.sums: dict[str, dict[str, Tensor]] = {ffn.ffn.path: {} for ffn in run.plan.ffns}
        self.handles: list[RemovableHandle] = []
        for ffn in run.plan.ffns:
            modules = projection_modules(model, run.plan.family, ffn)
            for matrix in ffn.matrices:
                hook = partial(self._forward, ffn.ffn.path, matrix)
                self.handles.append(modules[matrix.role].register_forward_hook(hook))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def per(self, scored: int) -> dict[str, dict[str, Tensor]]:
        """The sums of all processes divided by the number of scored predictions."""
        means = {}
        for path, own in self.sums.items():
            found = self.run.ranks.add_up(own)
            if not self.run.ranks.is_first:
                continue
            for name, value in found.items():
                check_activations(value, f"{path} (gradients, {name})")
            means[path] = {name: (value / scored).float() for name, value in found.items()}
        return means

    def _forward(
        self, path: str, matrix: MatrixPlan, module: nn.Module, args: tuple[Tensor, ...], output: Tensor
    ) -> None:
        output.register_hook(partial(self._backward, path, matrix))

    def _backward(self, path: str, matrix: MatrixPlan, gradient: Tensor) -> None:
        source = matrix.source
        if source.part is not None:
            gradient = gradient.chunk(2, dim=-1)[source.part]
        rows = token_rows(self.model, self.batch, path, gradient)
        mean = rows.square().mean(1).sum().double()
        if observed_side(matrix) == "in":
            rows = rows @ read_matrix(self.run.checkpoint, source, self.run.device).mT.to(rows)
        add_to(self.sums[path], f"{matrix.role}.gradient", (rows.mT @ rows).double())
        add_to(self.sums[path], f"{matrix.role}.gradient_mean", mean)


def graph_sized(batches: Sequence[Batch]) -> Iterator[Batch]:
    """At most `GRADIENT_TOKENS`, evenly spread over the batches, in pieces of about `GRAPH_TOKENS`."""
    sizes = [
        b["input_ids"].numel() if "input_ids" in b else TOKENS_PER_IMAGE * num_examples(b) for b in batches
    ]
    wanted = min(len(batches), -(-GRADIENT_TOKENS * len(batches) // sum(sizes)))
    for number in evenly_spread(len(batches), wanted):
        batch = batches[number]
        if not is_divisible(batch):
            yield batch
            continue
        rows = max(GRAPH_TOKENS * num_examples(batch) // sizes[number], 1)
        parts = {name: tensor.split(rows) for name, tensor in batch.items()}
        for values in zip(*parts.values(), strict=True):
            yield dict(zip(parts, values, strict=True))


def sampled_loss(
    model: PreTrainedModel, batch: Batch, generator: torch.Generator, is_causal: bool
) -> tuple[Tensor, int]:
    """(sum of the loss over scored predictions, their number).

    Labels are sampled from the model's own distribution at `TEMPERATURE`; the loss is the cross-entropy times
    the temperature. The second moments of its gradients are then the Fisher information. For models without
    logits, the loss is the product of the last hidden states with standard normal numbers, and half of the
    moments give their squared difference.
    """
    output = run_batch(model, batch)
    logits = output.get("logits")
    values = (output[0] if logits is None else logits).float()
    mask = prediction_mask(model, batch, is_causal)
    if mask is not None and mask.shape == values.shape[:-1]:
        values = values[mask.bool().to(values.device)]
    values = values.flatten(0, -2)
    if logits is None or logits.shape[-1] == 1:
        probe = torch.randn(values.shape, generator=generator).to(values.device)
        return (values * probe).sum(), len(values)
    values = values / TEMPERATURE
    probabilities = values.detach().softmax(-1).cpu()
    labels = probabilities.multinomial(1, generator=generator)[:, 0].to(values.device)
    return TEMPERATURE * nn.functional.cross_entropy(values, labels, reduction="sum"), len(values)
