"""Experts: what takes the place of the experts of a stock mixture, whose routers stay.

The stock block of a mixture routes and calls `self.experts(hidden_states, top_k_index, top_k_weights)`, or
one of a list after the other: `self.experts[3](rows)`. That module alone is replaced. Ours stands in the
block under the name `MIXTURE`, because serving engines replace every module named `experts` by their own;
the block finds it through a property of its class.
"""

import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .chains import Picks
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

    def __init__(
        self, form: dict, num_experts: int, top_k: int, stock: Any = None, activation: str | None = None
    ):
        super().__init__(form, num_experts, top_k)
        self.gating = None
        if stock is not None:
            act = find_activation(stock, activation)
            self.act = act if isinstance(act, nn.Module) else Activation(act)
            if self.gate is not None and activation is None and has_own_gating(stock):
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


class ExpertList(Experts):
    """The same where the stock block takes its experts from a list, and calls each with its rows."""

    def __len__(self) -> int:
        return self.num_experts

    def __iter__(self) -> Iterator[Callable[..., Tensor]]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, expert: Any) -> Callable[..., Tensor]:
        return functools.partial(self, expert=range(len(self))[operator.index(expert)])

    def forward(self, hidden_states: Tensor, expert: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]  (the stock block's call)
        """(..., H) -> (..., H), all rows by one expert."""
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])  # (T, H)
        schedule = self.choose_schedule(rows.shape[0], rows.shape[0])
        inputs = self._prepare(rows, self._does_once(schedule))
        return self._experts(inputs, Picks(expert), schedule).reshape(hidden_states.shape)


def find_activation(stock: Any, name: str | None = None) -> Callable[[Tensor], Tensor]:
    """The activation of stock experts.

    Args:
        name: a path below the module, or a name of transformers' table; None: `act_fn`, where there is one.
    """
    if name is None:
        return getattr(stock, "act_fn", None) or nn.Identity()
    try:
        return operator.attrgetter(name)(stock)
    except AttributeError:
        return ACT2FN[name]


def has_own_gating(stock: Any) -> bool:
    """Whether stock experts compute something else than act(gate) * up of gate and up."""
    return type(stock)._apply_gate.__name__ != "_default_apply_gate"


class HoldsExperts(nn.Module):
    """What a stock block becomes a subclass of, when its experts are replaced."""

    @property
    def experts(self) -> nn.Module:
        """What the stock code calls."""
        return self._modules[MIXTURE]  # pyright: ignore[reportReturnType]  (always a module)


def replace_experts(block: nn.Module, form: dict, settings: dict, namespace: dict) -> None:
    """Put `Experts` of this form in the place of a stock block's; nothing to do if it has them.

    Args:
        settings: `config.mpoe`.
        namespace: of the module that keeps the block's class, so that the block can be pickled.
    """
    if isinstance(block, HoldsExperts):
        return
    family = settings["family"]
    name, kind = family["experts"], ExpertList if family.get("one_by_one") else Experts
    stock = getattr(block, name)
    made = kind(form, settings["num_experts"], settings["top_k"], stock, family.get("activation"))
    put_experts(block, made, name, namespace)


def put_experts(block: nn.Module, made: Experts, name: str, namespace: dict) -> None:
    """Put these in the place of the stock block's, which it calls by that name. See `replace_experts`."""
    delattr(block, name)
    setattr(block, MIXTURE, made)
    block.__class__ = block_class(type(block), namespace, name)


def block_class(stock: type[nn.Module], namespace: dict, experts: str = "experts") -> type[nn.Module]:
    """The subclass of a stock block's class. It has the stock name, by which transformers finds blocks.

    Args:
        experts: what the stock code calls its experts.
    """
    name = CLASS_PREFIX + stock.__name__
    if name not in namespace:
        body = {"__module__": namespace["__name__"], "__qualname__": name, experts: HoldsExperts.experts}
        namespace[name] = type(stock.__name__, (HoldsExperts, stock), body)
    return namespace[name]
