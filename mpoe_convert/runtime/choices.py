"""Choices: what a router decides, as a list of (token, expert, weight), and the table of selection rules."""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .routers import Router


class Choices(NamedTuple):
    """N choices: token `tokens[n]` goes to expert `experts[n]`, whose output is multiplied by `weights[n]`.

    A token may have no choice, one or many. A rule lists them token by token, each token's from the first
    choice to the last.
    """

    tokens: Tensor  # (N,) int64
    experts: Tensor  # (N,) int64
    weights: Tensor  # (N,) float32, the combine weights
    per_token: int | None = None  # k, if every token has k choices, side by side; None: their number varies
    # (N,) False for those that the rule did not choose, which stand in the list with the weight zero, so that
    # its length does not depend on values; None: all are chosen
    real: Tensor | None = None

    @classmethod
    def of_table(cls, experts: Tensor, weights: Tensor, chosen: Tensor | None = None) -> "Choices":
        """Of experts (T, k) and weights (T, k) per token, those that `chosen` (T, k) has; None: all."""
        k = experts.shape[-1]
        if chosen is not None and not has_fixed_shapes(experts):
            tokens, ranks = chosen.nonzero(as_tuple=True)
            index = torch.add(ranks, tokens, alpha=k)
            return cls(
                tokens,
                experts.reshape(-1).index_select(0, index),
                weights.reshape(-1).index_select(0, index),
            )
        places = torch.arange(experts.numel(), device=experts.device)
        choices = cls(places.div(k, rounding_mode="floor"), experts.reshape(-1), weights.reshape(-1), k)
        if chosen is None:
            return choices
        real = chosen.reshape(-1)
        return choices._replace(weights=choices.weights * real, real=real)

    def take(self, index: Tensor) -> "Choices":
        """Those at `index` (M,), in its order."""
        real = None if self.real is None else self.real.index_select(0, index)
        tokens, experts = self.tokens.index_select(0, index), self.experts.index_select(0, index)
        return Choices(tokens, experts, self.weights.index_select(0, index), real=real)

    def spread(self, values: Tensor) -> Tensor:
        """Values of the tokens (T, ...) -> one row for each choice (N, ...)."""
        if self.per_token is None:
            return values.index_select(0, self.tokens)
        return values.repeat_interleave(self.per_token, dim=0)

    def combine(self, rows: Tensor, num_tokens: int) -> Tensor:
        """One output per choice (N, H) -> (T, H), each token's weighted sum; zero for a token without."""
        weights = self.weights.to(torch.promote_types(rows.dtype, torch.float32))
        weighted = rows * weights.unsqueeze(-1)  # (N, H), in float32 at least
        if self.per_token is not None:  # reshape and sum: faster than by index, and in a fixed order on CUDA
            return weighted.unflatten(0, (num_tokens, self.per_token)).sum(1).to(rows.dtype)
        output = weighted.new_zeros(num_tokens, rows.shape[-1])
        return output.index_add_(0, self.tokens, weighted).to(rows.dtype)

    def beside(self, experts: range, num_tokens: int, scale: float) -> "Choices":
        """All weights times `scale`, and for every token these experts too, each with the weight `scale`."""
        if not experts:
            return self
        device, count = self.experts.device, len(experts)
        always = torch.arange(experts.start, experts.stop, device=device).repeat(num_tokens)
        tokens = torch.arange(num_tokens, device=device)
        weights = [self.weights * scale, self.weights.new_full((num_tokens * count,), scale)]
        if self.per_token is None:
            places = torch.cat([self.tokens, tokens.repeat_interleave(count)])
            return Choices(places, torch.cat([self.experts, always]), torch.cat(weights))
        k, shape = self.per_token + count, (num_tokens, self.per_token)
        both = torch.cat([self.experts.view(shape), always.view(num_tokens, count)], 1)
        joined = torch.cat([weights[0].view(shape), weights[1].view(num_tokens, count)], 1)
        return Choices(tokens.repeat_interleave(k), both.flatten(), joined.flatten(), per_token=k)

    def followed_by(self, others: "Choices", num_tokens: int) -> "Choices":
        """These, of the first `num_tokens` tokens, and `others`, all chosen, of the tokens behind them."""
        real = None
        if self.real is not None:
            real = torch.cat([self.real, torch.ones_like(others.experts, dtype=torch.bool)])
        return Choices(
            torch.cat([self.tokens, others.tokens + num_tokens]),
            torch.cat([self.experts, others.experts]),
            torch.cat([self.weights, others.weights]),
            real=real,
        )

    def load(self, num_experts: int, mask: Tensor | None = None) -> Tensor:
        """(E,) how many choices fell on each expert, in float32; `mask` (T,) is zero for padding."""
        counted = (
            torch.ones_like(self.weights) if mask is None else mask.to(self.weights)[self.tokens]
        )  # (N,)
        if self.real is not None:
            counted = counted * self.real
        return counted.new_zeros(num_experts).scatter_add(0, self.experts, counted)

    def ranks(self) -> Tensor:
        """(N,) a choice's place among those of its token, as a rule lists them: 0 for the first."""
        start = torch.searchsorted(self.tokens, self.tokens)  # (N,) where the token's choices begin
        return torch.arange(start.shape[0], device=start.device) - start


