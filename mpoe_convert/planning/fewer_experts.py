"""Mixtures that leave experts out: how many may stay, which ones do, and how that is told."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

from ..errors import RecipeError
from ..options import called
from ..source.in_memory import InMemory
from ..source.mixtures import Located, locate_experts
from ..source.pruned import Pruned, with_experts
from ..source.state_dict import is_buffer
from ..tables import Cell, Table, listed
from .plan import OutTensor
from .recipe import Recipe


@dataclass(frozen=True)
class LayerExperts:
    """Which experts of a layer stay.

    Attributes:
        path: of the layer.
        kept: their numbers before, in the order of their numbers now.
        scores: of all experts before, the higher the more needed; empty: they were not scored.
        shares: of the choices that routers made on the calibration text, how many were of each expert.
    """

    path: str
    kept: tuple[int, ...]
    scores: tuple[float, ...] = ()
    shares: tuple[float, ...] = ()

    @property
    def dropped(self) -> tuple[int, ...]:
        """Those that do not stay; () where experts were not scored."""
        return tuple(expert for expert in range(len(self.scores)) if expert not in self.kept)

    def renumbered(self, numbers: Sequence[int], count: int) -> LayerExperts:
        """The same by the numbers that experts have among `count`; those that had gone before have zeros.

        Args:
            numbers: of the experts before.
        """
        places = {number: place for place, number in enumerate(numbers)}
        scores, shares = (
            tuple(values[places[number]] if number in places else 0.0 for number in range(count))
            for values in (self.scores, self.shares)
        )
        return LayerExperts(self.path, tuple(numbers[expert] for expert in self.kept), scores, shares)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"dropped": list(self.dropped)}

    def row(self) -> dict[str, Cell]:
        left = self.dropped
        return {
            "layer": self.path,
            "left out": listed(left),
            "their share of choices": f"{sum(self.shares[expert] for expert in left):.2%}",
            "highest score of them": f"{max(self.scores[expert] for expert in left):.3g}",
            "lowest score that stays": f"{min(self.scores[expert] for expert in self.kept):.3g}",
        }


@dataclass(frozen=True)
class FewerExperts:
    """What a mixture has left of its experts.

    Attributes:
        source_experts: per layer.
        layers: all that have experts, in layer order.
        copied_params, copied_bytes: what the source has more in the tensors that are copied: routers' rows,
            and experts of layers that are not converted.
    """

    source_experts: int
    layers: tuple[LayerExperts, ...]
    copied_params: int = 0
    copied_bytes: int = 0

    @property
    def kept(self) -> dict[str, tuple[int, ...]]:
        return {layer.path: layer.kept for layer in self.layers}

    @property
    def is_scored(self) -> bool:
        return any(layer.scores for layer in self.layers)

    def table(self) -> Table:
        return table_of(self.layers)

    def of(self, tensors: Iterable[OutTensor], checkpoint: Pruned) -> FewerExperts:
        """The same, beside an artifact of these tensors."""
        params = num_bytes = 0
        for tensor in tensors:
            if tensor.ffn is None and tensor.name in checkpoint.cuts:
                shape = checkpoint.uncut.tensors[tensor.name].shape
                num_bytes += replace(tensor, shape=shape).num_bytes - tensor.num_bytes
                params += 0 if is_buffer(tensor.name) else prod(shape) - prod(tensor.shape)
        return replace(self, copied_params=params, copied_bytes=num_bytes)

    def notes(self) -> Iterator[str]:
        """What a plan that has not scored experts does not know, for people."""
        if not self.is_scored:
            yield f"no text was read: {called('calibrate')} shows which experts stay; sizes are the same."

    def to_json(self) -> dict[str, Any]:
        return {"source_experts": self.source_experts, "layers": [layer.to_json() for layer in self.layers]}


def table_of(layers: Iterable[LayerExperts]) -> Table:
    """One row per layer whose experts were scored."""
    rows = tuple(layer.row() for layer in layers if layer.scores)
    return Table("Experts that are left out", rows, left=("layer", "left out"))


def fewer_than(recipe: Recipe, located: Located) -> bool:
    """Whether a recipe asks for fewer experts than a mixture has.

    Raises:
        RecipeError: so many cannot stay.
    """
    if "experts" not in recipe.given or recipe.experts == located.num_experts:
        return False
    asked, own, top_k = recipe.experts, located.num_experts, located.top_k
    if recipe.experts_at is not None:
        raise RecipeError(
            f"{called('experts')} is {asked}, and {called('experts_at')} names a mixture of {own} experts; "
            "which rows of its routers belong to which is not known there: expected all of them"
        )
    least = max(2, top_k)
    if not least <= asked < own:
        expected = f"expected {least} to {own}" if least < own else f"expected {own}, or leave it out"
        raise RecipeError(
            f"{called('experts')} is {asked}, and the source is a mixture of {own} experts, {top_k} per "
            f"token; {expected}"
        )
    check_groups(asked, located)
    return True


def check_groups(asked: int, located: Located) -> None:
    """Raises RecipeError unless every group of experts can keep as many, and enough to choose from.

    Routers rank groups by their best two experts; a token takes its experts out of `top_groups` of them.
    """
    groups, top_groups, top_k = located.groups, located.top_groups, located.top_k
    if groups == 1:
        return
    per_group = max(2, -(-top_k // top_groups))
    if asked % groups or asked < groups * per_group:
        raise RecipeError(
            f"{called('experts')} is {asked}, and the source's routers choose {top_groups} of {groups} "
            f"groups of experts; expected as many in each group, and at least {per_group}: a multiple of "
            f"{groups} from {groups * per_group} to {located.num_experts}"
        )


def by_size(recipe: Recipe, checkpoint: InMemory) -> tuple[InMemory, FewerExperts | None]:
    """The checkpoint with as many experts as a recipe asks for, where sizes alone matter; and what it has.

    The first ones of every group stay. Raises as `fewer_than` and `with_experts`.
    """
    located = locate_experts(checkpoint, recipe.experts_at)
    if not fewer_than(recipe, located):
        return checkpoint, None
    size, stay = located.num_experts // located.groups, recipe.experts // located.groups
    kept = tuple(group * size + place for group in range(located.groups) for place in range(stay))
    fewer = FewerExperts(located.num_experts, tuple(LayerExperts(ffn.path, kept) for ffn in located.ffns))
    return with_experts(checkpoint, located, fewer.kept), fewer
