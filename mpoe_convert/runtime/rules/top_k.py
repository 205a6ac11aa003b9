"""Rule top-k: every token goes to the k experts with the largest logits."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..choices import Choices, rule

if TYPE_CHECKING:
    from ..routers import Router


@rule
def top_k(router: "Router", logits: Tensor, bias: Tensor | None) -> Choices:
    """k = `router.top_k` choices per token (Shazeer et al., arXiv 1701.06538).

    Args:
        logits: (T, E).
        bias: (E,) added to the probabilities to choose experts, never to weigh them (DeepSeek-V3, arXiv
            2412.19437, section 2.1.2).
    """
    k = router.top_k
    if bias is None:
        chosen, experts = logits.topk(k, dim=-1)  # (T, k) each, the largest logit first
    else:
        experts = (logits.softmax(-1) + bias.float()).topk(k, dim=-1).indices  # (T, k)
        chosen = logits.gather(-1, experts)  # (T, k)
    weights = weigh(logits, chosen, experts, router.combine, router.parts)  # (T, k)
    places = torch.arange(logits.shape[0] * k, device=logits.device)  # (T * k,)
    tokens = places.div(k, rounding_mode="floor")  # (T * k,) every token k times
    return Choices(tokens, experts.reshape(-1), weights.reshape(-1), per_token=k)


def weigh(logits: Tensor, chosen: Tensor, experts: Tensor, combine: str, parts: int = 1) -> Tensor:
    """Combine weights (T, k) of k experts per token.

    Args:
        logits: (T, E) of all experts.
        chosen: (T, k) of the chosen experts.
        experts: (T, k) their numbers.
        combine, parts: see `Router`.
    """
    has_copies = parts < logits.shape[-1]  # of the same neurons
    if combine == "renormalised" and has_copies and experts.shape[-1] > 1:
        return chosen.softmax(-1) if parts == 1 else _weigh_parts(logits, chosen, experts, parts)
    log_probability = logits.log_softmax(-1).gather(-1, experts)  # (T, k)
    if combine == "raw":
        return log_probability.exp()
    return _straight_through(log_probability)


def _straight_through(log_probability: Tensor) -> Tensor:
    """p / p.detach() by logarithms, so that p = 0 in float32 gives one as well."""
    return (log_probability - log_probability.detach()).exp()


def _weigh_parts(logits: Tensor, chosen: Tensor, experts: Tensor, parts: int) -> Tensor:
    """(T, k) softmax over those of the chosen experts that hold the same neurons, see `Router`."""
    part = experts % parts  # (T, k)
    same = part.unsqueeze(-1) == part.unsqueeze(-2)  # (T, k, k)
    others = chosen.unsqueeze(-2).masked_fill(~same, -math.inf)
    weights = (chosen - others.logsumexp(-1)).exp()  # (T, k)
    log_probability = logits.log_softmax(-1).gather(-1, experts)  # (T, k)
    return torch.where(same.sum(-1) == 1, _straight_through(log_probability), weights)