def has_fixed_shapes(tensor: Tensor) -> bool:
    """Whether shapes must not depend on values: in compiled code, and where there are none."""
    return torch.compiler.is_compiling() or tensor.is_meta


class Routing(NamedTuple):
    """What a router made of T tokens."""

    logits: Tensor  # (T, E) float32, before any balancing bias
    choices: Choices  # all that the rule chose
    room: Tensor | None = None  # (N,) False where the expert was full; None: there is no capacity
    gates: Tensor | None = None  # (T, E) of rule top-any, one for experts that pass, with a gradient
    likeness: Tensor | None = None  # () of its router's rows, a loss; both None without that rule
    sizes: tuple[float, ...] | None = None  # of the experts, by which a choice counts for the balancing loss

    def weighted(self, weights: Tensor) -> "Routing":
        """The same with other combine weights (N,)."""
        return self._replace(choices=self.choices._replace(weights=weights))

    def served(self) -> Choices:
        """The choices that are computed: those for which there was room.

        Compiled code, whose shapes must not depend on values, computes all, the others with weight zero.
        """
        if self.room is None:
            return self.choices
        if has_fixed_shapes(self.room):
            return self.choices._replace(weights=self.choices.weights * self.room)
        return self.choices.take(self.room.nonzero().squeeze(-1))


def preferences(logits: Tensor, bias: Tensor | None) -> Tensor:
    """(T, E) what experts are ranked by: the logits, or with a balancing bias (E,) probabilities plus it."""
    return logits if bias is None else logits.softmax(-1) + bias.float()


class Context(NamedTuple):
    """What a rule knows of T tokens beside their logits."""

    number: int = 1  # B sequences, all of T / B tokens
    mask: Tensor | None = None  # (T,) zero for padding; None: there is none, or none is known
    inputs: Tensor | None = None  # (T, H) the router's, if they are the tokens; None: they are tasks

    def first_half(self) -> "Context":
        """Of the first half of them."""
        return Context(self.number // 2, None if self.mask is None else self.mask.tensor_split(2)[0])


Rule = Callable[["Router", Tensor, Tensor | None, Context], Choices]
DEFAULT_RULE = "top-k"
TOP_ANY = "top-any"  # whose routers have thresholds of their own
EXPERT_CHOICE = "expert-choice"  # whose experts choose tokens
RULES: dict[str, Rule] = {}


def rule(function: Rule) -> Rule:
    """Enter a selection rule in the table: `top_k` is "top-k" in `config.mpoe`.

    A rule takes the router, logits (T, E) in float32, the balancing bias (E,) or None, and the context.
    """
    RULES[function.__name__.replace("_", "-")] = function
    return function


def find_rule(name: str) -> Rule:
    """Raises ValueError if there is no such rule."""
    if name not in RULES:
        raise ValueError(f"config.mpoe has the rule {name!r}: this file knows {', '.join(RULES)}")
    return RULES[name]
