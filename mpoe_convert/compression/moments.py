"""What calibration found at one FFN, and the metrics that follow from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..decomposition.low_rank import Metric, thin_side
from ..planning.plan import MatrixPlan

# Share of "all outputs matter alike" in the metric "loss".
ALIKE = 0.3


@dataclass(frozen=True, eq=False)
class FFNMoments:
    """What was found at one FFN; all per token.

    Attributes:
        tensors: by name: "inputs" and "inner", (n, n) moments of what goes into up (and gate) and down,
            where that is observed (see `observed_side`); "up.outputs" and so on, of their outputs without the
            bias, where those are; "inputs.scale" and "inner.scale", mean squares; "inputs.sample" and
            "inner.sample", (tokens, features) of held-out text; with gradients, "up.answer" and so on,
            (n, n) moments of what the loss answers on the thin side, and "up.answer_mean", the outputs'
            gradients' mean square.
    """

    tensors: dict[str, Tensor]

    def metric(self, matrix: MatrixPlan, weight: Tensor, name: str) -> Metric:
        """The metric called `name` (see `recipe.METRICS`) for one of the FFN's matrices (in, out)."""
        place = place_of(matrix.role)
        inputs = thin_side(matrix.rows, matrix.cols) == "in"
        if name == "diagonal":
            scale = self.tensors[f"{place}.scale"].to(weight)
            return Metric(torch.diag(scale) if inputs else (weight.mT * scale) @ weight)
        moment = self.tensors[place if inputs else f"{matrix.role}.outputs"]
        return Metric(moment, self.answer(matrix, weight) if name == "loss" else None)

    def of_inputs(self, matrix: MatrixPlan, name: str) -> Tensor:
        """(in, in) moment of a matrix's inputs, where those are observed; for "diagonal" a diagonal one."""
        place = place_of(matrix.role)
        return torch.diag(self.tensors[f"{place}.scale"]) if name == "diagonal" else self.tensors[place]

    def reordered(self, order: Tensor | None) -> FFNMoments:
        """Those that fit a chain, with the hidden neurons in another order (new place -> old one)."""
        if order is None:
            return self
        order = order.cpu()
        changed = {name: t for name, t in self.tensors.items() if name.partition(".")[0] == "inner"}
        changed = {name: tensor[..., order] for name, tensor in changed.items()}
        if "inner" in changed:
            changed["inner"] = changed["inner"][order]
        return FFNMoments(self.tensors | changed)

    def answer(self, matrix: MatrixPlan, weight: Tensor) -> Tensor:
        """Moment of what the loss answers on the thin side, mixed with that of outputs that matter alike."""
        alike = self.tensors[f"{matrix.role}.answer_mean"].to(weight)
        if thin_side(matrix.rows, matrix.cols) == "in":
            alike = alike * (weight @ weight.mT)
        else:
            alike = alike * torch.eye(matrix.cols, dtype=weight.dtype, device=weight.device)
        return (1 - ALIKE) * self.tensors[f"{matrix.role}.answer"].to(weight) + ALIKE * alike

    def output_error(self, matrix: MatrixPlan, weight: Tensor, approximation: Tensor) -> float:
        """Relative difference of what two matrices (in, out) make of held-out inputs."""
        sample = self.tensors[f"{place_of(matrix.role)}.sample"].to(weight)
        expected = (sample @ weight).norm()
        return float((sample @ (weight - approximation)).norm() / expected) if expected else 0.0


def observed_side(matrix: MatrixPlan) -> str:
    """ "in" or "out": whose second moments are collected. A chain with cut bonds has no thin side."""
    return "in" if matrix.is_cut else thin_side(matrix.rows, matrix.cols)


def place_of(role: str) -> str:
    """ "inputs" or "inner": what a projection multiplies."""
    return "inner" if role == "down" else "inputs"


def metric_for(name: str, matrix: MatrixPlan, weight: Tensor, moments: FFNMoments | None) -> Metric:
    """What a matrix (in, out) is to be near in, by the name of a recipe's metric."""
    if moments is None or name == "weights":
        return Metric()
    return moments.metric(matrix, weight, name)
