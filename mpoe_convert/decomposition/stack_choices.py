"""What a stack of matrices can become: forms and ranks, the numbers that are stored, and what is lost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .stack_curves import stack_curves
from .stack_fit import alikeness, fit_stack
from .stack_metric import Stack
from .stacks import FORMS, Ranks, count_stack, largest_ranks, rank_steps, shared_out_ranks

# Shares of the numbers that "base" is fitted at.
_AROUND = (0.6, 1.0, 1.4)
# Ranks differ between experts where that leaves less than this part of what even ranks lose: experts of one
# size go through the kernels for groups of products. A choice, not the best of several; what such ranks
# gain with it stands in examples/mixtures.md.
_WORTH = 0.9


class Choice(NamedTuple):
    """One form of a stack.

    Attributes:
        numbers: stored for all experts.
        lost: squared error of the expected outputs of all experts, in the unit of the moments.
        form, ranks: see `stacks`.
    """

    numbers: int
    lost: float
    form: str
    ranks: Ranks


@dataclass(frozen=True, eq=False)
class StackChoices:
    """What a stack can become.

    Attributes:
        energy: squared size of the expected outputs of all experts, in the unit of the moments.
        alike: see `alikeness`.
        choices: from the smallest to the best; none is both larger than another one and worse.
    """

    energy: float
    alike: float
    choices: tuple[Choice, ...]


def stack_choices(
    matrices: Sequence[Tensor] | Tensor,
    numbers: int,
    moments: Sequence[Tensor] | Tensor | None = None,
    *,
    forms: Sequence[str] = FORMS,
    uneven: bool = True,
) -> StackChoices:
    """What every form costs and loses at its ranks.

    The losses are those of the closed-form starts. Of stacks that are small enough every form is fitted once.
    What the descent gains there counts at all ranks; "base", whose gain depends on the rank, is fitted at
    some ranks around, and its gain is interpolated.

    Args:
        matrices, moments: as for `Stack`.
        numbers: about as many as will be stored; the fits are made at the largest ranks within.
        forms: to choose from.
        uneven: let experts have ranks of their own in the forms of `stacks.UNEVEN`, where that pays.
    """
    stack = Stack(matrices, moments)
    found = [Choice(count_stack("whole", (), *_size(stack)), 0.0, "whole", ())] if "whole" in forms else []
    curves = stack_curves(stack, forms)
    for form, lost in curves.lost.items():
        choices = list(_choices(stack, form, lost))
        if uneven and form in curves.squares:
            choices = _worth(choices, list(_shared_out(stack, form, curves.squares[form])), numbers)
        found += _descended(stack, form, choices, numbers) if stack.is_small else choices
    return StackChoices(curves.energy, alikeness(stack), tuple(_best(found)))


def _size(stack: Stack) -> tuple[int, int, int]:
    return len(stack), *stack.size


def _choices(stack: Stack, form: str, lost: Tensor) -> Iterator[Choice]:
    """All ranks of a form, with its losses (n + 1,), or (in + 1, out + 1) for "both"."""
    size = _size(stack)
    whole, values = count_stack("whole", (), *size), lost.numpy()
    for ranks in product(*map(rank_steps, largest_ranks(form, *size))):
        numbers = count_stack(form, ranks, *size)
        if numbers < whole:
            yield Choice(numbers, float(values[ranks]), form, ranks)


def _shared_out(stack: Stack, form: str, squares: Tensor) -> Iterator[Choice]:
    """The same with the ranks of every step shared out over the experts, by their squares (E, n)."""
    size, tails = _size(stack), squares.sum(1, keepdim=True) - squares.cumsum(1)
    tails = torch.cat([squares.sum(1, keepdim=True), tails], 1).clamp(min=0)  # (E, n + 1)
    whole = count_stack("whole", (), *size)
    totals = [rank * len(squares) for rank in rank_steps(squares.shape[1])]
    for ranks in shared_out_ranks(squares, totals):
        numbers = count_stack(form, ranks, *size)
        if numbers >= whole:
            return
        lost = float(tails.gather(1, torch.tensor(ranks)[:, None]).sum())
        yield Choice(numbers, lost, form, ranks)


def _worth(even: list[Choice], uneven: list[Choice], numbers: int) -> list[Choice]:
    """Those with one rank for all, or those with ranks of their own if these lose clearly less."""
    one, other = (_largest(choices, numbers) for choices in (even, uneven))
    is_better = one is not None and other is not None and other.lost < _WORTH * one.lost
    return uneven if is_better else even


def _descended(stack: Stack, form: str, choices: list[Choice], numbers: int) -> list[Choice]:
    """The choices of a form with what they lose after the descent, from few fits, see `stack_choices`."""
    parts = _AROUND if form == "base" else (1.0,)
    tried = dict.fromkeys(filter(None, (_largest(choices, part * numbers) for part in parts)))
    fits = [(at, fit_stack(stack.matrices, form, at.ranks, stack.moments)) for at in tried]
    if not fits:
        return choices
    gains = [min(float(fit.lost.sum()) / at.lost, 1.0) for at, fit in fits]
    at_all = np.interp([each.numbers for each in choices], [at.numbers for at, _ in fits], gains)
    return [each._replace(lost=each.lost * gain) for each, gain in zip(choices, at_all.tolist(), strict=True)]


def _largest(choices: Iterable[Choice], numbers: float) -> Choice | None:
    """The best choice of a form within so many numbers that loses something."""
    within = [each for each in choices if each.numbers <= numbers and each.lost > 0]
    return min(within, key=lambda choice: choice.lost, default=None)


def _best(choices: Sequence[Choice]) -> Iterator[Choice]:
    """By rising numbers, those that lose less than all smaller ones."""
    least = float("inf")
    for choice in sorted(choices, key=lambda choice: choice[:2]):
        if choice.lost < least:
            least = choice.lost
            yield choice
