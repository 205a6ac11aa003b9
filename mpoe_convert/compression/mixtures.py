"""Decide what the experts of a mixture become: which form, at which ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..planning.mixtures import plan_mixture, resolve_mixture
from ..planning.recipe import Recipe
from ..source.in_memory import InMemory
from .batches import Batch
from .prepare import Prepared, Progress

if TYPE_CHECKING:
    from .expert_moments import ExpertMoments


@dataclass(frozen=True)
class PreparedMixture(Prepared):
    """The plan for a mixture, and the data that its experts are fitted to."""

    def expert_moments(self, path: str) -> ExpertMoments | None:
        """At the experts in the layer at that path; None without calibration."""
        return None


def prepare_mixture(
    recipe: Recipe,
    checkpoint: InMemory,
    batches: Sequence[Batch] | None = None,
    progress: Progress | None = None,
    *,
    only_plan: bool = False,
    token: str | None = None,
) -> PreparedMixture:
    """The plan for an opened mixture, with forms and ranks if the recipe compresses. Raises MpoeError.

    Arguments as for `prepare`.
    """
    resolved = resolve_mixture(recipe, checkpoint)
    return PreparedMixture(plan_mixture(resolved, checkpoint))
