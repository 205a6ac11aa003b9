"""Second moments of what passes through one FFN: their names, and how they are summed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..decomposition.low_rank import thin_side
from ..errors import DataError
from ..planning.plan import MatrixPlan
from ..ranks import Ranks
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
        self.samples: dict[str, dict[int, list[Tensor]]] = {}
        self.counts: dict[str, int] = {}

    def add(self, name: str, rows: Tensor, *, squares_only: bool, where: str) -> None:
        """Add activations (tokens, n): their products, in float32 per batch and float64 over batches.

        Sums of numbers with 24 bits in 53 are exact but where they differ by 2^24 and more, so that the means
        in float32 do not depend on the order: those of several processes are those of one.

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

    def add_sample(self, name: str, rows: Tensor, number: int) -> None:
        """Keep held-out activations (tokens, n) of a batch."""
        self.samples.setdefault(name, {}).setdefault(number, []).append(rows)

    def finish(self, path: str, ranks: Ranks) -> FFNMoments | None:
        """Divide what all processes have by the tokens; None in other processes than the first.

        Raises:
            DataError: there were fewer tokens than features.
        """
        counts: dict[str, int] = {}
        for each in ranks.gathered(self.counts):
            counts |= {name: counts.get(name, 0) + count for name, count in each.items()}
        samples = spread_samples({name: joined(parts) for name, parts in self.samples.items()}, ranks)
        sums = ranks.add_up(self.sums)
        if not ranks.is_first:
            return None
        for name, count in counts.items():
            if name in sums and count < len(sums[name]):
                needed = len(sums[name])
                raise DataError(
                    f"{path} saw {count:,} tokens of calibration data beside those held out; expected the "
                    f"{needed:,} that moments of {needed:,} features need"
                )
        tensors = {
            name: (total / counts[name.removesuffix(".scale")]).float()
            for name, total in sums.items()
            if not name.endswith("outputs.scale")
        }
        return FFNMoments(tensors | {f"{name}.sample": rows for name, rows in samples.items()})


def joined(parts: dict[int, list[Tensor]]) -> dict[int, Tensor]:
    """The rows of every batch, on the CPU."""
    return {number: torch.cat(rows).cpu() for number, rows in parts.items()}


def spread_samples(samples: dict[str, dict[int, Tensor]], ranks: Ranks) -> dict[str, Tensor]:
    """By name `SAMPLE` rows at even distances, of all that the processes have by number of the batch."""
    sizes: dict[str, dict[int, int]] = {}
    for each in ranks.gathered({name: _sizes(parts) for name, parts in samples.items()}):
        for name, found in each.items():
            sizes[name] = sizes.get(name, {}) | found
    own: dict[str, dict[int, Tensor]] = {}
    for name, found in sizes.items():
        start, total = 0, sum(found.values())
        chosen = torch.tensor(evenly_spread(total, min(SAMPLE, total)))
        own[name] = {}
        for number, size in sorted(found.items()):
            inside = chosen[(chosen >= start) & (chosen < start + size)] - start
            start += size
            if number in samples.get(name, {}):
                own[name][number] = samples[name][number][inside]
    return merge_rows(own, ranks)


def merge_rows(own: dict[str, dict[int, Tensor]], ranks: Ranks) -> dict[str, Tensor]:
    """By name, the rows of all processes in the order of the batches."""
    merged: dict[str, dict[int, Tensor]] = {}
    for each in ranks.gathered(own):
        for name, found in each.items():
            merged[name] = merged.get(name, {}) | found
    return {name: torch.cat([found[n] for n in sorted(found)]).contiguous() for name, found in merged.items()}


def _sizes(parts: dict[int, Tensor]) -> dict[int, int]:
    return {number: len(rows) for number, rows in parts.items()}


def add_to(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    """Add a tensor to the named sum, which begins with the first one."""
    if name in sums:
        sums[name] += value
    else:
        sums[name] = value
