"""Rule top-k: every token goes to the k experts with the largest logits."""

from typing import TYPE_CHECKING

from torch import Tensor

from ..choices import Choices, Context, preferences, rule
from ..weights import weigh

if TYPE_CHECKING:
    from ..routers import Router


@rule
def top_k(router: "Router", logits: Tensor, bias: Tensor | None, context: Context) -> Choices:
    """k = `router.top_k` choices per token (Shazeer et al., arXiv 1701.06538).

    Args:
        logits: (T, E).
        bias: (E,) added to the probabilities to choose experts, never to weigh them (DeepSeek-V3, arXiv
            2412.19437, section 2.1.2).
    """
    experts = preferences(logits, bias).topk(router.top_k, dim=-1).indices  # (T, k), the best first
    ranked = logits.gather(-1, experts)  # (T, k)
    weights = weigh(router, logits, ranked, experts, inputs=context.inputs)
    return Choices.of_table(experts, weights)
