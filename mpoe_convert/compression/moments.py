"""Second moments of what passes through one FFN: their names, and how they are summed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..decomposition.low_rank import thin_side
from ..errors import DataError
from ..planning.plan import MatrixPlan
from .batches import evenly_spread
from .stream import check_activations

# Held-out tokens whose inputs are kept to measure output errors with.
SAMPLE = 256


@dataclass(frozen=True, eq=False)
class FFNMoments:
    """What calibration found at one FFN, in float32; moments are means over tokens.

    Attributes:
        tensors: by name,
            "inputs" and "inner": (n, n) moments of the inputs of up (and gate) and of down, where inputs are
            observed (see `observed_side`);
            "up.outputs" and so on: (n, n) moments of their outputs without the bias, where those are;
            "inputs.scale" and "inner.scale": (n,) mean squares;
            "inputs.sample" and "inner.sample": (tokens, n) activations of held-out text;
            with gradients, "up.gradient" and so on: (n, n) moments of the gradient on the thin side, and
            "up.gradient_mean": () mean square of the gradient of the outputs.
    """

    tensors: dict[str, Tensor]

    def thin_moment(self, matrix: MatrixPlan) -> Tensor:
        """(n, n) moment of the matrix's thin side."""
        is_thin = thin_side(matrix.rows, matrix.cols) == "in"
        return self.tensors[place_of(matrix.role) if is_thin else f"{matrix.role}.outputs"]

    def input_moment(self, matrix: MatrixPlan) -> Tensor:
        """(in, in) moment of a matrix's inputs, where those are observed."""
        return self.tensors[place_of(matrix.role)]

    def input_scale(self, matrix: MatrixPlan) -> Tensor:
        """(in,) mean squares of a matrix's inputs."""
        return self.tensors[f"{place_of(matrix.role)}.scale"]

    def reordered(self, order: Tensor | None) -> FFNMoments:
        """The moments with the hidden neurons in another order (new place -> old one); None: as they are."""
        if order is None:
            return self
        order = order.cpu()
        changed = {name: t for name, t in self.tensors.items() if name.partition(".")[0] == "inner"}
        changed = {name: tensor[..., order] for name, tensor in changed.items()}
        if "inner" in changed:
            changed["inner"] = changed["inner"][order]
        return FFNMoments(self.tensors | changed)

    def output_error(self, matrix: MatrixPlan, weight: Tensor, approximation: Tensor) -> float:
        """norm(X (W - W')) / norm(X W) of two matrices (in, out) on held-out inputs X; 0 if X W is 0."""
        sample = self.tensors[f"{place_of(matrix.role)}.sample"].to(weight)
        expected = (sample @ weight).norm()
        return float((sample @ (weight - approximation)).norm() / expected) if expected else 0.0


def observed_side(matrix: MatrixPlan) -> str:
    """ "in" or "out": the side whose moments are collected; of a chain with truncated bonds the inputs."""
    return "in" if matrix.is_truncated else thin_side(matrix.rows, matrix.cols)


def place_of(role: str) -> str:
    """ "inputs" (of the FFN) or "inner" (its hidden neurons): what a projection multiplies."""
    return "inner" if role == "down" else "inputs"


class MomentSums:
    """Sums over batches that become the `FFNMoments` of one FFN."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.samples: dict[str, list[Tensor]] = {}
        self.counts: dict[str, int] = {}

    def add(self, name: str, rows: Tensor, *, squares_only: bool, where: str) -> None:
        """Add activations (tokens, n): their products, in float32 per batch and float64 over batches.

        Args:
            squares_only: only the products of every feature with itself.
            where: the place, for errors.

        Raises:
            CheckpointError: they hold NaN or Inf.
        """
        if squares_only:
            squares = rows.square().sum(0)
        else:
            gram = rows.mT @ rows
            squares = gram.diagonal()
            add_to(self.sums, name, gram.double())
        check_activations(squares, where)
        add_to(self.sums, f"{name}.scale", squares.double())
        self.counts[name] = self.counts.get(name, 0) + len(rows)

    def add_sample(self, name: str, rows: Tensor) -> None:
        """Keep held-out activations (tokens, n)."""
        self.samples.setdefault(name, []).append(rows)

    def finish(self, path: str) -> FFNMoments:
        """Divide by the tokens. Raises DataError if there were fewer tokens than features."""
        for name, count in self.counts.items():
            if name in self.sums and count < len(self.sums[name]):
                needed = len(self.sums[name])
                raise DataError(
                    f"{path} saw {count:,} tokens of calibration data beside those held out; expected the "
                    f"{needed:,} that moments of {needed:,} features need"
                )
        tensors = {
            name: (total / self.counts[name.removesuffix(".scale")]).float().cpu()
            for name, total in self.sums.items()
            if not name.endswith("outputs.scale")
        }
        for name, parts in self.samples.items():
            rows = torch.cat(parts)
            chosen = evenly_spread(len(rows), min(SAMPLE, len(rows)))
            tensors[f"{name}.sample"] = rows[chosen].contiguous().cpu()
        return FFNMoments(tensors)


def add_to(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    """Add a tensor to the named sum, which begins with the first one."""
    if name in sums:
        sums[name] += value
    else:
        sums[name] = value
