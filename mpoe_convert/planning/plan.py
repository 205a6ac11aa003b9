"""The resolved work as values without tensors: what becomes of every matrix, FFN and tensor, and its cost."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from ..artifact.rounding import BITS
from ..artifact.weight_files import IN_FLIGHT, num_bytes
from ..decomposition.random_error import random_error
from ..decomposition.sites import Sites, full_bonds
from ..errors import counted
from ..experts.ffn import FFNShape, Form
from ..experts.selection import in_short
from ..options import assigned, called
from ..runtime.shapes import modeling
from ..source.families import Family
from ..source.ffn import FFN, Source
from ..tables import Cell, Shown, Table, escape, listed, listed_bonds, merge_names, size, warning
from .recipe import Recipe
from .rounding import rounding_bytes, rounding_in_words, source_bytes, without_large_cores
from .totals import Totals, ffn_totals, model_totals, savings_in_words

# Above this relative error of a matrix, a model of more than a few layers no longer works: on trained
# weights, 0.76 turns text into noise (see examples/benchmarks, "How much error is too much").
BROKEN_ERROR = 0.4
NOTICEABLE_ERROR = 0.02


def works_at_once() -> str:
    """The advice about truncation that loses most of a model."""
    exact = assigned("layout", "blocks", "one-sided", "two-sided")
    return f"For a model that works at once, use {exact}, or larger bonds."


@dataclass(frozen=True)
class MatrixPlan:
    """One dense matrix and the term it becomes.

    Attributes:
        name: the projection's name in the artifact: "transformer.h.0.mlp.up".
        role: "gate", "up" or "down".
        rows, cols: input and output features.
        sites: None for kinds without sites.
        spec: the projection as `modeling_mpoe.Projection` reads it.
        dtype: of the stored cores.
        rank: of the two thin matrices that stand for the big core; None: it is whole.
    """

    name: str
    role: str
    source: Source
    rows: int
    cols: int
    sites: Sites | None
    spec: dict
    dtype: str
    num_experts: int
    rank: int | None = None

    @property
    def shares_whole(self) -> bool:
        """Whether the big core, the matrix itself or the middle of its chain, is stored once."""
        return any(self.spec["terms"][0]["shared"])

    @property
    def own_term(self) -> dict:
        """The term that experts have tensors of their own in; the first one if they have none."""
        terms = self.spec["terms"]
        return next((term for term in terms if not all(term["shared"])), terms[0])

    @property
    def full_bonds(self) -> tuple[int, ...]:
        """What the bonds of `own_term` would be if nothing were truncated; none for kinds without sites."""
        if self.sites is None:
            return ()
        return full_bonds(tuple(self.own_term["in_dims"]), tuple(self.own_term["out_dims"]))

    @property
    def is_truncated(self) -> bool:
        """Whether its chain has bonds too small for any matrix of this size."""
        return self.sites is not None and not self.sites.is_exact

    @cached_property
    def random_error(self) -> float:
        """Relative error that truncating its chain would cost a random matrix; a trained one loses less."""
        return random_error(self.sites) if self.sites is not None and self.is_truncated else 0.0

    @property
    def is_exact(self) -> bool:
        return self.rank is None and not self.is_truncated

    @property
    def dense_params(self) -> int:
        return self.rows * self.cols + (self.cols if self.source.bias else 0)

    def row(self) -> dict[str, Cell]:
        """As a table shows it."""
        term = self.own_term
        return {
            "matrix": self.name,
            "size": f"{self.rows} x {self.cols}",
            "sites (in x out)": f"{listed(term['in_dims'])} x {listed(term['out_dims'])}",
            "bonds": listed_bonds(term),
            "full bonds": listed(self.full_bonds) if self.is_truncated else None,
            "rank": self.rank,
            "dense": self.dense_params,
            "stored": self.stored_params,
        }

    def to_json(self) -> dict[str, Any]:
        term = self.own_term
        return {
            "name": self.name,
            "shape": [self.rows, self.cols],
            **{key: term[key] for key in ("in_dims", "out_dims", "bonds")},
            "full_bonds": list(self.full_bonds),
            "rank": self.rank,
            "dense_params": self.dense_params,
            "stored_params": self.stored_params,
        }

    @cached_property
    def stored_params(self) -> int:
        """Parameters of all experts, by the shipped module's own count."""
        return modeling().Projection(self.spec, self.num_experts).stored_params


