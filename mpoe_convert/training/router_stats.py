"""Look at the routers of a loaded model."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from ..runtime.modeling_mpoe import RouterStats


def router_stats(
    model: nn.Module, similarity_tokens: int = 0
) -> AbstractContextManager[dict[str, RouterStats]]:
    """Watch the routers of a converted model, however it is wrapped (PEFT, DDP, compiled).

    with router_stats(model) as stats:
        model(**batch)
    print(stats["h.0.mlp"].load)

    Args:
        model: holds a converted model somewhere.
        similarity_tokens: compare the experts' outputs on so many tokens per mixture and pass.

    Returns:
        Context manager that yields {path of the mixture: `RouterStats`}, filled as passes go by.

    Raises:
        TypeError: there is no converted model in it.
    """
    for module in model.modules():
        if hasattr(type(module), "router_stats"):
            return module.router_stats(similarity_tokens)
    raise TypeError(f"{type(model).__name__} holds no mixture made by mpoe-convert: load a converted model")
