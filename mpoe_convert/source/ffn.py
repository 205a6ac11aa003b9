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
    """

    weight: str
    bias: str | None
    transposed: bool
    part: int | None = None


@dataclass(frozen=True)
class FFN:
    """One FFN of a checkpoint: the matrices of E experts by role, with a router and a shared expert if any.

    A dense FFN is the case E = 1: `experts` has one entry, `router` and `shared` are None. The table of
    families describes dense FFNs only, so that is what `locate.resolve` returns.

    A mixture as the source (Mixtral, Qwen3-MoE, DeepSeek) fills in the same fields:

    * `experts`: one entry per expert, all with the same roles and sizes. Where one tensor stacks all experts,
      `Source` needs the expert's index beside `part`, and `read_matrix` has to take that slice.
    * `router`: the weight tensor (E, hidden size) whose logits choose among `experts`, in their order.
    * `shared`: the expert that every token passes beside the chosen ones, with the same roles.

    Attributes:
        path: the layer's module path below the base model: "h.0".
        index: the layer's number in its stack.
        key: the checkpoint's prefix for the tensors of the slot: "transformer.h.0.mlp".
        experts: per expert, role ("gate" if gated, "up" and "down") -> matrix.
        router: name of the router's weight tensor.
        shared: role -> matrix of the shared expert.
        unread: tensors of the checkpoint that the stock FFN does not have, such as biases that the config
            switches off.
    """

    path: str
    index: int
    key: str
    experts: tuple[Mapping[str, Source], ...]
    router: str | None = None
    shared: Mapping[str, Source] | None = None
    unread: tuple[str, ...] = ()

    @property
    def num_experts(self) -> int:
        """E; 1 for a dense FFN."""
        return len(self.experts)

    @property
    def projections(self) -> Mapping[str, Source]:
        """Role -> matrix, of a dense FFN."""
        assert self.num_experts == 1 and self.router is None, "a mixture has projections per expert"
        return self.experts[0]
