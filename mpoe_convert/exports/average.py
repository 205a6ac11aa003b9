"""Expert weights for an average: the combine weights that the routers give each expert on a text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ..artifact.loading import HoldsMixtures, load_artifact
from ..artifact.reader import Artifact
from ..compression.batches import Batch, make_batches, token_rows
from ..compression.stream import keep_no_cache, run_batch
from ..errors import ExportError
from ..options import called
from .targets import Export

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def measure_expert_weights(source: Artifact, request: Export) -> dict[str, Mapping[int, float]]:
    """{path of a layer: {expert: its fraction of the combine weights}}; loads the whole model.

    Raises:
        ExportError: the routers choose by task, not by what they read, or experts are parts of an FFN.
        DataError: the text cannot be read or is too short.
    """
    if source.options["router_tasks"] is not None:
        raise ExportError(
            f"the routers of '{source.checkpoint.source}' choose by task, so a text does not say how much "
            f"weight they give an expert; expected one {called('expert')}"
        )
    if source.parts > 1:
        raise ExportError(
            f"the experts of '{source.checkpoint.source}' are parts of an FFN (kind split), which are put "
            f"together and not averaged; expected no {called('calibrate')}"
        )
    batches = make_batches(request, replace(source.checkpoint, config=source.config), source.token)
    model = load_artifact(source, dtype="auto")
    keep_no_cache(model)
    end = f".{source.family.slot}"
    return {
        path.removesuffix(end): dict(enumerate((weights / weights.sum()).tolist()))
        for path, weights in combine_weights(model, batches).items()
    }


@torch.no_grad()
def combine_weights(model: PreTrainedModel, batches: list[Batch]) -> dict[str, Tensor]:
    """{path of a mixture: (E,) float64, each expert's combine weights summed over the tokens}."""
    mixtures = cast(HoldsMixtures, model).mixtures()
    totals = {path: torch.zeros(ffn.num_experts, dtype=torch.float64) for path, ffn in mixtures}

    def add(path: str, router: nn.Module, args: tuple[Any, ...], routing: Any) -> None:
        totals[path] += token_rows(model, batch, path, _weights(routing)).sum(0).double().cpu()

    handles = [ffn.router.register_forward_hook(partial(add, path)) for path, ffn in mixtures]
    try:
        for batch in batches:
            run_batch(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return totals


def _weights(routing: Any) -> Tensor:
    """(T, E) combine weights; zero for experts that were not chosen."""
    table = torch.zeros_like(routing.logits)
    choices = getattr(routing, "choices", None)
    if choices is None:  # from the code of an earlier release: experts and weights (T, k)
        return table.scatter(1, routing.experts, routing.weights)
    return table.index_put((choices.tokens, choices.experts), choices.weights, accumulate=True)
