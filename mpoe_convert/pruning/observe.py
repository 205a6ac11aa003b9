"""What the experts of an artifact do on text: how often they are chosen, and what they add.

::

    x, choices (token, expert, g) --[mixture]--> sum of g f_e(x)

        per expert: choices,  sum g,  sum g norm(f_e(x) - m(x))

        m(x) is the mean of f_e(x) over all experts, or over those that hold the same neurons
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..artifact.reader import Artifact
from ..compression.batches import Batch, counted_tokens
from ..compression.stream import run_batch
from ..errors import CheckpointError, DataError, few
from ..options import assigned
from ..planning.fewer_experts import LayerExperts
from ..runtime.shapes import modeling

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Numbers in the outputs of all experts that are held at once.
_OUTPUTS = 1 << 26


@dataclass(eq=False)
class Observed:
    """Sums over the tokens that a mixture met, without padding; (E,) each, in float64 on the CPU.

    Attributes:
        choices: how many choices fell on each expert.
        weights: the combine weights g of these.
        differences: g times the distance of the expert's output from that of the mean expert.
    """

    choices: Tensor
    weights: Tensor
    differences: Tensor

    @classmethod
    def nothing(cls, num_experts: int) -> Observed:
        return cls(*torch.zeros(3, num_experts, dtype=torch.float64).unbind())

    @property
    def shares(self) -> Tensor:
        """(E,) the share of the choices that each expert got."""
        return self.choices / self.choices.sum().clamp(min=1)

    def layer(self, path: str, kept: tuple[int, ...], by: str) -> LayerExperts:
        """What becomes of the layer at a path."""
        return LayerExperts(path, kept, tuple(self.scores(by).tolist()), tuple(self.shares.tolist()))

    def scores(self, by: str) -> Tensor:
        """(E,) the higher, the more an expert is needed; `by` is one of `request.WAYS`."""
        return {"load": self.weights, "output": self.differences}[by]


@torch.no_grad()
def observe(
    model: PreTrainedModel, source: Artifact, batches: Iterable[Batch], *, outputs: bool
) -> dict[str, Observed]:
    """{path of a layer: what its experts do on the tokens of batches, without padding}.

    Args:
        model: the artifact, loaded.
        outputs: what they compute too; this runs all experts on all tokens.

    Raises:
        CheckpointError: the artifact's code cannot run experts that are not chosen.
        DataError: no token chooses experts of some layer.
    """
    found = {mixture.path: Observed.nothing(source.num_experts) for mixture in source.mixtures}
    batch: Batch = {}

    def add(path: str, module: Any, tokens: Tensor, experts: Tensor, weights: Tensor, x: Tensor) -> None:
        counted = counted_tokens(model, batch, path, len(x))  # (T,) or None
        if counted is not None:
            counted = counted.to(x.device)
            seen = counted[tokens]
            tokens, experts, weights = tokens[seen], experts[seen], weights[seen]
        sums = found[path]
        sums.choices += torch.bincount(experts, minlength=source.num_experts).cpu()
        sums.weights.index_add_(0, experts.cpu(), weights.cpu().double())
        if outputs:
            _add_outputs(sums, module, x, (tokens, experts, weights), source.parts)

    handles = []
    for mixture in source.mixtures:
        module = mixture_of(model, source, mixture.path)
        if outputs and not hasattr(module, "run_all_experts"):
            raise CheckpointError(
                f"the code in '{source.checkpoint.source}' is of an earlier release, which cannot run "
                f"experts that are not chosen; expected {assigned('by', 'load')}"
            )
        watched, hook = (module.router, _of_router) if hasattr(module, "router") else (module, _of_experts)
        handles.append(watched.register_forward_hook(partial(hook, partial(add, mixture.path, module))))
    try:
        for batch in batches:
            run_batch(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    if idle := [path for path, sums in found.items() if not sums.choices.any()]:
        raise DataError(
            f"no token of the calibration text chooses experts of {few(idle)}, so which are needed is not "
            "known; expected text like what the model is for: give other text, or more of it"
        )
    return found


def mixture_of(model: PreTrainedModel, source: Artifact, path: str) -> Any:
    """The module of a layer that holds the experts."""
    names = [path, source.family.slot, modeling().MIXTURE if source.keeps_routers else ""]
    return model.base_model.get_submodule(".".join(filter(None, names)))


_Add = Callable[[Tensor, Tensor, Tensor, Tensor], None]


def _of_router(add: _Add, router: nn.Module, args: tuple[Any, ...], routing: Any) -> None:
    """The choices of a router of ours for its tokens (T, H)."""
    choices = getattr(routing, "choices", None)
    if choices is not None:
        add(choices.tokens, choices.experts, choices.weights, args[0])
        return
    _add_table(add, routing.experts, routing.weights, args[0])  # from the code of an earlier release


def _of_experts(add: _Add, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
    """The choices with which a stock block has called its experts: (T, H), (T, k), (T, k)."""
    x, experts, weights = args
    _add_table(add, experts, weights, x)


def _add_table(add: _Add, experts: Tensor, weights: Tensor, x: Tensor) -> None:
    """The same of tables (T, k)."""
    tokens = torch.arange(len(experts), device=experts.device).repeat_interleave(experts.shape[1])
    add(tokens, experts.flatten(), weights.flatten(), x.reshape(len(experts), -1))


def _add_outputs(
    sums: Observed, module: Any, x: Tensor, choices: tuple[Tensor, Tensor, Tensor], parts: int
) -> None:
    """Add what all experts make of tokens (T, H), some of the tokens at a time.

    Args:
        parts: P, where expert e holds part e mod P of an FFN's neurons: those of a part are compared.
    """
    tokens, experts, weights = choices
    size = max(_OUTPUTS // (module.num_experts * x.shape[-1]), 1)
    for start in range(0, len(x), size):
        rows = module.run_all_experts(x[start : start + size])[: len(sums.choices)].float()  # (E, t, H)
        copies = rows.unflatten(0, (-1, parts))  # (E / P, P, t, H)
        rows = (copies - copies.mean(0)).flatten(0, 1)  # what all have in common tells nothing
        here = (tokens >= start) & (tokens < start + size)
        norms = rows.norm(dim=-1)[experts[here], tokens[here] - start] * weights[here].abs()
        sums.differences.index_add_(0, experts[here].cpu(), norms.cpu().double())
