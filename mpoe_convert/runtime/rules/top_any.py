"""Rule top-any: every token goes to all experts that it is like enough, by learned thresholds."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..choices import Choices, Context, rule

if TYPE_CHECKING:
    from ..routers import Router


@rule
def top_any(router: "Router", logits: Tensor, bias: Tensor | None, context: Context) -> Choices:
    """Every expert whose score passes its threshold; the one of the largest score where none does.

    At most `router.top_k`: those that pass by the largest margins.

    DynMoE, arXiv 2405.14297: the weights are the gates, divided by their sum over the chosen experts that
    hold the same neurons.

    Args:
        logits: (T, E) cosines.
        bias: None: experts have thresholds that are learned.
    """
    assert bias is None and router.threshold_bias is not None
    margins = score_margins(logits, router.threshold_bias)  # (T, E)
    ranking = torch.where(margins > 0, margins + 2, logits)  # above all cosines: those that pass come first
    experts = ranking.topk(router.top_k, dim=-1).indices  # (T, k), the best first
    margins = margins.gather(-1, experts)
    chosen = F.pad(margins[:, 1:] > 0, (1, 0), value=True)  # (T, k) the first, whether it passes or not
    gates = torch.where(chosen, straight_through_one(margins), 0.0)
    part = experts % router.parts  # (T, k)
    none = gates.new_zeros(gates.shape[0], router.parts)
    holders = none.scatter_add(-1, part, gates)  # (T, P) of each part
    total = holders.gather(-1, part)  # (T, k)
    weights = gates / torch.where(total > 1.5, total, 1.0)
    return Choices.of_table(experts, weights, chosen)


def score_margins(cosines: Tensor, thresholds: Tensor) -> Tensor:
    """(T, E) sigmoid of the cosines (T, E) minus sigmoid of the thresholds (E,); above zero: it passes."""
    return cosines.sigmoid() - thresholds.float().sigmoid()


def straight_through_one(margins: Tensor) -> Tensor:
    """One in value, with the gradient of `margins`."""
    return margins - margins.detach() + 1 if torch.is_grad_enabled() else torch.ones_like(margins)


def passing_gates(cosines: Tensor, thresholds: Tensor) -> Tensor:
    """(T, E) the sign of relu(margin); its gradient takes the sign for an identity.

    So experts that do not pass get none.
    """
    margins = score_margins(cosines, thresholds)
    return torch.where(margins > 0, straight_through_one(margins), 0.0)


def likeness_loss(rows: Tensor) -> Tensor:
    """DynMoE's loss of a router's rows (E, H): the norm of N N^T - I, and their own mean norm.

    N are the rows with norm one. The first term makes the rows differ (diversity), the second keeps them
    short (simplicity), which changes no cosine.
    """
    directions = F.normalize(rows.float(), dim=-1)
    others = directions @ directions.mT - torch.eye(len(rows), device=rows.device)
    return others.norm() + rows.float().norm(dim=-1).mean()
