"""What a stack of matrices can become: forms and ranks, the numbers that are stored, and what is lost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .stack_curves import stack_curves
from .stack_fit import alikeness, fit_stack
from .stack_metric import Stack
from .stacks import FORMS, Ranks, count_stack, largest_ranks, rank_steps

# Shares of the numbers that "base" is fitted at.
_AROUND = (0.6, 1.0, 1.4)


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
) -> StackChoices:
    """What every form costs and loses at its ranks.

    The losses are those of the closed-form starts. Of stacks that are small enough every form is fitted once.
    What the descent gains there counts at all ranks; "base", whose gain depends on the rank, is fitted at
    some ranks around, and its gain is interpolated.

    Args:
        matrices, moments: as for `Stack`.
        numbers: about as many as will be stored; the fits are made at the largest ranks within.
        forms: to choose from.
    """
    stack = Stack(matrices, moments)
    found = [Choice(count_stack("whole", (), *_size(stack)), 0.0, "whole", ())] if "whole" in forms else []
    curves = stack_curves(stack, forms)
    for form, lost in curves.lost.items():
        if stack.is_small:
            lost = _descended(stack, form, lost, numbers)
        found += _choices(stack, form, lost)
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


def _descended(stack: Stack, form: str, lost: Tensor, numbers: int) -> Tensor:
    """The losses of a form after the descent, from those before and few fits, see `stack_choices`."""
    parts = _AROUND if form == "base" else (1.0,)
    tried = dict.fromkeys(filter(None, (_largest(stack, form, lost, part * numbers) for part in parts)))
    fits = [(at, fit_stack(stack.matrices, form, at.ranks, stack.moments)) for at in tried]
    if not fits:
        return lost
    gains = [min(float(fit.lost.sum()) / at.lost, 1.0) for at, fit in fits]
    if form != "base":
        return lost * gains[0]
    at_all = np.interp(np.arange(len(lost)), [at.ranks[0] for at, _ in fits], gains)
    return lost * torch.from_numpy(at_all)


def _largest(stack: Stack, form: str, lost: Tensor, numbers: float) -> Choice | None:
    """The best choice of a form within so many numbers that loses something."""
    within = [each for each in _choices(stack, form, lost) if each.numbers <= numbers and each.lost > 0]
    return min(within, key=lambda choice: choice.lost, default=None)


def _best(choices: Sequence[Choice]) -> Iterator[Choice]:
    """By rising numbers, those that lose less than all smaller ones."""
    least = float("inf")
    for choice in sorted(choices, key=lambda choice: choice[:2]):
        if choice.lost < least:
            least = choice.lost
            yield choice
