"""What a conversion did, measured on the weights as stored."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any

from .. import __version__
from ..compression.divergence import Divergence
from ..errors import counted
from ..options import called
from ..planning.plan import BROKEN_ERROR, NOTICEABLE_ERROR, Plan, works_at_once
from ..planning.rounding import rounding_in_words
from ..tables import Cell, Shown, Table, listed, warning

# Above this divergence from the dense model, in nats per token, a compressed model has lost much of it.
BROKEN_NATS = 0.5
LOST_NATS = 10.0


@dataclass(frozen=True)
class MatrixReport:
    """One converted matrix.

    Attributes:
        relative_error: Frobenius norm of (expert 0 as stored - dense) over that of the dense matrix; where
            large cores are rounded to some bits, before that, whose error `Report.rounding` has.
        relative_error_before_cast: the same before the cores were rounded to the stored dtype; of an eighth
            of a large matrix where nothing is truncated.
        in_dims, out_dims, bonds: where experts differ in size, those of the largest.
        rank: of the two thin matrices that replace the dense one; None: it was not compressed.
        output_error: relative difference between the outputs of expert 0 as stored and those of the dense
            matrix, on held-out calibration inputs; None without calibration.
        discarded_weight: per bond, the share of the squared norm that TT-SVD truncated there; empty for a
            matrix that was fitted in another way.
        clone_drift: relative distance of expert 1 from expert 0, measured on every eighth row of the first
            site, or every eighth column of the last one if it has more (of large matrices fewer); all clones
            are drawn from the same distribution.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    in_dims: tuple[int, ...]
    out_dims: tuple[int, ...]
    bonds: tuple[int, ...]
    full_bonds: tuple[int, ...]
    rank: int | None
    relative_error: float
    relative_error_before_cast: float
    output_error: float | None
    discarded_weight: tuple[float, ...]
    clone_drift: float
    dense_params: int
    stored_params: int
    dtype: str

    def row(self) -> dict[str, Cell]:
        """As a table shows it."""
        return {
            "matrix": self.name,
            "size": f"{self.shape[0]} x {self.shape[1]}",
            "bonds": listed(self.bonds),
            "relative error": f"{self.relative_error:.2e}",
            "of outputs": None if self.output_error is None else f"{self.output_error:.2e}",
            "before the cast": f"{self.relative_error_before_cast:.2e}",
            "clone drift": f"{self.clone_drift:.2e}",
            "dense": self.dense_params,
            "stored": self.stored_params,
        }


def _layer_row(ffn: str, matrices: Sequence[MatrixReport]) -> dict[str, Cell]:
    """An FFN as a table shows it: its worst matrix counts."""
    of_outputs = [m.output_error for m in matrices if m.output_error is not None]
    return {
        "FFN": ffn,
        "largest error": f"{max(m.relative_error for m in matrices):.2e}",
        "of outputs": f"{max(of_outputs):.2e}" if of_outputs else None,
        "clone drift": f"{max(m.clone_drift for m in matrices):.2e}",
        "dense": sum(m.dense_params for m in matrices),
        "stored": sum(m.stored_params for m in matrices),
    }


@dataclass(frozen=True)
class NeuronOrder:
    """What reordering an FFN's hidden neurons gained.

    Attributes:
        ffn: path of its layer.
        source_error / bisected_error: relative error of its matrices together, truncated by TT-SVD, with
            the neurons in the source's order and in the order found.
        applied: whether the artifact has the order found.
    """

    ffn: str
    source_error: float
    bisected_error: float
    applied: bool


@dataclass(frozen=True)
class Trial:
    """One variant of a search: the recipe's choices, and its artifact's divergence from the dense model."""

    metric: str
    allocation: str
    correct: bool
    divergence: Divergence


