"""Rule expert-choice: every expert takes its best tokens of a sequence."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..choices import Choices, Context, rule
from ..weights import weigh

if TYPE_CHECKING:
    from ..routers import Router


@rule
def expert_choice(router: "Router", logits: Tensor, bias: Tensor | None, context: Context) -> Choices:
    """Every expert takes the C tokens of a sequence whose probabilities of it are largest.

    Expert choice routing, arXiv 2202.09368: C = ceil(n k / E) of n tokens, padding not counted, where
    k = `router.top_k` is their capacity factor, the experts per token in the mean. With combine "raw" all is
    as in the paper: the weights are the probabilities, and a token that no expert takes gets nothing. Else
    the weights are the softmax over the experts that take a token, and one that none takes goes to its best
    one.

    Args:
        logits: (T, E).
        bias: None: the load is balanced.
    """
    assert bias is None
    chosen = taken(logits.detach().softmax(-1), router.top_k, context)  # (T, E)
    if router.combine != "raw":
        best = torch.zeros_like(chosen).scatter(-1, logits.argmax(-1, keepdim=True), True)
        chosen = chosen | (best & ~chosen.any(-1, keepdim=True))
    experts = logits.argsort(-1, descending=True)  # (T, E), the best first
    chosen, ranked = chosen.gather(-1, experts), logits.gather(-1, experts)
    weights = weigh(router, logits, ranked, experts, chosen, context.inputs)
    return Choices.of_table(experts, weights, chosen)


def taken(probabilities: Tensor, per_token: int, context: Context) -> Tensor:
    """(T, E) which tokens the experts take, of probabilities (T, E)."""
    scores = probabilities.unflatten(0, (context.number, -1))  # (B, L, E)
    length, num_experts = scores.shape[1:]
    most = min(-(-length * per_token // num_experts), length)  # C of a sequence without padding
    if context.mask is None:
        index = scores.topk(most, dim=1).indices  # (B, C, E)
        return torch.zeros_like(scores, dtype=torch.bool).scatter(1, index, True).flatten(0, 1)
    real = context.mask.bool().reshape(context.number, length, 1)  # (B, L, 1)
    index = scores.masked_fill(~real, -1).topk(most, dim=1).indices
    capacity = (real.sum(1, keepdim=True) * per_token + num_experts - 1) // num_experts  # (B, 1, 1)
    places = torch.arange(most, device=scores.device).view(1, -1, 1)
    has_room = (places < capacity).expand_as(index)  # (B, C, E)
    found = torch.zeros_like(scores, dtype=torch.bool).scatter(1, index, has_room)
    return (found & real).flatten(0, 1)
