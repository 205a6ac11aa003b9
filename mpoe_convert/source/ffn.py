"""An FFN of a checkpoint: where its projections come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Source:
    """Where one projection comes from: tensor names, and the part of a fused tensor (0 gate, 1 up)."""

    weight: str
    bias: str | None
    transposed: bool
    part: int | None = None


@dataclass(frozen=True)
class DenseFFN:
    """One FFN found in a checkpoint.

    Attributes:
        path: the layer's module path below the base model: "h.0".
        index: the layer's number in its stack.
        key: the checkpoint's prefix for the tensors of the slot: "transformer.h.0.mlp".
        projections: "gate" (if gated), "up" and "down".
    """

    path: str
    index: int
    key: str
    projections: dict[str, Source]
