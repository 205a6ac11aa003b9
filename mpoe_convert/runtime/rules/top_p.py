"""Rule top-p: every token goes to as many experts as it takes to reach a probability."""

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from ..choices import Choices, Context, preferences, rule
from ..weights import weigh

if TYPE_CHECKING:
    from ..routers import Router


@rule
def top_p(router: "Router", logits: Tensor, bias: Tensor | None, context: Context) -> Choices:
    """From the most probable expert on, until they have the probability `router.threshold` together.

    XMoE, arXiv 2403.18926: one expert at least, `router.top_k` at most. Its weights are the probabilities
    (combine "raw").

    Args:
        logits: (T, E).
        bias: (E,) added to the probabilities to rank experts, see `top_k`.
    """
    probabilities = logits.softmax(-1)
    experts = preferences(logits, bias).topk(router.top_k, dim=-1).indices  # (T, k), the most probable first
    reached = probabilities.gather(-1, experts).cumsum(-1)  # (T, k)
    chosen = F.pad(reached[:, :-1], (1, 0)) < router.threshold  # (T, k) by those before
    ranked = logits.gather(-1, experts)
    weights = weigh(router, logits, ranked, experts, chosen, context.inputs)
    return Choices.of_table(experts, weights, chosen)
