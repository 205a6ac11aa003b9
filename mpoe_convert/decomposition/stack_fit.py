"""Fit a stack of matrices, one per expert, in the metric of what each expert gets.

::

        in         in          in
         |          |           |        minimise  sum_e tr((W_e - V_e)^T M_e (W_e - V_e))
        [A]        [A_e]       [A]
         |          |           |        M_e = E[g^2 x^T x] over the tokens x that are routed to expert e
        [B_e]      [B]         [C_e]     with combine weight g: the expected squared change of the output
         |          |           |
        out        out         [B]
                                |        V_e = A B_e (input), A_e B (output), A C_e B (both)
                               out

A projection of the outputs, V_e = W_e P, is best with the leading eigenvectors of sum_e W_e^T M_e W_e
whatever the metrics are, so "none" and "output" are solved in closed form. A basis of the inputs is not, as
every expert has a metric of its own: "input", "both" and "base" start from the closed form for metrics that
are alike up to their size and descend (`stack_bases`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .low_rank import thin_side
from .stack_bases import PROBED, Base, Bases, best_product, spread
from .stack_metric import SMALL, Cores, Stack, dot, expand, leading, quadratic
from .stacks import Ranks, count_stack, each_rank

# The largest number of sweeps. Every sweep takes as long as the closed form, which is near the minimum
# already, so that larger stacks get fewer; from ten times `SMALL` entries on none.
MAX_SWEEPS = 20


class StackErrors(NamedTuple):
    """What cores lose of a stack, per expert: (E,), float64.

    Attributes:
        lost, energy: squared error and squared size of the expected outputs, in the unit of the moments.
        weight_lost, weight_energy: the same of the entries.
    """

    lost: Tensor
    energy: Tensor
    weight_lost: Tensor
    weight_energy: Tensor

    @property
    def error(self) -> float:
        """Relative squared error of the expected outputs of all experts together."""
        return float(_ratio(self.lost.sum(), self.energy.sum()))

    @property
    def weight_error(self) -> float:
        """Relative squared error of the entries of all experts together."""
        return float(_ratio(self.weight_lost.sum(), self.weight_energy.sum()))

    @property
    def weight_errors(self) -> Tensor:
        """(E,) relative squared error of the entries."""
        return _ratio(self.weight_lost, self.weight_energy)


@dataclass(frozen=True, eq=False)
class StackFit:
    """Cores of a stack, and what they lose, which is measured when it is asked for first.

    Attributes:
        form, ranks: see `stacks`.
        cores: per term the cores as `modeling_mpoe.Chain` stores them: (l * i, o * r) if shared, with a
            leading expert axis if owned; float64 for a float64 stack, else float32. Where experts have ranks
            of their own, zeros fill them up to the largest (see `stacks.packed_cores`).
        stack: what they were fitted to.
    """

    form: str
    ranks: Ranks
    cores: tuple[tuple[Tensor, ...], ...]
    stack: Stack

    @cached_property
    def errors(self) -> StackErrors:
        return stack_errors(self.stack, self.cores)

    @property
    def lost(self) -> Tensor:
        """(E,) squared error of the expected outputs."""
        return self.errors.lost

    @property
    def error(self) -> float:
        """Relative squared error of the expected outputs of all experts together."""
        return self.errors.error

    def matrix(self, expert: int) -> Tensor:
        """One expert's matrix (in, out)."""
        return expand(self.cores, expert)


def fit_stack(
    matrices: Sequence[Tensor] | Tensor,
    form: str,
    ranks: Ranks,
    moments: Sequence[Tensor] | Tensor | None = None,
    weights: Tensor | None = None,
    *,
    max_sweeps: int | None = None,
) -> StackFit:
    """The cores of a form that lose least of a stack's expected outputs.

    Args:
        matrices, moments, weights: as for `Stack`.
        form, ranks: see `stacks.stack_terms`.
        max_sweeps: of the descent; 0: the closed-form start. None: what suits the size.

    Raises:
        ValueError: unknown form, or another number of ranks.
    """
    return _fit(Stack(matrices, moments, weights), form, ranks, max_sweeps)


def alikeness(stack: Stack) -> float:
    """How much of the experts' outputs their mean explains: 1 for clones, about 1 / E for independent ones.

    The squared size of the mean matrix over the mean squared size of the matrices, both in the mean metric.
    Of stacks above `SMALL` entries the mean size is that of some of the experts.
    """
    metric, mean = stack.mean_moment, stack.mean(stack.matrix)
    rough = metric.to(stack.dtype)
    some = _all(stack) if stack.is_small else spread(len(stack), PROBED)
    sizes = [quadratic(rough, stack.matrix(expert)) for expert in some]
    return float(_ratio(_scalar(quadratic(metric, mean)), _scalar(sum(sizes) / len(sizes))))


