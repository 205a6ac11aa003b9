"""A recipe applied to a checkpoint's headers: everything that will be done, before any tensor is read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

from .. import experts
from ..artifact.weight_files import num_bytes, split_into_shards
from ..decomposition.sites import Sites, full_bonds
from ..errors import FamilyError
from ..experts.ffn import FFNShape, Form, MatrixShape
from ..source.architecture import Architecture
from ..source.checkpoint import Checkpoint
from ..source.families import Family
from ..source.ffn import FFN, Source
from ..source.locate import runs_per_token
from ..source.matrices import FLOAT_DTYPES, matrix_size
from ..source.safetensors_file import DTYPE2BYTES
from ..tables import Cell, Shown, Table, escape, listed, size, warning
from .recipe import Recipe, parse_size
from .resolve import Resolved

if TYPE_CHECKING:
    from ..runtime.modeling_mpoe import FeedForward

# Causal masks, position indices and constants that checkpoints carry: stored, but not parameters.
_BUFFER = re.compile(
    r"(^|\.)(attn|attention|self_attention)\.(masked_)?bias$|"
    r"inv_freq$|position_ids$|final_logits_bias$"
)


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
        """What the bonds of `own_term` would be if nothing were cut; none for kinds without sites."""
        if self.sites is None:
            return ()
        return full_bonds(tuple(self.own_term["in_dims"]), tuple(self.own_term["out_dims"]))

    @property
    def is_cut(self) -> bool:
        """Whether its chain has bonds too small for any matrix of this size."""
        return self.sites is not None and not self.sites.is_exact

    @property
    def is_exact(self) -> bool:
        return self.rank is None and not self.is_cut

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
            "bonds": listed(term["bonds"]),
            "full bonds": listed(self.full_bonds),
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
        import torch

        from ..runtime.modeling_mpoe import Projection

        with torch.device("meta"):
            projection = Projection(self.spec, self.num_experts)
        return projection.shared_params + self.num_experts * projection.own_params


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
class Totals:
    """Parameters, bytes and floating-point operations of one part, for the artifact and two references.

    The references are the dense source and a plain MoE: as many whole copies of every converted FFN,
    with the same router. Bytes are in the artifact's dtypes. FLOPs count products with weights only
    (2 per multiply-add): every Linear, Conv1D and Conv2d of the stock class that config.json names (of
    AutoModel's if it names none), as often as a token passes it. Attention scores depend on the length
    and are left out. Of an encoder-decoder, "per token" is one token of either stack; layers that see
    one position (poolers, classifiers) or patches (ViT's Conv2d) count as if they saw every token, and
    cross-attention as if it were used.
    """

    dense_params: int
    plain_moe_params: int
    stored_params: int
    plain_moe_active_params: int
    active_params: int
    dense_bytes: int
    plain_moe_bytes: int
    stored_bytes: int
    dense_flops_per_token: int
    plain_moe_flops_per_token: int
    flops_per_token: int
    rebuild_flops_per_forward: int

    def rows(self, label: str) -> Iterator[dict[str, Cell]]:
        """As a table shows them: the artifact beside both references."""
        for what, dense, moe, ours in (
            ("parameters stored", self.dense_params, self.plain_moe_params, self.stored_params),
            (
                "parameters used per token",
                self.dense_params,
                self.plain_moe_active_params,
                self.active_params,
            ),
            ("bytes", self.dense_bytes, self.plain_moe_bytes, self.stored_bytes),
            (
                "FLOPs per token",
                self.dense_flops_per_token,
                self.plain_moe_flops_per_token,
                self.flops_per_token,
            ),
        ):
            in_text = size if what == "bytes" else "{:,}".format
            yield {
                "": f"{label}: {what}",
                "dense base": in_text(dense),
                "plain MoE": in_text(moe),
                "this model": in_text(ours),
                "of plain MoE": f"{ours / moe:.1%}",
            }


@dataclass(frozen=True)
class BudgetPoint:
    """What can be had for a share of the dense FFNs' numbers.

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
    """What a recipe's `keep` and `max_error` came to. Shares are of the dense FFNs' numbers.

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
    """The resolved work. Holds no tensors. `print`, the REPL and notebooks show it as tables."""

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

    @property
    def matrices(self) -> Iterable[MatrixPlan]:
        return (matrix for ffn in self.ffns for matrix in ffn.matrices)

    @property
    def is_exact(self) -> bool:
        """Whether nothing is truncated, so that expert 0 is the dense FFN."""
        return all(matrix.is_exact for matrix in self.matrices)

    @cached_property
    def ffn_totals(self) -> Totals:
        """Of the converted FFNs alone."""
        return ffn_totals(self)

    @cached_property
    def totals(self) -> Totals:
        """Of the whole model."""
        return model_totals(self)

    @property
    def peak_bytes(self) -> int:
        """Estimated peak of tensor memory: the largest shard, the largest FFN, and the work on a matrix.

        A matrix in work is held as read, in float32, interleaved for the decomposition, contracted
        back for the error, and as its cores. Finding an order of neurons takes all of an FFN's matrices
        at once, as they are and as features, centred and halved. What calibration takes is left out.
        """
        by_name = {tensor.name: tensor.num_bytes for tensor in self.tensors}
        shard = max(sum(by_name[name] for name in names) for names in self.shards.values())
        largest = max(sum(by_name[name] for name in ffn.tensors) for ffn in self.ffns)
        matrix = max(4 * 5 * m.rows * m.cols for m in self.matrices)
        reordered = [ffn for ffn in self.ffns if self.seeks_order(ffn)]
        order = max((4 * 4 * sum(m.rows * m.cols for m in ffn.matrices) for ffn in reordered), default=0)
        return shard + largest + max(matrix, order)

    def seeks_order(self, ffn: FFNPlan) -> bool:
        """Whether another order of an FFN's neurons is tried."""
        return self.recipe.neuron_order == "auto" and any(matrix.is_cut for matrix in ffn.matrices)

    @property
    def warnings(self) -> list[str]:
        """What can be said before any tensor is read."""
        warnings = []
        alone = [
            m.name for m in self.matrices if m.sites and m.sites.auxiliary_params * 1000 < m.dense_params
        ]
        if alone:
            warnings.append(
                f"an expert owns less than a thousandth of the parameters of {alone[0]}"
                f"{f' and {len(alone) - 1} others' if len(alone) > 1 else ''}: experts can hardly differ. "
                "Raise --bond-dim."
            )
        experts = self.recipe.experts
        grown = [m.name for m in self.matrices if m.sites and m.stored_params > experts * m.dense_params]
        if grown:
            warnings.append(
                f"{grown[0]} stores more parameters than {experts} dense copies would: the auxiliary tensors "
                "are too large for this matrix. Lower --bond-dim, or use --kind dense."
            )
        return warnings

    def to_json(self) -> dict[str, Any]:
        """What `mpoe-convert plan --json` prints."""
        return {
            "base_model": self.source,
            "revision": self.revision,
            "model_type": self.model_type,
            "recipe": self.recipe.to_mapping(),
            "totals": asdict(self.totals) | {"ffn": asdict(self.ffn_totals)},
            "exact": self.is_exact,
            "peak_bytes": self.peak_bytes,
            "kept_dense": list(self.kept_dense),
            "warnings": self.warnings,
            "budget": asdict(self.budget) if self.budget else None,
            "matrices": [matrix.to_json() for matrix in self.matrices],
            "tensors": {t.name: {"shape": list(t.shape), "dtype": t.dtype} for t in self.tensors},
            "shards": {file: list(names) for file, names in self.shards.items()},
        }

    def totals_table(self) -> Table:
        """Both references beside the artifact, for the FFNs and for the whole model."""
        rows = [*self.ffn_totals.rows("FFNs"), *self.totals.rows("whole model")]
        if flops := self.ffn_totals.rebuild_flops_per_forward:
            what = "FFNs: FLOPs per forward pass to rebuild all experts"
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

    def shown(self, limit: int | None = None) -> Iterator[Table | str]:
        """See `Shown`."""
        recipe, dense = self.recipe, self.kept_dense
        yield (
            f"[bold]{escape(self.source)}[/] ({self.model_type}): {len(self.ffns)} FFNs -> {recipe.experts} "
            f"experts of kind {recipe.kind}, top {recipe.top_k}"
        )
        if dense:
            names = dense if limit is None else (*dense[:limit], *(["…"] if len(dense) > limit else []))
            yield f"{len(dense)} FFNs stay dense: {', '.join(names)}"
        left = ("matrix", "size", "sites (in x out)", "bonds", "full bonds")
        yield Table("Matrices", tuple(matrix.row() for matrix in self.matrices), left).head(limit)
        yield self.totals_table()
        yield self.shards_table().head(limit)
        yield f"Peak memory for tensors, estimated: {size(self.peak_bytes)}"
        if self.budget:
            yield self.budget.table()
            yield self.budget.in_words(recipe.keep)
        else:
            exact = "nothing is truncated" if self.is_exact else "truncated: bonds are below the full ones"
            yield f"Bonds: {exact}."
        yield from map(warning, self.warnings)


def plan_checkpoint(
    resolved: Resolved, checkpoint: Checkpoint, ranks: Mapping[str, int | None] | None = None
) -> Plan:
    """The plan of a resolved recipe, from the checkpoint's headers. Raises MpoeError.

    Args:
        ranks: by the names of the matrices; None: all stay whole.
    """
    recipe = resolved.recipe
    ffns = tuple(_plan_ffn(recipe, checkpoint, ffn, ranks or {}) for ffn in resolved.ffns)
    tensors = _out_tensors(recipe, checkpoint, ffns)
    return Plan(
        recipe=recipe,
        source=checkpoint.source,
        revision=checkpoint.revision,
        model_type=checkpoint.config["model_type"],
        family=resolved.family,
        ffns=ffns,
        kept_dense=resolved.kept_dense,
        tensors=tensors,
        shards=split_into_shards(tensors, parse_size(recipe.max_shard_size)),
        dense_flops_per_token=dense_flops_per_token(checkpoint.architecture),
    )


def _plan_ffn(recipe: Recipe, checkpoint: Checkpoint, ffn: FFN, ranks: Mapping[str, int | None]) -> FFNPlan:
    shape = _ffn_shape(checkpoint, ffn, ranks)
    form = experts.load(recipe.kind).describe(shape, recipe.own_options)
    matrices = tuple(
        MatrixPlan(
            name=f"{ffn.key}.{role}",
            role=role,
            source=source,
            rows=shape.matrices[role].rows,
            cols=shape.matrices[role].cols,
            sites=form.sites.get(role),
            spec=form.parts[role],
            dtype=recipe.dtype or checkpoint.tensors[source.weight].dtype,
            num_experts=recipe.experts,
            rank=shape.matrices[role].rank,
        )
        for role, source in ffn.projections.items()
    )
    tensors = _ffn_tensors(recipe, ffn, matrices, form.parts)
    return FFNPlan(ffn, shape, matrices, form, tensors, runs_per_token(checkpoint.config, ffn.path))


def _ffn_shape(checkpoint: Checkpoint, ffn: FFN, ranks: Mapping[str, int | None]) -> FFNShape:
    """Sizes from the headers. Raises FamilyError if `down` does not lead back to the hidden size."""
    matrices = {}
    for role, source in ffn.projections.items():
        rows, cols = matrix_size(checkpoint.tensors[source.weight], source)
        matrices[role] = MatrixShape(rows, cols, source.bias is not None, ranks.get(f"{ffn.key}.{role}"))
    up, down = matrices["up"], matrices["down"]
    if (up.rows, up.cols) != (down.cols, down.rows):
        raise FamilyError(
            f"{ffn.key}: up is {up.rows} x {up.cols} and down {down.rows} x {down.cols}; expected "
            "down to lead back"
        )
    return FFNShape(ffn.key, matrices, ffn.num_experts)


def _module(form: dict, recipe: Recipe) -> FeedForward:
    """The shipped module of a form, without memory: it knows names, shapes and costs."""
    import torch

    from ..runtime.modeling_mpoe import FeedForward

    with torch.device("meta"):
        return FeedForward(form, recipe.experts, recipe.top_k)


def _ffn_tensors(recipe: Recipe, ffn: FFN, matrices: Iterable[MatrixPlan], form: dict) -> dict:
    """{name: (shape, dtype)}; a part that is no projection has the dtype of `down`, or float32."""
    module = _module(form, recipe)
    dtypes = {matrix.role: matrix.dtype for matrix in matrices}
    found = {}
    for name, tensor in module.state_dict().items():
        key = name.partition(".")[0]
        dtype = "float32" if getattr(module, key).in_float32 else dtypes.get(key, dtypes["down"])
        found[f"{ffn.key}.{name}"] = (tuple(tensor.shape), dtype)
    return found


def _out_tensors(recipe: Recipe, checkpoint: Checkpoint, ffns: tuple[FFNPlan, ...]) -> tuple[OutTensor, ...]:
    """The artifact's tensors; those of an FFN stand where the first of its dense tensors stood."""
    owner = {}
    for plan in ffns:
        for source in plan.ffn.projections.values():
            owner |= {name: plan for name in (source.weight, source.bias) if name}
    dropped = tied_duplicates(checkpoint)
    out, done = [], set()
    for name, info in checkpoint.tensors.items():
        if name in owner:
            plan = owner[name]
            if plan.ffn.key not in done:
                done.add(plan.ffn.key)
                out += [OutTensor(n, s, d, plan.ffn.key) for n, (s, d) in plan.tensors.items()]
        elif name not in dropped:
            floating = info.dtype in FLOAT_DTYPES
            dtype = recipe.dtype if floating and recipe.dtype else info.dtype
            out.append(OutTensor(name, info.shape, dtype, None))
    return tuple(out)


def is_buffer(name: str) -> bool:
    """Whether a copied tensor is no parameter but a mask or a table, by its name."""
    return bool(_BUFFER.search(name))


def ties_embeddings(checkpoint: Checkpoint) -> bool:
    """Whether the head multiplies with the embedding table, which is then stored once."""
    cls = checkpoint.architecture.model_class
    ties = getattr(cls, "_tied_weights_keys", None) or {}
    default = getattr(getattr(cls, "config_class", None), "tie_word_embeddings", True)
    return bool(ties) and bool(checkpoint.config.get("tie_word_embeddings", default))


def tied_duplicates(checkpoint: Checkpoint) -> set[str]:
    """Names in a `.bin` that repeat the storage of the tensor they are tied to and will be again on load."""
    if not checkpoint.shared_storage or not ties_embeddings(checkpoint):
        return set()
    ties = checkpoint.architecture.model_class._tied_weights_keys
    ties = ties.items() if isinstance(ties, dict) else ()
    first = checkpoint.shared_storage
    return {
        target
        for target, source in ties
        if target in checkpoint.tensors
        and source in checkpoint.tensors
        and first.get(target, target) == first.get(source, source)
    }


# ---------------------------------------------------------------------------------------------------
# Totals


def ffn_totals(plan: Plan) -> Totals:
    """Totals of the converted FFNs, by the shipped modules' own count."""
    from ..runtime.modeling_mpoe import Work

    experts, top_k = plan.recipe.experts, plan.recipe.top_k
    modules = [_module(ffn.form.parts, plan.recipe) for ffn in plan.ffns]
    shared = sum(module.shared_params for module in modules)
    own = sum(module.own_params for module in modules)
    routers = sum(module.router.shared_params for module in modules)
    dense = sum(m.dense_params for m in plan.matrices)
    dense_bytes = sum(m.dense_params * DTYPE2BYTES[m.dtype] for m in plan.matrices)
    # A token has top_k rows; where cores cannot act, a pass contracts the matrices of all experts.
    work = Work(tokens=1, rows=top_k, experts=experts)
    costs = [module.cost(work) for module in modules]
    routing = [module.router.cost(work, "apply") for module in modules]
    products = [sum(m.rows * m.cols for m in ffn.matrices) for ffn in plan.ffns]
    runs = [ffn.runs_per_token for ffn in plan.ffns]
    per_token = list(zip(runs, products, costs, routing, strict=True))
    return Totals(
        dense_params=dense,
        plain_moe_params=experts * dense + routers,
        stored_params=shared + experts * own,
        plain_moe_active_params=top_k * dense + routers,
        active_params=shared + top_k * own,
        dense_bytes=dense_bytes,
        plain_moe_bytes=experts * dense_bytes + 4 * routers,
        stored_bytes=sum(t.num_bytes for t in plan.tensors if t.ffn is not None),
        dense_flops_per_token=sum(n * 2 * size for n, size, _, _ in per_token),
        plain_moe_flops_per_token=sum(n * (2 * top_k * size + r.flops) for n, size, _, r in per_token),
        flops_per_token=sum(n * cost.flops for n, _, cost, _ in per_token),
        rebuild_flops_per_forward=sum(n * cost.rebuild_flops for n, _, cost, _ in per_token),
    )


def model_totals(plan: Plan) -> Totals:
    """Totals of the whole model: those of the FFNs plus everything that is copied."""
    ffn = plan.ffn_totals
    copied = [t for t in plan.tensors if t.ffn is None]
    params = sum(prod(t.shape) for t in copied if not is_buffer(t.name))
    num_bytes = sum(t.num_bytes for t in copied)
    flops = plan.dense_flops_per_token - ffn.dense_flops_per_token
    return Totals(
        dense_params=ffn.dense_params + params,
        plain_moe_params=ffn.plain_moe_params + params,
        stored_params=ffn.stored_params + params,
        plain_moe_active_params=ffn.plain_moe_active_params + params,
        active_params=ffn.active_params + params,
        dense_bytes=ffn.dense_bytes + num_bytes,
        plain_moe_bytes=ffn.plain_moe_bytes + num_bytes,
        stored_bytes=ffn.stored_bytes + num_bytes,
        dense_flops_per_token=ffn.dense_flops_per_token + flops,
        plain_moe_flops_per_token=ffn.plain_moe_flops_per_token + flops,
        flops_per_token=ffn.flops_per_token + flops,
        rebuild_flops_per_forward=ffn.rebuild_flops_per_forward,
    )


def dense_flops_per_token(architecture: Architecture) -> int:
    """Of all Linear, Conv1D and Conv2d layers of the dense model, as `Totals` counts them.

    Raises:
        FamilyError: as `Architecture.build`.
    """
    from torch import nn
    from transformers import PreTrainedModel
    from transformers.pytorch_utils import Conv1D

    cls = architecture.model_class
    model = architecture.build(cls if cls and issubclass(cls, PreTrainedModel) else None)
    return sum(
        2 * module.weight.numel() * runs_per_token(architecture.config, path)
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D, nn.Conv2d))
    )
