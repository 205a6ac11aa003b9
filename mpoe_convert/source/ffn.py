"""An FFN of a checkpoint: which tensors hold its matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """Where one matrix (in, out), with its bias, is in a checkpoint.

    `matrices.read_matrix` and `matrices.read_bias` read it.

    Attributes:
        weight: name of the weight tensor.
        bias: name of the bias tensor; None: the projection has none.
        transposed: the tensor is stored (in, out), as by Conv1D, instead of (out, in), as by nn.Linear.
        part: which half of a fused tensor, along its output features: 0 gate, 1 up; None: the whole tensor.
        interleaved: the halves alternate, one output feature of each, instead of standing one behind the
            other.
        stacked: the tensor holds the matrices of all experts of a mixture, along its first axis.
    """

    weight: str
    bias: str | None
    transposed: bool
    part: int | None = None
    interleaved: bool = False
    stacked: bool = False


@dataclass(frozen=True)
class FFN:
    """One FFN of a checkpoint: the matrices of E experts by role.

    A dense FFN is the case E = 1; `locate.resolve` finds these, `mixtures.locate_experts` the others.

    A mixture as the source has an entry per expert, and since its tensors stack the experts, all entries are
    the same; its routers and shared experts stay what they are.

    Attributes:
        path: the layer's module path below the base model: "h.0".
        index: the layer's number in its stack.
        key: the checkpoint's prefix for the tensors of the slot: "transformer.h.0.mlp".
        experts: per expert, role ("gate" if gated, "up" and "down") -> matrix.
        unread: tensors of the checkpoint that the stock FFN does not have, such as biases that the config
            switches off.
    """

    path: str
    index: int
    key: str
    experts: tuple[Mapping[str, Source], ...]
    unread: tuple[str, ...] = ()

    @property
    def num_experts(self) -> int:
        """E; 1 for a dense FFN."""
        return len(self.experts)

    @property
    def projections(self) -> Mapping[str, Source]:
        """Role -> matrix; of a mixture, what holds the matrices of all experts."""
        return self.experts[0]
