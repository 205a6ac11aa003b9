"""Combine weights of experts that were chosen by their logits."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .routers import Router


def weigh(
    router: "Router",
    logits: Tensor,
    ranked: Tensor,
    experts: Tensor,
    chosen: Tensor | None = None,
    inputs: Tensor | None = None,
) -> Tensor:
    """Combine weights (T, k) of up to k experts per token; those of experts that are not chosen do not count.

    Args:
        logits: (T, E) of all experts.
        ranked: (T, k) of the experts in question.
        experts: (T, k) their numbers.
        chosen: (T, k) which of them are chosen, one at least per token; None: all.
        inputs: see `Context`.
    """
    if router.combine == "raw":
        return logits.log_softmax(-1).gather(-1, experts).exp()  # (T, k)
    has_copies = router.parts < logits.shape[-1]  # of the same neurons
    if not has_copies or experts.shape[-1] == 1:
        return _straight_through_one(router, logits, experts, inputs)
    if router.parts > 1:
        weights, is_alone = _weigh_parts(ranked, experts, router.parts, chosen)
    elif chosen is None:
        return ranked.softmax(-1)
    else:
        weights = ranked.masked_fill(~chosen, -math.inf).softmax(-1)  # (T, k)
        is_alone = chosen & (chosen.sum(-1, keepdim=True) == 1)
    if not torch.is_grad_enabled():  # the weight of an expert that is alone is one as it is
        return weights
    return torch.where(is_alone, _straight_through_one(router, logits, experts, inputs), weights)


def _straight_through_one(router: "Router", logits: Tensor, experts: Tensor, inputs: Tensor | None) -> Tensor:
    """(T, k) p / p.detach() with p the experts' probabilities: ones, with the gradient of log p.

    The router has that gradient, `inputs` have none: they would be trained to raise the probabilities of
    experts that help, though a weight of one does not depend on them. Half of the parts of a Llama's FFNs
    diverged by that in a long run, see examples/results/README.md.
    """
    if not torch.is_grad_enabled():
        return torch.ones_like(experts, dtype=logits.dtype)
    if inputs is not None:
        logits = router.logits_of(inputs.detach())
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