@dataclass(frozen=True)
class FFNPlan:
    """One FFN: its matrices, and name -> (shape, dtype) of all its tensors in the artifact.

    Attributes:
        form: what it becomes.
        runs_per_token: how often a token passes it: once, but in ALBERT layers share their FFN.
    """

    ffn: FFN
    shape: FFNShape
    matrices: tuple[MatrixPlan, ...]
    form: Form
    tensors: dict[str, tuple[tuple[int, ...], str]]
    runs_per_token: int = 1

    @property
    def num_bytes(self) -> int:
        """Bytes of its tensors, before any is rounded."""
        return sum(OutTensor(name, *spec, None).num_bytes for name, spec in self.tensors.items())


@dataclass(frozen=True)
class OutTensor:
    """A tensor of the artifact. `ffn` is the key of the FFN that makes it, None for a copied one."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    ffn: str | None

    @property
    def num_bytes(self) -> int:
        return num_bytes(self)


@dataclass(frozen=True)
class BudgetPoint:
    """One point of the budget's curve: a share of the dense FFNs' parameters, and what it costs.

    Attributes:
        keep: the share.
        error: root mean square of the matrices' predicted relative errors in the metric.
        loss: expected divergence from the dense model at temperature 2, times its square, in nats per token
            (without logits: half the squared difference of the last hidden states); None if that was not
            asked.
    """

    keep: float
    error: float
    loss: float | None


@dataclass(frozen=True)
class Budget:
    """What a recipe's `keep` and `max_error` came to. Shares are of the dense FFNs' parameters.

    Attributes:
        smallest_keep: the smallest share that can be met.
        fixed: share of what is not compressed: what experts own, biases, routers.
        tokens: of calibration text; 0: none, or other inputs.
        errors: by the names of the matrices, their predicted relative errors in the metric.
        chosen: what was taken.
        curve: what else there is.
    """

    smallest_keep: float
    fixed: float
    tokens: int
    errors: dict[str, float]
    chosen: BudgetPoint
    curve: tuple[BudgetPoint, ...]

    def table(self) -> Table:
        """What was chosen, and what else there is."""
        others = [point for point in self.curve if abs(point.keep - self.chosen.keep) > 0.01]
        points = sorted([*others, self.chosen], key=lambda point: point.keep)
        rows = tuple(
            {
                "FFN parameters kept": f"{point.keep:.1%}",
                "root mean square error": f"{point.error:.3f}",
                "expected loss": None if self.chosen.loss is None else f"+{point.loss:.3g}",
            }
            for point in points
        )
        title = "Budget: what other shares are predicted to cost"
        return Table(title, rows, left=(), bold=points.index(self.chosen))

    def in_words(self, asked: float | None) -> str:
        text = "" if asked is None else f", asked {asked:.1%}"
        text += f" (calibrated on {self.tokens:,} tokens)" if self.tokens else ""
        return (
            f"Kept: {self.chosen.keep:.1%} of the dense FFNs' parameters{text}; the least that can be met: "
            f"{self.smallest_keep:.1%}, of which {self.fixed:.1%} are what experts own, biases and routers."
        )


@dataclass(frozen=True, repr=False)
class Plan(Shown):
    """The resolved work. Holds no tensors. `print`, the REPL and notebooks show it as tables.

    Attributes:
        notes: what a user should know of the source.
        key_mapping: what `from_pretrained` needs to read the source's names, where a wrapper changed them.
        reads: bytes of the source that are read for a tensor that is copied, by its name, and for an FFN, by
            its key.
    """

    recipe: Recipe
    source: str
    revision: str | None
    model_type: str
    family: Family
    ffns: tuple[FFNPlan, ...]
    kept_dense: tuple[str, ...]
    tensors: tuple[OutTensor, ...]
    shards: dict[str, tuple[str, ...]] = field(repr=False)
    dense_flops_per_token: int = 0
    budget: Budget | None = None
    notes: tuple[str, ...] = ()
    key_mapping: dict[str, str] = field(default_factory=dict, repr=False)
    reads: dict[str, int] = field(default_factory=dict, repr=False)

    @cached_property
    def by_name(self) -> dict[str, OutTensor]:
        """The artifact's tensors by their names."""
        return {tensor.name: tensor for tensor in self.tensors}

    @property
    def source_in_words(self) -> str:
        """What an artifact is compared with, in a sentence."""
        return "the dense model"

    @property
    def kind(self) -> str:
        """What experts are made of, as config.json names it."""
        return self.recipe.kind

    @property
    def matrices(self) -> Iterable[MatrixPlan]:
        return (matrix for ffn in self.ffns for matrix in ffn.matrices)

    @property
    def is_exact(self) -> bool:
        """Whether nothing is truncated: but for noise and rounding it computes what the dense model does."""
        return self.recipe.own_options.starts_exact() and all(matrix.is_exact for matrix in self.matrices)

    @cached_property
    def ffn_totals(self) -> Totals:
        """Totals of the converted FFNs alone."""
        return ffn_totals(self)

    @cached_property
    def totals(self) -> Totals:
        """Totals of the whole model."""
        return model_totals(self, self.dense_flops_per_token - self.ffn_totals.dense_flops_per_token)

    @property
    def savings(self) -> str:
        """What the whole model saves beside a plain MoE, and what it does not, in a sentence."""
        return savings_in_words(self.totals, self.recipe.experts)

    @property
    def peak_bytes(self) -> int:
        """Estimated peak of tensor memory of one process, see `peak_of`."""
        return self.peak_of(self.shards)

    def peak_of(self, files: Collection[str]) -> int:
        """Estimated peak of tensor memory: what waits to be written, the largest FFN, the work on a matrix.

        A matrix in work is held as read, in float32, interleaved for the decomposition, contracted
        back for the error, and as its cores. Finding an order of neurons takes all of an FFN's matrices
        at once, as they are and as features, centred and halved. Rounding comes when all matrices of an FFN
        are done. What calibration takes is left out.

        Args:
            files: weight files that the process makes.
        """
        ffns = self.ffns_in(files)
        largest = max((ffn.num_bytes for ffn in ffns), default=0)
        matrix = max((4 * 5 * m.rows * m.cols for ffn in ffns for m in ffn.matrices), default=0)
        reordered = [ffn for ffn in ffns if self.seeks_order(ffn)]
        order = max((4 * 4 * sum(m.rows * m.cols for m in ffn.matrices) for ffn in reordered), default=0)
        rounding = max((rounding_bytes(ffn, self.recipe.bits) for ffn in ffns), default=0)
        return self.held_of(files) + largest + max(matrix, order, rounding)

    def ffns_in(self, files: Collection[str]) -> list[FFNPlan]:
        """The FFNs of which these weight files hold tensors."""
        keys = {self.by_name[name].ffn for file in files for name in self.shards[file]}
        return [ffn for ffn in self.ffns if ffn.ffn.key in keys]

    def bytes_of(self, names: Iterable[str]) -> int:
        """Bytes of these tensors of the artifact."""
        return sum(self.by_name[name].num_bytes for name in names)

    def held_of(self, files: Collection[str]) -> int:
        """Bytes that wait to be written while a tensor of these weight files is made, and its own."""
        sizes = ([self.by_name[name].num_bytes for name in self.shards[file]] for file in files)
        return max((min(sum(each), IN_FLIGHT + max(each, default=0)) for each in sizes), default=0)

    def seeks_order(self, ffn: FFNPlan) -> bool:
        """Whether another order of an FFN's neurons is tried."""
        return self.recipe.neuron_order == "auto" and any(matrix.is_truncated for matrix in ffn.matrices)

    @property
    def warnings(self) -> list[str]:
        """What can be said before any tensor is read."""
        warnings = [*self.notes, *filter(None, [without_large_cores(self)])]
        alone = [
            m.name for m in self.matrices if m.sites and m.sites.auxiliary_params * 1000 < m.dense_params
        ]
        if alone:
            warnings.append(
                f"an expert owns less than a thousandth of the parameters of {alone[0]}"
                f"{f' and {len(alone) - 1} others' if len(alone) > 1 else ''}: experts can hardly differ. "
                f"Raise {called('bond_dim')}."
            )
        experts = self.recipe.experts
        grown = [m.name for m in self.matrices if m.sites and m.stored_params > experts * m.dense_params]
        if grown:
            warnings.append(
                f"{grown[0]} stores more parameters than {experts} dense copies would: the auxiliary tensors "
                f"are too large for this matrix. Lower {called('bond_dim')}, or use "
                f"{assigned('kind', 'dense')}."
            )
        return warnings

    @property
    def forecasts(self) -> list[str]:
        """What conversion will measure and warn of, estimated from the shapes."""
        worst = max(self.matrices, key=lambda matrix: matrix.random_error)
        error = worst.random_error
        if error <= NOTICEABLE_ERROR:
            return []
        estimate = (
            f"a random matrix of the size of {worst.name} has a relative error of {error:.2f} at bonds "
            f"{listed(worst.own_term['bonds'])}; trained ones lose somewhat less"
        )
        if error <= BROKEN_ERROR:
            words = "Expect worse outputs until the model is fine-tuned."
            return [f"truncation will change the weights: {estimate}. {words}"]
        return [
            f"truncation will lose most of the model: {estimate}. The converted model will not work before "
            f"it is retrained. {works_at_once()}"
        ]

    def to_json(self) -> dict[str, Any]:
        """What `mpoe-convert plan --json` prints."""
        return {
            "base_model": self.source,
            "revision": self.revision,
            "model_type": self.model_type,
            "recipe": self.recipe.to_mapping(),
            "totals": asdict(self.totals) | {"ffn": asdict(self.ffn_totals)},
            "rounded_source_bytes": {str(bits): source_bytes(self, bits) for bits in BITS},
            "exact": self.is_exact,
            "peak_bytes": self.peak_bytes,
            "kept_dense": list(self.kept_dense),
            "warnings": [*self.warnings, *self.forecasts],
            "budget": asdict(self.budget) if self.budget else None,
            "matrices": [matrix.to_json() for matrix in self.matrices],
            "tensors": {t.name: {"shape": list(t.shape), "dtype": t.dtype} for t in self.tensors},
            "shards": {file: list(names) for file, names in self.shards.items()},
        }

    def totals_table(self) -> Table:
        """Both references beside the artifact, for the FFNs and for the whole model."""
        rows = [*self.ffn_totals.rows("FFNs"), *self.totals.rows("whole model")]
        if flops := self.ffn_totals.rebuild_flops_per_forward:
            what = "FFNs: FLOPs to rebuild experts, per pass"
            blank: dict[str, Cell] = dict.fromkeys(rows[0], "")
            rows.append(blank | {"": what, "this model": flops})
        return Table("Totals", tuple(rows))

    def shards_table(self) -> Table:
        sizes = {tensor.name: tensor.num_bytes for tensor in self.tensors}
        rows = (
            {"file": file, "tensors": len(names), "bytes": size(sum(sizes[name] for name in names))}
            for file, names in self.shards.items()
        )
        return Table("Weight files", tuple(rows), left=("file",))

    def kept_in_words(self, limit: int | None = None) -> str:
        """The layers that are not converted, neighbours together; of long lists the first `limit`."""
        names = [name for name, _ in merge_names([(name, None) for name in self.kept_dense])]
        return ", ".join(names if limit is None or len(names) <= limit else [*names[:limit], "…"])

    def shown(self, limit: int | None = None) -> Iterator[Table | str]:
        """See `Shown`."""
        recipe, dense = self.recipe, self.kept_dense
        yield (
            f"[bold]{escape(self.source)}[/] ({self.model_type}): {counted(len(self.ffns), 'FFN')} -> "
            f"{recipe.experts} experts of kind {recipe.kind}, "
            f"{in_short(recipe.select, recipe.top_k, recipe.threshold)}"
            f"{f', and {recipe.shared_experts} shared' if recipe.shared_experts else ''}"
        )
        if dense:
            stay = "1 FFN stays" if len(dense) == 1 else f"{len(dense):,} FFNs stay"
            yield f"{stay} dense: {self.kept_in_words(limit)}"
        left = ("matrix", "size", "sites (in x out)", "bonds", "full bonds")
        rows = tuple(matrix.row() for matrix in self.matrices)
        yield Table("Matrices", rows, left).short().head(limit)
        yield self.totals_table()
        yield self.savings
        yield rounding_in_words(self)
        yield self.shards_table().head(limit)
        yield f"Peak memory for tensors, estimated: {size(self.peak_bytes)}"
        if self.budget:
            yield self.budget.table()
            yield self.budget.in_words(recipe.keep)
        else:
            exact = "nothing is truncated" if self.is_exact else "truncated below the full ones"
            yield recipe.own_options.first_state() or f"Bonds: {exact}."
        yield from map(warning, [*self.warnings, *self.forecasts])
