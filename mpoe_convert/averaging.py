"""How often the routers of a converted model choose each expert on a text: the weights of an average."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from .calibration import keep_no_cache, make_batches, run_batch
from .converted import Converted
from .errors import ExportError
from .exports import Export
from .loading import load_converted
from .routing import router_stats


def expert_loads(source: Converted, request: Export) -> dict[str, Mapping[int, float]]:
    """{path of a layer: {expert: its part of the router's choices}}, with the whole model in memory.

    Raises:
        ExportError: the routers choose by task, not by what they read.
        DataError: the text cannot be read or is too short.
    """
    if source.options["router_tasks"] is not None:
        raise ExportError(
            f"the routers of {source.checkpoint.source} choose by task, so a text does not say how often "
            "they choose an expert; expected one --expert"
        )
    batches = make_batches(request, replace(source.checkpoint, config=source.config), source.token)
    model = load_converted(source, dtype="auto")
    keep_no_cache(model)
    with torch.no_grad(), router_stats(model) as stats:
        for batch in batches:
            run_batch(model, batch)
    end = f".{source.family.slot}"
    return {path.removesuffix(end): dict(enumerate(found.load.tolist())) for path, found in stats.items()}
