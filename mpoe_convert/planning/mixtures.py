"""Plans for mixtures as sources: the experts of a layer as stacks of matrices, whole or shared."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ..decomposition.stacks import UNEVEN, Ranks, stack_terms
from ..decomposition.symmetric import packed_length
from ..errors import RecipeError, counted
from ..experts.ffn import FFNShape, Form, MatrixShape
from ..options import called
from ..runtime.shapes import modeling
from ..source.ffn import FFN
from ..source.in_memory import InMemory
from ..source.mixtures import Located, locate_experts
from ..source.pruned import Pruned
from ..source.safetensors_file import DTYPE2BYTES
from ..tables import Cell, Table, escape, listed_ranks, size, warning
from .fewer_experts import FewerExperts, fewer_than
from .plan import FFNPlan, MatrixPlan, Plan
from .planner import assemble
from .recipe import Recipe
from .resolve import Resolved, check_for_mixtures, select_ffns
from .rounding import rounding_bytes, rounding_in_words, without_large_cores
from .totals import Totals, model_totals

# Matrix -> what it becomes: form, ranks, and how alike the experts are, if known. A matrix that is not named
# stays whole.
Chosen = Mapping[str, tuple[str, Ranks, float | None]]


@dataclass(frozen=True)
class StackPlan(MatrixPlan):
    """One projection of all experts of a layer.

    Attributes:
        form, ranks: see `decomposition.stacks`.
        source_experts: how many the source has, of which `num_experts` stay.
        alike: how much of the experts' outputs their mean explains, see `decomposition.stack_fit.alikeness`;
            None: nothing was read.
    """

    form: str = "whole"
    ranks: Ranks = ()
    alike: float | None = None
    source_experts: int = field(kw_only=True)

    @property
    def is_exact(self) -> bool:
        return self.form == "whole"

    @property
    def numbers(self) -> int:
        """Entries of the matrices of all experts of the source."""
        return self.source_experts * self.rows * self.cols

    @property
    def dense_params(self) -> int:
        return self.numbers + (self.source_experts * self.cols if self.source.bias else 0)

    def row(self) -> dict[str, Cell]:
        return {
            "experts' matrix": self.name,
            "size": f"{self.num_experts} x {self.rows} x {self.cols}",
            "shared": self.form,
            "ranks": listed_ranks(self.ranks, self.form in UNEVEN),
            "alike": None if self.alike is None else f"{self.alike:.2f}",
            "source": self.dense_params,
            "stored": self.stored_params,
            "kept": f"{self.stored_params / self.dense_params:.0%}",
        }

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "experts": self.num_experts,
            "shape": [self.rows, self.cols],
            "form": self.form,
            "ranks": list(self.ranks),
            "alike": self.alike,
            "dense_params": self.dense_params,
            "stored_params": self.stored_params,
        }


class MixtureTotals(Totals):
    """Totals beside one reference: the source, which takes the place of both."""

    def rows(self, label: str) -> Iterator[dict[str, Cell]]:
        for row in super().rows(label):
            share = row["of plain MoE"]
            yield {
                "": row[""],
                "source": row["plain MoE"],
                "this model": row["this model"],
                "of the source": share,
            }


@dataclass(frozen=True, repr=False)
class MixturePlan(Plan):
    """The resolved work on a mixture: routers and blocks stay, the experts' matrices become stacks.

    Attributes:
        fewer: which experts stay; None: all.
    """

    fewer: FewerExperts | None = None

    @property
    def is_exact(self) -> bool:
        return self.fewer is None and super().is_exact

    @property
    def source_experts(self) -> int:
        """How many experts each layer of the source has."""
        return self.recipe.experts if self.fewer is None else self.fewer.source_experts

    @property
    def source_in_words(self) -> str:
        return "the source"

    @property
    def kind(self) -> str:
        return "experts"

    @cached_property
    def ffn_totals(self) -> Totals:
        experts, top_k = self.recipe.experts, self.recipe.top_k
        modules = [experts_module(ffn.form.parts, self.recipe) for ffn in self.ffns]
        shared, own = (sum(getattr(m, f"{kind}_params") for m in modules) for kind in ("shared", "own"))
        source = sum(matrix.dense_params for matrix in self.matrices)
        num_bytes = sum(matrix.dense_params * DTYPE2BYTES[matrix.dtype] for matrix in self.matrices)
        costs = [module.cost(modeling().Work(tokens=1, rows=top_k, experts=experts)) for module in modules]
        flops = sum(2 * top_k * matrix.rows * matrix.cols for matrix in self.matrices)
        return MixtureTotals(
            **_twice(params=source, active_params=top_k * source // self.source_experts, bytes=num_bytes),
            stored_params=sum(module.stored_params for module in modules),
            active_params=int(shared + top_k * own),
            stored_bytes=sum(tensor.num_bytes for tensor in self.tensors if tensor.ffn is not None),
            dense_flops_per_token=flops,
            plain_moe_flops_per_token=flops,
            flops_per_token=int(sum(cost.flops for cost in costs)),
            rebuild_flops_per_forward=int(sum(cost.rebuild_flops for cost in costs)),
            varies=False,
            differ=any(module.differ for module in modules),
        )

    @cached_property
    def totals(self) -> Totals:
        found = model_totals(self, self.dense_flops_per_token)  # of all but the experts
        if self.fewer is None:
            return found
        params, num_bytes = self.fewer.copied_params, self.fewer.copied_bytes
        return replace(
            found,
            **_twice(
                params=found.dense_params + params,
                active_params=found.plain_moe_active_params + params,
                bytes=found.dense_bytes + num_bytes,
            ),
        )

    @property
    def takes_moments(self) -> bool:
        """Whether matrices are fitted to what experts get of the recipe's text."""
        return bool(self.recipe.calibrate) and self.recipe.keep is not None

    @property
    def experts_in_words(self) -> str:
        """How many there are per layer: "16", or "12 of 16"."""
        experts = f"{self.recipe.experts}"
        return experts if self.fewer is None else f"{experts} of {self.source_experts}"

    def to_json(self) -> dict[str, Any]:
        return super().to_json() | {"fewer_experts": self.fewer.to_json() if self.fewer else None}

    @property
    def savings(self) -> str:
        own, model = self.ffn_totals, self.totals
        share = own.stored_params / own.dense_params
        flops = own.flops_per_token / own.dense_flops_per_token
        keep = self.recipe.keep
        allowed = "" if keep is None else f" ({called('keep')} allows {keep:.1%})"
        return (
            f"The experts store {own.stored_params:,} numbers, {share:.1%} of the source's "
            f"{own.dense_params:,}{allowed}, and take {flops:.1%} of its "
            f"FLOPs per token; the whole model stores {model.stored_params:,}, "
            f"{model.stored_params / model.dense_params:.1%}, and takes "
            f"{model.flops_per_token / model.dense_flops_per_token:.1%}."
        )

    def peak_of(self, files: Collection[str]) -> int:
        """Estimated peak of tensor memory: what waits to be written, a layer as read and as made, its largest
        stack, and the moments of a layer if there are some.

        A stack in work is held in float32, twice while it is fitted. Calibration sums moments in float64.
        """
        ffns = self.ffns_in(files)
        if not ffns:
            return self.held_of(files)
        layer = max(
            ffn.num_bytes + sum(matrix.dense_params * DTYPE2BYTES[matrix.dtype] for matrix in ffn.matrices)
            for ffn in ffns
        )
        moments = max(map(moment_bytes, ffns)) if self.takes_moments else 0
        rounding = max(rounding_bytes(ffn, self.recipe.bits) for ffn in ffns)
        stack = max(4 * 2 * matrix.dense_params for ffn in ffns for matrix in ffn.matrices)
        work = max(rounding, stack, 2 * moments)
        return self.held_of(files) + layer + moments + work

    def seeks_order(self, ffn: FFNPlan) -> bool:
        return False

    @property
    def warnings(self) -> list[str]:
        return [*self.notes, *filter(None, [without_large_cores(self)])]

    @property
    def forecasts(self) -> list[str]:
        return []

    def totals_table(self) -> Table:
        """The source beside the artifact, for the experts and for the whole model."""
        return Table("Totals", (*self.ffn_totals.rows("experts"), *self.totals.rows("whole model")))

    def shown(self, limit: int | None = None) -> Iterator[Table | str]:
        """See `Shown`."""
        recipe, fewer = self.recipe, self.fewer
        yield (
            f"[bold]{escape(self.source)}[/] ({self.model_type}): the experts of "
            f"{counted(len(self.ffns), 'layer')}, {self.experts_in_words} each, of which a token takes "
            f"{recipe.top_k}; routers {'stay as they are' if fewer is None else 'keep the rows of these'}"
        )
        if self.kept_dense:
            yield f"Left as they are: {self.kept_in_words(limit)}"
        rows = tuple(matrix.row() for matrix in self.matrices)
        yield Table("Experts", rows, ("experts' matrix", "size", "shared", "ranks")).short().head(limit)
        if fewer is not None and fewer.is_scored:
            yield fewer.table().head(limit)
        yield self.totals_table()
        yield self.savings
        yield rounding_in_words(self)
        yield self.shards_table().head(limit)
        yield f"Peak memory for tensors, estimated: {size(self.peak_bytes)}"
        if self.takes_moments:
            needed = size(sum(map(moment_bytes, self.ffns)))
            yield f"Moments of the calibration, kept in the cache of Hugging Face: {needed}"
        if self.is_exact:
            yield "Experts: whole, nothing is truncated."
        yield from map(warning, self.warnings)


