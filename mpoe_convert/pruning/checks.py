"""Which artifacts can have fewer experts, and how many."""

from __future__ import annotations

from ..artifact.reader import Artifact
from ..artifact.rounding import bits_of
from ..errors import CheckpointError, RecipeError, counted
from ..options import called
from ..runtime.shapes import modeling
from .request import Pruning


def check(source: Artifact, request: Pruning) -> None:
    """Check that experts of an artifact can be left out, and that enough are left.

    Raises:
        CheckpointError: none of its experts can go.
        RecipeError: so many cannot be left, or not in this way.
    """
    name, config = source.checkpoint.source, source.checkpoint.config
    if bits := bits_of(config):
        raise CheckpointError(
            f"'{name}' has cores that are rounded to {bits} bits; expected an artifact that was converted "
            f"without {called('bits')}"
        )
    if source.options["router_tasks"] is not None:
        raise CheckpointError(
            f"the routers of '{name}' choose by task, so text does not say which experts they need; "
            "expected routers that choose by token"
        )
    if source.keeps_routers and config["mpoe"]["family"].get("experts_at"):
        raise CheckpointError(
            f"the experts of '{name}' were named by hand ({called('experts_at')}), and which rows of its "
            "routers belong to which is not known: it keeps all of them"
        )
    _check_number(source, request)


def _check_number(source: Artifact, request: Pruning) -> None:
    asked, own = request.experts, source.num_experts
    takes = source.top_k if source.rule == modeling().DEFAULT_RULE else 1  # where it varies, it may be fewer
    least = max(2, takes)
    name = f"'{source.checkpoint.source}'"
    found = f"{called('experts')} is {asked}, and {name} has {counted(own, 'expert')} per mixture"
    if source.parts > 1:
        found += f", {own // source.parts} for each of {source.parts} parts of the neurons"
    steps = range(-(-least // source.parts) * source.parts, own, source.parts)
    if not steps:
        raise RecipeError(f"{found}, of which a token takes {source.top_k}; none of them can be left out")
    if asked not in steps:
        some = f"{steps[0]} to {steps[-1]}" if len(steps) > 1 else f"{steps[0]}"
        many = f", a multiple of {source.parts}" if source.parts > 1 and len(steps) > 1 else ""
        raise RecipeError(f"{found}, of which a token takes {source.top_k}; expected {some}{many}")
