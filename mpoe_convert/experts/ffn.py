"""What a kind of experts is given and what it gives: sizes, a form, matrices to fit, fitted cores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from ..decomposition.sites import Sites


@dataclass(frozen=True)
class MatrixShape:
    """One matrix of an FFN.

    Attributes:
        rows, cols: input and output features.
        has_bias: whether a bias (cols,) belongs to it.
        rank: of the two thin matrices that are to stand for it; None: it stays whole.
    """

    rows: int
    cols: int
    has_bias: bool
    rank: int | None = None


@dataclass(frozen=True)
class FFNShape:
    """The FFN that becomes a mixture, by its sizes.

    Attributes:
        name: for messages: "transformer.h.0.mlp".
        matrices: by role, "gate" (if gated), "up" and "down"; the same for every expert of the source.
        num_source_experts: experts of the source; 1 for a dense FFN.
    """

    name: str
    matrices: Mapping[str, MatrixShape]
    num_source_experts: int = 1

    @property
    def hidden_size(self) -> int:
        return self.matrices["up"].rows


@dataclass(frozen=True)
class Form:
    """What an FFN becomes.

    Attributes:
        parts: by name, what `modeling_mpoe.FeedForward` builds its parts from; JSON values.
        sites: by role, how a chain splits its matrix; without an entry: there is no chain of sites.
    """

    parts: dict[str, Any]
    sites: Mapping[str, Sites] = field(default_factory=dict)


@dataclass(frozen=True)
class Target:
    """What a kind is to fit in the place of one matrix W (in, out).

    Attributes:
        matrix: (in, out), float32 or float64: W itself, or what takes its place.
        factors: (in, rank) and (rank, out), whose product is fitted instead; None: `matrix` is.
    """

    matrix: Tensor
    factors: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True, eq=False)
class Activations:
    """Some tokens of calibration text at one FFN of the dense model, in float32.

    Attributes:
        inputs: (tokens, hidden).
        inner: (tokens, inner), the hidden neurons, as `down` reads them.
        held_inputs, held_inner: the same of text that is held out.
    """

    inputs: Tensor
    inner: Tensor
    held_inputs: Tensor
    held_inner: Tensor


class Targets(Protocol):
    """The matrices of one FFN, read and prepared when they are asked for."""

    @property
    def shape(self) -> FFNShape: ...

    def target(self, role: str, expert: int = 0) -> Target:
        """What is to be fitted for a role of one of the source's experts."""
        ...

    @property
    def activations(self) -> Activations | None:
        """Of the dense FFN on calibration text; None: there is none, or the kind takes none."""
        ...

    def generator(self, part: str) -> Generator:
        """Random numbers for a part of this FFN, the same whatever is built before it."""
        ...


@dataclass(frozen=True)
class Fitted:
    """The cores of a projection.

    Attributes:
        terms: per term of the form its cores, (bond_left, in_dim, out_dim, bond_right): expert 0's, to be
            cloned with noise where they are not shared; or all experts', with an expert axis in front, or in
            a list, which may differ in size.
        discarded: per bond, the squared norm that was truncated.
        neurons: (E, n) int64, which of the FFN's hidden neurons each expert has; None: all.
    """

    terms: Sequence[Sequence[Tensor | list[Tensor]]]
    discarded: tuple[float, ...] = ()
    neurons: Tensor | None = None


# The parts of an FFN as a kind builds them: (name, its cores, or its tensors by name).
Parts = Iterator[tuple[str, Fitted | dict[str, "Tensor"]]]