def moment_bytes(ffn: FFNPlan) -> int:
    """What the calibration of a layer's experts takes, in memory and on the disk: float32, packed.

    Of all experts of the source.
    """
    stacks = {matrix.role: matrix for matrix in ffn.matrices if isinstance(matrix, StackPlan)}
    return 4 * sum(stacks[role].source_experts * packed_length(stacks[role].rows) for role in ("up", "down"))


def _twice(params: int, active_params: int, bytes: int) -> dict[str, int]:
    """The source's numbers, as both references."""
    return {
        "dense_params": params,
        "plain_moe_params": params,
        "plain_moe_active_params": active_params,
        "dense_bytes": bytes,
        "plain_moe_bytes": bytes,
    }


def resolve_mixture(recipe: Recipe, checkpoint: InMemory) -> Resolved:
    """Resolve a recipe for a mixture, from its headers; one with as many experts as the recipe asks for.

    Raises:
        MpoeError: the experts cannot be located or replaced, or the recipe does not fit them.
    """
    located = locate_experts(checkpoint, recipe.experts_at)
    _check_options(recipe, located)
    chosen = select_ffns(recipe, located.ffns)
    full = recipe.replace(
        revision=checkpoint.revision,
        experts=located.num_experts,
        top_k=located.top_k,
        share=(recipe.share or "auto") if recipe.keep is not None else None,
    )
    kept = tuple(ffn.path for ffn in located.ffns if ffn not in chosen)
    return Resolved(full, located.family, tuple(chosen), kept, checkpoint.notes)


