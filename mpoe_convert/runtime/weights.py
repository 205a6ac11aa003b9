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
    has_copies = parts < logits.shape[-1]  # of the same neurons
    if combine == "renormalised" and has_copies and experts.shape[-1] > 1:
        if parts > 1:
            return _weigh_parts(logits, ranked, experts, parts, chosen)
        if chosen is None:
            return ranked.softmax(-1)
        weights = ranked.masked_fill(~chosen, -math.inf).softmax(-1)  # (T, k)
        is_alone = chosen.sum(-1, keepdim=True) == 1  # (T, 1)
        log_probability = logits.log_softmax(-1).gather(-1, experts)
        return torch.where(is_alone & chosen, _straight_through(log_probability), weights)
    log_probability = logits.log_softmax(-1).gather(-1, experts)  # (T, k)
    if combine == "raw":
        return log_probability.exp()
    return _straight_through(log_probability)


def _straight_through(log_probability: Tensor) -> Tensor:
    """p / p.detach() by logarithms, so that p = 0 in float32 gives one as well."""
    return (log_probability - log_probability.detach()).exp()


def _weigh_parts(
    logits: Tensor, ranked: Tensor, experts: Tensor, parts: int, chosen: Tensor | None
) -> Tensor:
    """(T, k) softmax over those of the chosen experts that hold the same neurons, see `Router`."""
    part = experts % parts  # (T, k)
    same = part.unsqueeze(-1) == part.unsqueeze(-2)  # (T, k, k)
    if chosen is not None:  # those that are not chosen stand alone
        both = chosen.unsqueeze(-1) & chosen.unsqueeze(-2)
        same = same & (both | torch.eye(experts.shape[-1], dtype=torch.bool, device=experts.device))
    others = ranked.unsqueeze(-2).masked_fill(~same, -math.inf)
    weights = (ranked - others.logsumexp(-1)).exp()  # (T, k)
    log_probability = logits.log_softmax(-1).gather(-1, experts)  # (T, k)
    return torch.where(same.sum(-1) == 1, _straight_through(log_probability), weights)
