"""Fit metrics: one module each, discovered; the module's name is the name on the command line.

Such a module defines `FIT`, a `FitMetric`, and nothing else names the metric.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from ...decomposition.low_rank import Metric
from ...planning.plan import MatrixPlan

if TYPE_CHECKING:
    from torch import Tensor

    from ..moments import FFNMoments

METRICS: tuple[str, ...] = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


@dataclass(frozen=True)
class FitMetric:
    """How the error of a compressed matrix W (in, out) is weighed.

    Attributes:
        about: what it is, for people.
        takes_gradients: needs moments of gradients from calibration.
        moment: (moments, matrix, W) -> S, (n, n), of the thin side (see `low_rank.Metric`); None: that of
            inputs that are all alike. Calibration is needed if this or `gradient` is given.
        gradient: (moments, matrix, W) -> G, (n, n), of the thin side; None: all outputs matter alike.
        input_moment: (moments, matrix) -> (in, in) moment that chains with truncated bonds are fitted in;
            None: they are truncated by TT-SVD.
        takes_chains: chains with truncated bonds take this metric.
        allocation: the allocation of ranks that minimises this metric's own loss.
        nats: loss in nats per token for every unit of a spectrum; None: only ratios have a meaning.
        is_correctable: S can be replaced by the moment of what reaches the matrix behind compressed ones.
        is_searched: a search tries it when the recipe names no metric.
    """

    about: str
    takes_gradients: bool = False
    moment: Callable[[FFNMoments, MatrixPlan, Tensor], Tensor] | None = None
    gradient: Callable[[FFNMoments, MatrixPlan, Tensor], Tensor] | None = None
    input_moment: Callable[[FFNMoments, MatrixPlan], Tensor] | None = None
    takes_chains: bool = True
    allocation: str = "energy"
    nats: float | None = None
    is_correctable: bool = False
    is_searched: bool = False

    @property
    def takes_calibration(self) -> bool:
        return self.moment is not None or self.gradient is not None

    def weigh(
        self, matrix: MatrixPlan, weight: Tensor, moments: FFNMoments | None, *, moment: Tensor | None = None
    ) -> Metric:
        """The metric for one matrix, weight (in, out); without moments the Frobenius norm.

        Args:
            moment: takes the place of S.
        """
        if moments is None:
            return Metric(moment)
        if moment is None and self.moment is not None:
            moment = self.moment(moments, matrix, weight)
        return Metric(moment, self.gradient(moments, matrix, weight) if self.gradient else None)


def load(name: str) -> FitMetric:
    """The metric of that name."""
    return import_module(f"{__name__}.{name}").FIT
