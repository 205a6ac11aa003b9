"""Parameters, bytes and floating-point operations of a plan, beside its two references."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from ..runtime.shapes import modeling
from ..source.architecture import Architecture
from ..source.locate import runs_per_token
from ..source.memo import remembered
from ..source.safetensors_file import DTYPE2BYTES
from ..source.state_dict import is_buffer
from ..tables import Cell, size
from .recipe import Recipe

if TYPE_CHECKING:
    from ..runtime.modeling_mpoe import Experts, FeedForward
    from .plan import Plan


@dataclass(frozen=True)
class Totals:
    """Parameters, bytes and floating-point operations of one part, for the artifact and two references.

    The references are the dense source and a plain MoE: as many whole copies of every converted FFN,
    with the same router. Bytes are in the artifact's dtypes. FLOPs count products with weights only
    (2 per multiply-add): every Linear, Conv1D and Conv2d of the stock class that config.json names (of
    AutoModel's if it names none), as often as a token passes it. Attention scores depend on the length
    and are left out. Of an encoder-decoder, "per token" is one token of either stack; layers that see
    one position (poolers, classifiers) or patches (ViT's Conv2d) count as if they saw every token, and
    cross-attention as if it were used. If `varies`, the number of experts per token does, and what is said
    per token is of the largest number, and of the largest experts. If not, and `differ` says that experts
    differ in size, it is the mean under equal load.
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
    varies: bool = False
    differ: bool = False

    @property
    def per_token(self) -> str:
        """What numbers per token are, unless every token takes that: "at most", "in the mean" or ""."""
        return "at most" if self.varies else "in the mean" if self.differ else ""

    def rows(self, label: str) -> Iterator[dict[str, Cell]]:
        """As a table shows them: the artifact beside both references."""
        most = f", {self.per_token}" if self.per_token else ""
        for what, dense, moe, ours in (
            ("parameters stored", self.dense_params, self.plain_moe_params, self.stored_params),
            (
                f"parameters used per token{most}",
                self.dense_params,
                self.plain_moe_active_params,
                self.active_params,
            ),
            ("bytes", self.dense_bytes, self.plain_moe_bytes, self.stored_bytes),
            (
                f"FLOPs per token{most}",
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


def savings_in_words(totals: Totals, experts: int) -> str:
    """Stored parameters and FLOPs per token as shares of a plain MoE's, with the numbers.

    "Beside a plain MoE of 8 experts it stores 32.1% of the parameters (1,493,760), but takes 109.1% of the
    FLOPs per token (3,153,920)."
    """
    stored, flops = totals.stored_params, totals.flops_per_token
    space, work = stored / totals.plain_moe_params, flops / totals.plain_moe_flops_per_token
    most = f"{totals.per_token} " if totals.per_token else ""
    but = " and" if (space < 1) == (work < 1) else ", but"
    return (
        f"Beside a plain MoE of {experts} experts it stores {space:.1%} of the parameters ({stored:,}){but} "
        f"takes {work:.1%} of the FLOPs per token ({most}{flops:,})."
    )


def ffn_totals(plan: Plan) -> Totals:
    """Totals of the converted FFNs, by the shipped modules' own count."""
    recipe, experts, top_k = plan.recipe, plan.recipe.experts, plan.recipe.top_k
    modules = [mixture(ffn.form.parts, recipe) for ffn in plan.ffns]
    shared = sum(module.shared_params for module in modules)
    routers = sum(module.router.shared_params for module in modules)
    dense = sum(m.dense_params for m in plan.matrices)
    dense_bytes = sum(m.dense_params * DTYPE2BYTES[m.dtype] for m in plan.matrices)
    # A token has a row per expert that it passes; where cores cannot act, a pass contracts all matrices.
    stored, rows = recipe.own_options.stored_experts, top_k + recipe.shared_experts
    work = modeling().Work(tokens=1, rows=rows, experts=stored)
    own = [rows * module.own_params for module in modules]  # where experts differ in size, in the mean
    costs = [module.cost(work) for module in modules]
    routing = [module.router.cost(work, "apply") for module in modules]
    if recipe.own_options.varies:
        for n, (ffn, module) in enumerate(zip(plan.ffns, modules, strict=True)):
            if module.differ:
                largest = _largest(ffn.form.parts, module.own_by_expert, top_k)
                own[n] = sum(largest.own_by_expert)
                costs[n] = modeling().Cost.total([largest.cost(work), routing[n]])
    products = [sum(m.rows * m.cols for m in ffn.matrices) for ffn in plan.ffns]
    runs = [ffn.runs_per_token for ffn in plan.ffns]
    per_token = list(zip(runs, products, costs, routing, strict=True))
    return Totals(
        dense_params=dense,
        plain_moe_params=experts * dense + routers,
        stored_params=sum(module.stored_params for module in modules),
        plain_moe_active_params=top_k * dense + routers,
        active_params=round(shared + sum(own)),
        dense_bytes=dense_bytes,
        plain_moe_bytes=experts * dense_bytes + 4 * routers,
        stored_bytes=sum(t.num_bytes for t in plan.tensors if t.ffn is not None),
        dense_flops_per_token=sum(n * 2 * size for n, size, _, _ in per_token),
        plain_moe_flops_per_token=int(sum(n * (2 * top_k * size + r.flops) for n, size, _, r in per_token)),
        flops_per_token=int(sum(n * cost.flops for n, _, cost, _ in per_token)),
        rebuild_flops_per_forward=int(sum(n * cost.rebuild_flops for n, _, cost, _ in per_token)),
        varies=recipe.own_options.varies,
        differ=any(module.differ for module in modules),
    )


def _largest(form: dict, sizes: Sequence[int], number: int) -> Experts:
    """The shipped module of so many experts of a form, the largest ones, without a router."""
    kept = sorted(range(len(sizes)), key=sizes.__getitem__)[-number:]
    parts = {}
    for key, spec in form.items():
        if isinstance(spec, list):  # widths
            parts[key] = [spec[expert] for expert in kept]
        else:
            parts[key] = spec | {"terms": [_term_of_some(term, kept) for term in spec["terms"]]}
    return modeling().Experts(parts, number, number)


def _term_of_some(term: dict, kept: Sequence[int]) -> dict:
    """A term of some of its experts."""
    lists = term.get("by_expert")
    if lists is None:
        return term
    return term | {"by_expert": {key: [each[e] for e in kept] for key, each in lists.items()}}


def model_totals(plan: Plan, flops: int) -> Totals:
    """Totals of the whole model: those of the FFNs plus everything that is copied.

    flops: per token, of what is copied.
    """
    ffn = plan.ffn_totals
    copied = [t for t in plan.tensors if t.ffn is None]
    params = sum(prod(t.shape) for t in copied if not is_buffer(t.name))
    num_bytes = sum(t.num_bytes for t in copied)
    return type(ffn)(
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
        varies=ffn.varies,
        differ=ffn.differ,
    )


def dense_flops_per_token(architecture: Architecture) -> int:
    """FLOPs per token of all Linear, Conv1D and Conv2d layers of the dense model, as `Totals` counts them.

    Raises:
        FamilyError: as `Architecture.build`.
    """
    if architecture.is_custom:
        return _flops_per_token(architecture)
    return remembered("FLOPs per token", architecture.config, lambda: _flops_per_token(architecture))


def _flops_per_token(architecture: Architecture) -> int:
    return sum(
        2 * numbers * runs_per_token(architecture.config, path) for path, numbers in _products(architecture)
    )


def _products(architecture: Architecture) -> Iterable[tuple[str, int]]:
    """(path, numbers in the weight) of all layers that multiply with one."""
    if architecture.shapes is not None:
        return architecture.shapes.products
    from torch import nn
    from transformers import PreTrainedModel
    from transformers.pytorch_utils import Conv1D

    cls = architecture.model_class
    model = architecture.build(cls if cls and issubclass(cls, PreTrainedModel) else None)
    return [
        (path, module.weight.numel())
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D, nn.Conv2d))
    ]


def mixture(form: dict, recipe: Recipe) -> FeedForward:
    """The shipped module of a form without tensors: it knows names, shapes and costs."""
    return modeling().FeedForward.from_block(form, routing(recipe))


def routing(recipe: Recipe) -> dict[str, Any]:
    """What `config.mpoe` says of the experts' numbers and selection."""
    return {"num_experts": recipe.experts, "top_k": recipe.top_k, **recipe.own_options.routing()}