def _check_options(recipe: Recipe, located: Located) -> None:
    """Raises RecipeError for an option that has no meaning where the source is a mixture."""
    assert not fewer_than(recipe, located), "experts are left out before"
    check_for_mixtures(recipe)
    if "top_k" in recipe.given and recipe.top_k != located.top_k:
        raise RecipeError(
            f"{called('top_k')} is {recipe.top_k}, and the source is a mixture of {located.num_experts} "
            f"experts, {located.top_k} per token; expected {located.top_k}, or leave it out"
        )


def plan_mixture(
    resolved: Resolved,
    checkpoint: InMemory,
    chosen: Chosen | None = None,
    fewer: FewerExperts | None = None,
) -> MixturePlan:
    """The plan of a resolved recipe, from headers.

    Args:
        chosen: what matrices become, by their names; the others stay whole.
        fewer: which experts the checkpoint has left.
    """
    ffns = tuple(_plan_ffn(resolved.recipe, checkpoint, ffn, chosen or {}) for ffn in resolved.ffns)
    plan = assemble(MixturePlan, resolved, checkpoint, ffns, _kept_in_float32(checkpoint.model))
    if fewer is None:
        return plan
    assert isinstance(checkpoint, Pruned)
    notes = (*plan.notes, *fewer.notes())
    return replace(plan, fewer=fewer.of(plan.tensors, checkpoint), notes=notes)


def _kept_in_float32(model: Any) -> frozenset[str]:
    """Parts of names whose tensors the stock model leaves in float32, whatever its dtype: routers' biases."""
    names = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    return frozenset(part for name in names for part in getattr(model, name, None) or ())


def _plan_ffn(recipe: Recipe, checkpoint: InMemory, ffn: FFN, chosen: Chosen) -> FFNPlan:
    matrices, parts, shapes = [], {}, {}
    for role, source in ffn.projections.items():
        info, name = checkpoint.info(source.weight), f"{ffn.key}.{role}"
        rows, cols = info.shape[1:] if source.transposed else info.shape[:0:-1]
        cols //= 1 if source.part is None else 2
        form, ranks, alike = chosen.get(name, ("whole", (), None))
        terms = stack_terms(form, ranks, rows, cols)
        parts[role] = {"terms": terms, "bias": "per-expert" if source.bias else None}
        shapes[role] = MatrixShape(rows, cols, source.bias is not None)
        dtype = recipe.dtype or info.dtype
        matrices.append(
            StackPlan(
                name,
                role,
                source,
                rows,
                cols,
                None,
                parts[role],
                dtype,
                ffn.num_experts,
                form=form,
                ranks=ranks,
                source_experts=checkpoint.uncut.info(source.weight).shape[0],
                alike=alike,
            )
        )
    module = experts_module(parts, recipe)
    dtypes = {matrix.role: matrix.dtype for matrix in matrices}
    tensors = {
        f"{ffn.key}.{name}": (tuple(tensor.shape), dtypes[name.partition(".")[0]])
        for name, tensor in module.state_dict().items()
    }
    shape = FFNShape(ffn.key, shapes, ffn.num_experts)
    return FFNPlan(ffn, shape, tuple(matrices), Form(parts), tensors)


def experts_module(form: dict, recipe: Recipe) -> Any:
    """The shipped module of a form without tensors: it knows names, shapes and costs."""
    return modeling().Experts(form, recipe.experts, recipe.top_k)
