"""Combine weights of experts that were chosen by their logits."""

import math

import torch
from torch import Tensor


def weigh(
    logits: Tensor,
    ranked: Tensor,
    experts: Tensor,
    combine: str,
    parts: int = 1,
    chosen: Tensor | None = None,
) -> Tensor:
    """Combine weights (T, k) of up to k experts per token; those of experts that are not chosen do not count.

    Args:
        logits: (T, E) of all experts.
        ranked: (T, k) of the experts in question.
        experts: (T, k) their numbers.
        combine, parts: see `Router`.
        chosen: (T, k) which of them are chosen, one at least per token; None: all.
    """
    if combine == "raw":
        return logits.log_softmax(-1).gather(-1, experts).exp()  # (T, k)
    has_copies = parts < logits.shape[-1]  # of the same neurons
    if not has_copies or experts.shape[-1] == 1:
        return _straight_through_one(logits, experts)
    if parts > 1:
        weights, is_alone = _weigh_parts(ranked, experts, parts, chosen)
    elif chosen is None:
        return ranked.softmax(-1)
    else:
        weights = ranked.masked_fill(~chosen, -math.inf).softmax(-1)  # (T, k)
        is_alone = chosen & (chosen.sum(-1, keepdim=True) == 1)
    if not torch.is_grad_enabled():  # the weight of an expert that is alone is one as it is
        return weights
    return torch.where(is_alone, _straight_through_one(logits, experts), weights)


def _straight_through_one(logits: Tensor, experts: Tensor) -> Tensor:
    """(T, k) p / p.detach() with p the experts' probabilities: ones, with the gradient of log p."""
    if not torch.is_grad_enabled():
        return torch.ones_like(experts, dtype=logits.dtype)
    log_probability = logits.log_softmax(-1).gather(-1, experts)  # in float32 p itself may be 0
    return (log_probability - log_probability.detach()).exp()


def _weigh_parts(ranked: Tensor, experts: Tensor, parts: int, chosen: Tensor | None) -> tuple[Tensor, Tensor]:
    """(T, k) softmax over those of the chosen experts that hold the same neurons, see `Router`.

    And (T, k) whether there is no other that does.
    """
    part = experts % parts  # (T, k)
    same = part.unsqueeze(-1) == part.unsqueeze(-2)  # (T, k, k)
    if chosen is not None:  # those that are not chosen stand alone
        both = chosen.unsqueeze(-1) & chosen.unsqueeze(-2)
        same = same & (both | torch.eye(experts.shape[-1], dtype=torch.bool, device=experts.device))
    others = ranked.unsqueeze(-2).masked_fill(~same, -math.inf)
    return (ranked - others.logsumexp(-1)).exp(), same.sum(-1) == 1
