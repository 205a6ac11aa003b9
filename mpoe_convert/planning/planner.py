"""A resolved recipe applied to a checkpoint's headers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from .. import experts
from ..artifact.weight_files import num_bytes, split_into_shards
from ..errors import FamilyError
from ..experts.ffn import FFNShape, MatrixShape
from ..source import sentence_encoder
from ..source.checkpoint import Checkpoint
from ..source.ffn import FFN
from ..source.locate import runs_per_token
from ..source.matrices import FLOAT_DTYPES, matrix_size
from .plan import FFNPlan, MatrixPlan, OutTensor, Plan
from .recipe import Recipe, parse_size
from .resolve import Resolved
from .rounding import rounded_specs
from .totals import dense_flops_per_token, mixture

AnyPlan = TypeVar("AnyPlan", bound=Plan)


def plan_checkpoint(
    resolved: Resolved, checkpoint: Checkpoint, ranks: Mapping[str, int | None] | None = None
) -> Plan:
    """The plan of a resolved recipe, from the checkpoint's headers. Raises MpoeError.

    Args:
        ranks: by the names of the matrices; None: all stay whole.
    """
    ffns = tuple(_plan_ffn(resolved.recipe, checkpoint, ffn, ranks or {}) for ffn in resolved.ffns)
    return assemble(Plan, resolved, checkpoint, ffns)


def assemble(
    cls: type[AnyPlan],
    resolved: Resolved,
    checkpoint: Checkpoint,
    ffns: tuple[FFNPlan, ...],
    kept: frozenset[str] = frozenset(),
) -> AnyPlan:
    """A plan of these FFNs; `kept`: parts of the names of copied tensors that keep the source's dtype."""
    recipe = resolved.recipe
    tensors = _out_tensors(recipe, checkpoint, ffns, kept)
    return cls(
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
        notes=(
            *resolved.notes,
            *sentence_encoder.notes(checkpoint.folder, checkpoint.names(), checkpoint.code is not None),
        ),
        key_mapping=checkpoint.key_mapping,
        reads=_reads(checkpoint, ffns, tensors),
    )


def _reads(
    checkpoint: Checkpoint, ffns: tuple[FFNPlan, ...], tensors: tuple[OutTensor, ...]
) -> dict[str, int]:
    """See `Plan.reads`. A tensor that holds gate and up is read once for each; one that is cut, whole."""
    whole = checkpoint.uncut
    found = {each.name: num_bytes(whole.tensors[each.name]) for each in tensors if each.ffn is None}
    for plan in ffns:
        sources = plan.ffn.projections.values()
        names = [name for source in sources for name in (source.weight, source.bias) if name]
        found[plan.ffn.key] = sum(num_bytes(whole.info(name)) for name in names)
    return found


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
            num_experts=recipe.own_options.stored_experts,
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


def _ffn_tensors(recipe: Recipe, ffn: FFN, matrices: Iterable[MatrixPlan], form: dict) -> dict:
    """{name: (shape, dtype)}; a part that is no projection has the dtype of `down`, or float32."""
    module = mixture(form, recipe)
    dtypes = {matrix.role: matrix.dtype for matrix in matrices}
    found = {}
    for name, tensor in module.state_dict().items():
        key = name.partition(".")[0]
        dtype = "float32" if getattr(module, key).in_float32 else dtypes.get(key, dtypes["down"])
        found[f"{ffn.key}.{name}"] = (tuple(tensor.shape), dtype)
    return found


def _out_tensors(
    recipe: Recipe, checkpoint: Checkpoint, ffns: tuple[FFNPlan, ...], kept: frozenset[str]
) -> tuple[OutTensor, ...]:
    """The artifact's tensors; those of an FFN stand where the first of its dense tensors stood."""
    owner = {}
    for plan in ffns:
        for source in plan.ffn.projections.values():
            owner |= {name: plan for name in (source.weight, source.bias) if name}
        owner |= dict.fromkeys(plan.ffn.unread, plan)
    dropped = tied_duplicates(checkpoint)
    out, done = [], set()
    for name, info in checkpoint.tensors.items():
        if name in owner:
            plan = owner[name]
            if plan.ffn.key not in done:
                done.add(plan.ffn.key)
                stored = rounded_specs(plan, recipe.bits)
                out += [OutTensor(n, s, d, plan.ffn.key) for n, (s, d) in stored.items()]
        elif name not in dropped:
            floating = info.dtype in FLOAT_DTYPES
            stays = not floating or any(f".{part}." in f".{name}." for part in kept)
            dtype = info.dtype if stays else recipe.dtype or info.dtype
            out.append(OutTensor(name, info.shape, dtype, None))
    return tuple(out)


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
    found = getattr(checkpoint.architecture.model_class, "_tied_weights_keys", None)
    ties = found.items() if isinstance(found, dict) else ()
    first = checkpoint.shared_storage
    return {
        target
        for target, source in ties
        if target in checkpoint.tensors
        and source in checkpoint.tensors
        and first.get(target, target) == first.get(source, source)
    }