def _fit(stack: Stack, form: str, ranks: Ranks, max_sweeps: int | None) -> StackFit:
    count_stack(form, ranks, len(stack), *stack.size)  # checks both
    if max_sweeps is None:
        entries = len(stack) * stack.size[0] * stack.size[1]
        max_sweeps = min(MAX_SWEEPS, 10 * SMALL // entries)
    cores = _FITS[form](stack, ranks, max_sweeps)
    stored = tuple(tuple(core.to(stack.result).contiguous() for core in term) for term in cores)
    return StackFit(form, ranks, stored, stack)


def stack_errors(stack: Stack, cores: Cores) -> StackErrors:
    """What cores lose of a stack.

    Args:
        cores: as of `StackFit`, in the stack's dtype of products or a narrower one.
    """
    rows = [_errors(stack, cores, expert) for expert in range(len(stack))]
    return StackErrors(*torch.tensor(rows, dtype=torch.float64).unbind(1))


def _errors(stack: Stack, cores: Cores, expert: int) -> list[float]:
    """Squared error and size of an expert's outputs, and of its entries."""
    weight = stack.matrix(expert)
    difference = weight - expand(cores, expert, weight.dtype)
    entries = [dot(difference, difference), dot(weight, weight)]
    if stack.moments is None and stack.weights is None:
        return [*entries, *entries]
    return [quadratic(stack.moment(expert), difference), stack.energy(expert), *entries]


def _fit_whole(stack: Stack, ranks: Ranks, max_sweeps: int) -> Cores:
    return [[torch.stack([stack.matrices[e].to(stack.result) for e in range(len(stack))])]]


def _fit_none(stack: Stack, ranks: Ranks, max_sweeps: int) -> Cores:
    own = (_alone(stack, expert, rank) for expert, rank in enumerate(each_rank(ranks, len(stack))))
    return [_stacked([[part.to(stack.result) for part in _filled(pair, max(ranks))] for pair in own])]


def _alone(stack: Stack, expert: int, rank: int) -> tuple[Tensor, Tensor]:
    """The best product for one expert."""
    thin = stack.gram(expert) if thin_side(*stack.size) == "out" else stack.moment(expert)
    return best_product(stack.matrix(expert), thin, rank)


def _fit_output(stack: Stack, ranks: Ranks, max_sweeps: int) -> Cores:
    basis = leading(stack.output_importance(), ranks[0]).to(stack.dtype)
    own = [[(stack.matrix(e) @ basis).to(stack.result)] for e in range(len(stack))]
    return [[*_stacked(own), basis.mT]]


def _fit_input(stack: Stack, ranks: Ranks, max_sweeps: int) -> Cores:
    fit = _input_bases(stack, ranks, _all(stack))
    fit.descend(max_sweeps)
    return [[fit.shared, torch.stack(fit.own)]]


def _fit_both(stack: Stack, ranks: Ranks, max_sweeps: int) -> Cores:
    fit = _both_bases(stack, ranks, _all(stack))
    fit.descend(max_sweeps)
    assert fit.right is not None  # there from the start
    return [[fit.shared, torch.stack(fit.own), fit.right]]


def _fit_base(stack: Stack, ranks: Ranks, max_sweeps: int) -> Cores:
    fit = Base(stack, each_rank(ranks, len(stack)), _all(stack))
    fit.descend(max_sweeps)
    return [[fit.shared], _stacked([_filled(pair, max(ranks)) for pair in fit.own])]


_FITS: dict[str, Callable[[Stack, Ranks, int], Cores]] = {
    "none": _fit_none,
    "input": _fit_input,
    "output": _fit_output,
    "both": _fit_both,
    "base": _fit_base,
    "whole": _fit_whole,
}


def _filled(pair: tuple[Tensor, Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """The product of (in, r) and (r, out) as one of this rank: zeros behind."""
    missing = rank - pair[1].shape[0]
    return pad(pair[0], (0, missing)), pad(pair[1], (0, 0, 0, missing))


def _input_bases(stack: Stack, ranks: Ranks, experts: list[int]) -> Bases:
    return Bases(stack, ranks[0], None, experts)


def _both_bases(stack: Stack, ranks: Ranks, experts: list[int]) -> Bases:
    right = leading(stack.output_importance(), ranks[1]).mT.to(stack.dtype)
    return Bases(stack, ranks[0], right, experts)


def _all(stack: Stack) -> list[int]:
    return list(range(len(stack)))


def _stacked(own: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Per expert its cores -> per core a stack of the experts'."""
    return [torch.stack(parts) for parts in zip(*own, strict=True)]


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """0 where nothing is there to be lost."""
    return torch.where(whole > 0, part.clamp(min=0) / whole.clamp(min=torch.finfo(whole.dtype).tiny), 0.0)