@dataclass(frozen=True, repr=False)
class Report(Shown):
    """The whole conversion; `to_json` is what conversion_report.json holds. `print` shows it as tables.

    Attributes:
        rounding: by the names of the matrices, the relative error that rounding their cores adds; empty if
            they are not rounded.
    """

    plan: Plan
    matrices: tuple[MatrixReport, ...]
    license: str | None = None
    divergence: Divergence | None = None
    neuron_orders: tuple[NeuronOrder, ...] = ()
    trials: tuple[Trial, ...] = ()
    rounding: dict[str, float] = field(default_factory=dict)

    def rounding_in_words(self) -> str:
        """What rounding the large cores adds, and the bytes."""
        worst = max(self.rounding, key=lambda name: self.rounding[name])
        return (
            f"Large cores are rounded to {self.plan.recipe.bits} bits; this changes the matrices by up to "
            f"{self.rounding[worst]:.2e} of their norm ({worst}). {rounding_in_words(self.plan)}"
        )

    @property
    def max_error(self) -> float:
        return max(m.relative_error for m in self.matrices)

    @property
    def max_drift(self) -> float:
        return max(m.clone_drift for m in self.matrices)

    @property
    def predicted_perplexity(self) -> float | None:
        """The dense model's perplexity times the exponential of the divergence that the plan expected.

        None where either is unknown, or where the expectation exceeds `LOST_NATS`, which no distribution over
        tokens loses.
        """
        budget, found = self.plan.budget, self.divergence
        if not (budget and found and found.dense_perplexity) or budget.chosen.loss is None:
            return None
        if budget.chosen.loss > LOST_NATS:
            return None
        return found.dense_perplexity * math.exp(budget.chosen.loss)

    def divergence_in_words(self) -> str:
        """The measured divergence, and the one that the plan expected."""
        assert self.divergence is not None, "nothing was measured"
        words = self.divergence.in_words(self.plan.source_in_words)
        if self.trials:
            words += " The search selected this variant on the same tokens, so the number is optimistic."
        if self.divergence.nats is None or not self.plan.budget or self.plan.budget.chosen.loss is None:
            return words
        predicted = self.predicted_perplexity
        perplexity = "" if predicted is None else f", perplexity {predicted:.4g}"
        return f"{words} Predicted: {self.plan.budget.chosen.loss:.3g} nats{perplexity}."

    @property
    def warnings(self) -> list[str]:
        return [*self._error_warnings(), *self.plan.warnings]

    def _error_warnings(self) -> list[str]:
        warnings = []
        if self.plan.budget or self.divergence:
            return self._compression_warnings() + self._drift_warnings()
        worst = max(self.matrices, key=lambda m: m.relative_error)
        if worst.relative_error > BROKEN_ERROR:
            warnings.append(
                f"truncation lost most of the model: the relative error of {worst.name} is "
                f"{worst.relative_error:.2f}. The converted model will not work before it is retrained. "
                + works_at_once()
            )
        elif worst.relative_error > NOTICEABLE_ERROR:
            warnings.append(
                f"the weights changed: the relative error of {worst.name} is {worst.relative_error:.3f}. "
                "Expect worse outputs until the model is fine-tuned."
            )
        return warnings + self._drift_warnings()

    def _drift_warnings(self) -> list[str]:
        if self.max_drift <= BROKEN_ERROR:
            return []
        return [
            f"the noise changed the clones by {self.max_drift:.2f} of their norm. The model may not work "
            f"before it is retrained. Lower {called('noise')}."
        ]

    def _compression_warnings(self) -> list[str]:
        """From the measured divergence: errors of the weights say little where a metric was followed."""
        found = self.divergence
        if self.plan.is_exact:
            return []
        if found is None:
            return [
                "matrices were truncated without calibration. Expect worse outputs until the model is "
                f"fine-tuned; {called('calibrate')} keeps what matters on your text."
            ]
        far = found.distance > (BROKEN_ERROR if found.nats is None else BROKEN_NATS)
        size = called("keep" if self.plan.budget else self.plan.recipe.own_options.SIZED_BY)
        heal = f"Raise {size}, or heal it with finetune, {called('teacher')}."
        return [f"the model is far from the dense one on held-out calibration text. {heal}"] if far else []

    def matrices_table(self) -> Table:
        """One row per matrix."""
        rows = tuple(matrix.row() for matrix in self.matrices)
        return Table("Matrices", rows, left=("matrix", "size", "bonds"))

    def layers_table(self) -> Table:
        """One row per FFN."""
        groups = groupby(self.matrices, key=lambda matrix: matrix.name.rpartition(".")[0])
        rows = tuple(_layer_row(ffn, list(matrices)) for ffn, matrices in groups)
        return Table("Layers", rows, left=("FFN",))

    def trials_table(self) -> Table:
        """The nearest first; it is the one that was kept."""
        in_nats = self.trials[0].divergence.nats is not None
        what = "nats of divergence" if in_nats else "difference of the last hidden states"
        rows = tuple(
            {
                "metric": trial.metric,
                "allocation": trial.allocation,
                "corrected": "yes" if trial.correct else "no",
                what: f"{trial.divergence.distance:.3g}",
            }
            for trial in sorted(self.trials, key=lambda trial: trial.divergence.distance)
        )
        left = ("metric", "allocation", "corrected")
        return Table("Search: ways that were tried", rows, left, bold=0)

    def neuron_orders_in_words(self) -> str:
        """One line; errors are means over FFNs."""
        applied = [order for order in self.neuron_orders if order.applied]
        if not applied:
            return (
                "Neurons: no order was found in which truncating the bonds loses less than in the source's."
            )
        source = sum(order.source_error for order in applied) / len(applied)
        found = sum(order.bisected_error for order in applied) / len(applied)
        return (
            f"Neurons: reordered in {len(applied)} of {counted(len(self.neuron_orders), 'FFN')}, where "
            f"truncating the bonds then loses {found:.3f} instead of {source:.3f} (relative error of the "
            "weights, before any metric)."
        )

    def shown(self, limit: int | None = None, *, per_matrix: bool = False) -> Iterator[Table | str]:
        """See `Shown`.

        Args:
            per_matrix: a row per matrix, not per layer.
        """
        plan = self.plan
        yield (self.matrices_table() if per_matrix else self.layers_table()).short().head(limit)
        yield plan.totals_table()
        yield plan.savings
        if self.rounding:
            yield self.rounding_in_words()
        if plan.budget:
            yield plan.budget.table()
            yield plan.budget.in_words(plan.recipe.keep)
        if self.trials:
            yield self.trials_table().head(limit)
        if self.neuron_orders:
            yield self.neuron_orders_in_words()
        if self.divergence:
            yield self.divergence_in_words()
        yield from map(warning, self.warnings)

    def to_json(self) -> dict[str, Any]:
        plan = self.plan
        return {
            "format": 1,
            "version": __version__,
            "base_model": plan.source,
            "revision": plan.revision,
            "key_mapping": plan.key_mapping,
            "model_type": plan.model_type,
            "license": self.license,
            "recipe": plan.recipe.to_mapping(),
            "totals": asdict(plan.totals) | {"ffn": asdict(plan.ffn_totals)},
            "max_relative_error": self.max_error,
            "max_clone_drift": self.max_drift,
            "exact": plan.is_exact,
            "divergence": asdict(self.divergence) if self.divergence else None,
            "predicted_perplexity": self.predicted_perplexity,
            "neuron_orders": [asdict(order) for order in self.neuron_orders],
            "trials": [asdict(trial) for trial in self.trials],
            "rounding": {"bits": plan.recipe.bits, "errors": self.rounding} if self.rounding else None,
            "budget": asdict(plan.budget) if plan.budget else None,
            "warnings": self.warnings,
            "ffns": [ffn.ffn.path for ffn in plan.ffns],
            "kept_dense": list(plan.kept_dense),
            "matrices": [asdict(matrix) for matrix in self.matrices],
        }
