"""Share one budget of numbers out among the stacks of a mixture: the form and the ranks of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..decomposition.stack_choices import Choice
from . import allocation


@dataclass(frozen=True, eq=False)
class StackCandidate:
    """One stack whose form is chosen.

    Attributes:
        whole: numbers of the stack as it is.
        choices: see `StackChoices`.
        unit: what a unit of their `lost` counts.
        alike: how much the experts have in common, see `alikeness`; only told.
    """

    name: str
    whole: int
    choices: tuple[Choice, ...]
    unit: float
    alike: float | None = None

    def cost(self, choice: Choice) -> int:
        return choice.numbers

    def loss(self, choice: Choice) -> float:
        return self.unit * choice.lost

    def above(self, choice: Choice) -> list[Choice]:
        return [each for each in self.choices if each.numbers > choice.numbers]

    def within(self, keep: float) -> Choice:
        """The best choice that stores at most this share; the smallest one if all store more."""
        fits = [each for each in self.choices if each.numbers <= keep * self.whole]
        return fits[-1] if fits else self.choices[0]


def uniform(candidates: Sequence[StackCandidate], keep: float) -> dict[str, Choice]:
    """By name, the best choice for every stack within the same share of its numbers."""
    return {each.name: each.within(keep) for each in candidates}


def shared_out(candidates: Sequence[StackCandidate], keep: float) -> dict[str, Choice]:
    """By name, the choices that lose least together within this share of all numbers.

    Never more than with the same share for every stack. Where even the smallest ones store more, they are it.
    """
    budget = int(keep * sum(each.whole for each in candidates))
    smallest = {each.name: each.choices[0] for each in candidates}
    found = [allocation.greedy(candidates, budget, smallest)]
    alike = uniform(candidates, keep)
    if allocation.cost(candidates, alike) <= budget:
        found.append(alike)
    return min(found, key=lambda chosen: sum(each.loss(chosen[each.name]) for each in candidates))
