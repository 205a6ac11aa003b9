"""What became of the experts of an artifact, and what it cost."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from ..compression.divergence import Divergence
from ..tables import Cell, Shown, Table, listed


@dataclass(frozen=True)
class Layer:
    """What became of a layer's experts.

    Attributes:
        path: of the layer.
        kept: those that stay, by their numbers before, in the order of their numbers now.
        shares: of the choices that routers made on the text, how many were of each expert before.
    """

    path: str
    kept: tuple[int, ...]
    shares: tuple[float, ...]

    @property
    def left_out(self) -> tuple[int, ...]:
        """Those that do not stay."""
        return tuple(expert for expert in range(len(self.shares)) if expert not in self.kept)

    def row(self) -> dict[str, Cell]:
        """As a table shows it."""
        lost = sum(self.shares[expert] for expert in self.left_out)
        return {
            "layer": self.path,
            "left out": listed(self.left_out),
            "their share of choices": f"{lost:.2%}",
        }


@dataclass(frozen=True, repr=False)
class Smaller(Shown):
    """An artifact with fewer experts.

    Attributes:
        artifact: the one that it was made of.
        by: what decided which experts stay.
        text: names of the files or Hub datasets on which experts were observed.
        experts_before, experts: per mixture, without those that every token passes.
        layers: in layer order.
        divergence: from that artifact, on held-out text.
        params_before, params: in the weight files.
    """

    artifact: str
    by: str
    text: tuple[str, ...]
    experts_before: int
    experts: int
    layers: tuple[Layer, ...]
    divergence: Divergence
    params_before: int
    params: int

    @property
    def losses(self) -> tuple[float, float] | None:
        """On held-out text, before and after, in nats per token; None for models that write no text."""
        found = self.divergence
        if found.dense_perplexity is None or found.perplexity is None:
            return None
        return math.log(found.dense_perplexity), math.log(found.perplexity)

    def in_words(self) -> str:
        """Sizes, and what it cost."""
        size = (
            f"Of {self.experts_before} experts per mixture {self.experts} are left, by {self.by} on "
            f"{', '.join(self.text)}: {self.params:,} parameters of {self.params_before:,}."
        )
        found = self.divergence
        if self.losses is None:
            return f"{size} {found.in_words('the artifact before')}"
        before, after = self.losses
        return (
            f"{size} The loss on {found.tokens:,} held-out tokens is {after:.4f} nats per token, "
            f"{before:.4f} before ({after - before:+.4f}); the divergence is {found.nats:.3g} nats."
        )

    def table(self) -> Table:
        """One row per layer."""
        rows = tuple(layer.row() for layer in self.layers)
        return Table("Experts that are left out", rows, left=("layer", "left out"))

    def shown(self, limit: int | None = None) -> Iterator[Table | str]:
        """See `Shown`."""
        yield self.table().head(limit)
        yield self.in_words()

    def to_json(self) -> dict[str, Any]:
        """A dictionary of plain values."""
        return asdict(self)
