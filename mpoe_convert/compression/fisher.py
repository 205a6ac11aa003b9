"""Second moments of the gradients at every FFN: the Fisher information of the model's own predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import DataError
from ..planning.plan import FFNPlan
from ..source.families import Family
from ..source.ffn import Source
from .batches import NOTHING_COUNTS, Batch, _spread, prediction_mask, split, token_rows
from .moments import observed_side
from .stream import check_activations, projection_modules, run_batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Gradients are taken on at most so many tokens, and so many at once.
ANSWER_TOKENS = 32768
GRAPH_TOKENS = 2048
# Odds are softened before gradients are taken: where the model is sure there are none to speak of, until a
# cut is so deep that it is sure no more.
TEMPERATURE = 2.0


def _answers(
    model: PreTrainedModel,
    plans: Sequence[FFNPlan],
    family: Family,
    batches: Sequence[Batch],
    read: Callable[[Source], Tensor],
    progress: Callable[[int, int], None],
    says_next: bool,
) -> dict[str, dict[str, Tensor]]:
    """Per FFN and matrix, second moments of the gradients on its thin side.

    The loss is the negative log-likelihood of what the model itself would say at `TEMPERATURE` (drawn by a
    fixed seed), times the temperature, so that they are those of the Fisher information: half of what they
    give is the expected divergence from the dense model at that temperature, times its square as in
    distillation, in nats per token. For models without logits it is the product of the last hidden states
    with normal numbers, and half of it their squared difference.

    Returns:
        "up.answer" (n, n) and so on, and "up.answer_mean", the mean square of the outputs' gradients: sums
        over what an FFN sees, per prediction.
    """
    sums: dict[str, dict[str, Tensor]] = {plan.ffn.path: {} for plan in plans}
    state = {"batch": {}}
    handles = []

    def watch(path: str, role: str, source: Source, module: nn.Module, side: str) -> None:
        def forward(module, args, output):
            output.register_hook(backward)

        def backward(gradient: Tensor) -> None:
            if source.part is not None:
                gradient = gradient.chunk(2, dim=-1)[source.part]
            rows = token_rows(model, state["batch"], path, gradient)
            found = sums[path]
            mean = rows.square().mean(1).sum().double()
            if side == "in":
                rows = rows @ read(source).mT.to(rows)
            products = (rows.mT @ rows).double()
            for name, value in ((f"{role}.answer", products), (f"{role}.answer_mean", mean)):
                found[name] = found[name] + value if name in found else value

        handles.append(module.register_forward_hook(forward))

    for plan in plans:
        modules = projection_modules(model, family, plan)
        for matrix in plan.matrices:
            side = observed_side(matrix)
            watch(plan.ffn.path, matrix.role, matrix.source, modules[matrix.role], side)
    model.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)
    generator, said = torch.Generator().manual_seed(0), 0
    pieces = list(_pieces(batches))
    for done, piece in enumerate(pieces):
        state["batch"] = piece
        with torch.enable_grad():
            loss, count = _own_loss(model, piece, generator, says_next)
            loss.backward()
        said += count
        model.get_input_embeddings().zero_grad(set_to_none=True)
        progress(done + 1, len(pieces))
    for handle in handles:
        handle.remove()
    if not said:
        raise DataError(NOTHING_COUNTS.format("that gradients are taken of"))
    for path, found in sums.items():
        for name, value in found.items():
            check_activations(value, f"{path} (gradients, {name})")
    return {
        path: {name: (value / said).float().cpu() for name, value in found.items()}
        for path, found in sums.items()
    }


def _pieces(batches: Sequence[Batch]) -> Iterator[Batch]:
    """Those that are not held out, at most `ANSWER_TOKENS` evenly spread, in pieces that a graph can hold."""
    used = split(batches)[0]
    # Inputs that are no tokens: as many as would make a graph if each were of an image's length.
    sizes = [b["input_ids"].numel() if "input_ids" in b else 256 * _count(b) for b in used]
    wanted = min(len(used), -(-ANSWER_TOKENS * len(used) // sum(sizes)))
    for number in _spread(len(used), wanted):
        batch = used[number]
        rows = max(GRAPH_TOKENS * _count(batch) // sizes[number], 1)
        parts = {name: tensor.split(rows) for name, tensor in batch.items()}
        for values in zip(*parts.values(), strict=True):
            yield dict(zip(parts, values, strict=True))


def _count(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def _own_loss(
    model: PreTrainedModel, batch: Batch, generator: torch.Generator, says_next: bool
) -> tuple[Tensor, int]:
    """(sum over predictions, their number); see `_answers`."""
    output = run_batch(model, batch)
    logits = output.get("logits")
    values = (output[0] if logits is None else logits).float()
    mask = prediction_mask(model, batch, says_next)
    if mask is not None and mask.shape == values.shape[:-1]:
        values = values[mask.bool().to(values.device)]
    values = values.flatten(0, -2)
    if logits is None or logits.shape[-1] == 1:
        probe = torch.randn(values.shape, generator=generator).to(values.device)
        return (values * probe).sum(), len(values)
    values = values / TEMPERATURE
    odds = values.detach().softmax(-1).cpu()
    said = odds.multinomial(1, generator=generator)[:, 0].to(values.device)
    return TEMPERATURE * nn.functional.cross_entropy(values, said, reduction="sum"), len(values)
