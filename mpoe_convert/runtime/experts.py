"""Experts: what takes the place of the experts of a stock mixture, whose routers stay.

The stock block of a mixture routes and calls `self.experts(hidden_states, top_k_index, top_k_weights)`.
That module alone is replaced. Ours stands in the block under the name `MIXTURE`, because serving engines
replace every module named `experts` by their own; the block finds it through a property of its class.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .choices import Choices
from .config import CLASS_PREFIX
from .mixing import Mixing

# The name in the stock block of what replaces its `experts`.
MIXTURE = "mixture"


class Gating(nn.Module):
    """The stock experts' own way from gate and up to the hidden neurons, such as gpt-oss' clamped one.

    It has the attributes of the stock module, without its parameters.
    """

    def __init__(self, stock: Any):
        super().__init__()
        own = vars(nn.Module()).keys()
        vars(self).update({name: value for name, value in vars(stock).items() if name not in own})
        self._modules.update(stock._modules)
        self.function: Callable[..., Tensor] = type(stock)._apply_gate

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        """(N, inner) each -> (N, inner)."""
        if self.is_concatenated:
            return self.function(self, torch.cat([gate, up], dim=-1))
        return self.function(self, torch.stack([gate, up], dim=-1).flatten(-2))


class Activation(nn.Module):
    """A stock activation that is a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Experts(Mixing):
    """The experts of a stock mixture, in cores: called as the stock module is.

    Attributes:
        gating: the stock module's own, where it has one; None: act(gate) * up.
    """

    gating: Gating | None

    def __init__(self, form: dict, num_experts: int, top_k: int, stock: Any = None):
        super().__init__(form, num_experts, top_k)
        self.gating = None
        if stock is not None:
            act = getattr(stock, "act_fn", None) or nn.Identity()
            self.act = act if isinstance(act, nn.Module) else Activation(act)
            if self.gate is not None and has_own_gating(stock):
                self.gating = Gating(stock)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(T, H), the experts (T, k) and the combine weights (T, k) of every token -> (T, H)."""
        num_tokens, per_token = top_k_index.shape
        tokens = torch.arange(num_tokens, device=top_k_index.device).repeat_interleave(per_token)
        choices = Choices(tokens, top_k_index.flatten(), top_k_weights.flatten(), per_token)
        return self._mix(hidden_states.reshape(num_tokens, -1), choices).reshape(hidden_states.shape)

    def _activate(self, up: Tensor, gate: Tensor | None) -> Tensor:
        if self.gating is None or gate is None:
            return super()._activate(up, gate)
        return self.gating(gate, up)


def has_own_gating(stock: Any) -> bool:
    """Whether stock experts compute something else than act(gate) * up of gate and up."""
    return type(stock)._apply_gate.__name__ != "_default_apply_gate"


class HoldsExperts(nn.Module):
    """What a stock block becomes a subclass of, when its experts are replaced."""

    @property
    def experts(self) -> nn.Module:
        """What the stock code calls."""
        return self._modules[MIXTURE]  # pyright: ignore[reportReturnType]


def replace_experts(block: nn.Module, form: dict, num_experts: int, top_k: int, namespace: dict) -> None:
    """Put `Experts` of this form in the place of a stock block's; nothing to do if it has them.

    Args:
        namespace: of the module that keeps the block's class, so that the block can be pickled.
    """
    if isinstance(block, HoldsExperts):
        return
    made = Experts(form, num_experts, top_k, block.experts)
    del block.experts
    setattr(block, MIXTURE, made)
    block.__class__ = block_class(type(block), namespace)


def block_class(stock: type[nn.Module], namespace: dict) -> type[nn.Module]:
    """The subclass of a stock block's class. It has the stock name, by which transformers finds blocks."""
    name = CLASS_PREFIX + stock.__name__
    if name not in namespace:
        body = {"__module__": namespace["__name__"], "__qualname__": name}
        namespace[name] = type(stock.__name__, (HoldsExperts, stock), body)
    return namespace[name]
