"""What became of the experts of an artifact, and what it cost."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from ..compression.divergence import Divergence
from ..planning.fewer_experts import LayerExperts, table_of
from ..tables import Shown, Table


@dataclass(frozen=True, repr=False)
class Smaller(Shown):
    """An artifact with fewer experts.

    Attributes:
        artifact: the one that it was made of.
        by: what decided which experts stay.
        text: names of the files or Hub datasets on which experts were observed.
        experts_before, experts: per mixture; experts that every token passes are not counted.
        layers: in layer order, by the numbers that experts had before.
        divergence: from that artifact, on held-out text.
        params_before, params: in the weight files.
    """

    artifact: str
    by: str
    text: tuple[str, ...]
    experts_before: int
    experts: int
    layers: tuple[LayerExperts, ...]
    divergence: Divergence
    params_before: int
    params: int

    @property
    def losses(self) -> tuple[float, float] | None:
        """The losses on held-out text, before and after, in nats per token; None if the model writes none."""
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
            f"{size} The loss on held-out text is {after:.4f} nats per token, {before:.4f} before "
            f"({after - before:+.4f}); the divergence is {found.nats:.3g} nats over {found.tokens:,} tokens."
        )

    def table(self) -> Table:
        """One row per layer."""
        return table_of(self.layers)

    def shown(self, limit: int | None = None) -> Iterator[Table | str]:
        """See `Shown`."""
        yield self.table().head(limit)
        yield self.in_words()

    def to_json(self) -> dict[str, Any]:
        """A dictionary of plain values."""
        return asdict(self) | {"layers": [layer.to_json() for layer in self.layers]}
