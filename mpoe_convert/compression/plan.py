"""Plan a conversion: from the headers alone where nothing is fitted."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING

from ..devices import check_device
from ..errors import RecipeError
from ..options import called
from ..planning.plan import Plan
from ..planning.planner import plan_checkpoint
from ..planning.recipe import Recipe
from ..planning.resolve import check_text_options, resolve_recipe
from ..request import check_function, check_token
from ..source.in_memory import InMemory
from ..source.opening import check_stream, open_source
from ..source.text_options import check_calibration

if TYPE_CHECKING:
    from .batches import Batch
    from .prepare import Progress


def plan(
    recipe: Recipe | str | PathLike[str],
    *,
    stream: bool = False,
    token: str | None = None,
    calibration: Sequence[Batch] | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Plan a conversion; nothing is written.

    Without `keep` and `max_error` only headers are read: of a Hub id no weights are downloaded. With one of
    them the weights are read, except those of a mixture, and calibrated if the recipe asks for it. Arguments
    as for `convert`; with `stream` what is read of a Hub id comes by requests for its bytes.

    Raises:
        MpoeError: the source, the recipe or their combination cannot be converted.

    >>> from mpoe_convert import Recipe, plan
    >>> planned = plan(Recipe("examples/tiny-gpt2", experts=2, bond_dim=8))
    >>> planned.is_exact, planned.totals.stored_params > planned.totals.dense_params
    (True, True)
    """
    recipe = Recipe.of(recipe)
    check_token(token)
    check_function("progress", progress, "what, done, total, report")
    if recipe.search:
        raise RecipeError(
            f"{called('search')} given to a plan; it compares artifacts, and a plan writes none: leave it out"
        )
    check_device(recipe.device)
    check_calibration(recipe)
    options = {"revision": recipe.revision, "token": token, "trust_remote_code": recipe.trust_remote_code}
    options |= {"experts_at": recipe.experts_at, "stream": stream}
    calibrated = bool(recipe.calibrate) or calibration is not None
    check_text_options(recipe, calibrated)
    check_stream(stream, calibrated)
    checkpoint = open_source(recipe.model, headers_only=not (recipe.compresses and calibrated), **options)
    is_mixture = isinstance(checkpoint, InMemory)  # whose sizes are enough
    if recipe.compresses and checkpoint.headers_only and not is_mixture:
        checkpoint = open_source(recipe.model, **options)
    if isinstance(checkpoint, InMemory):
        from .mixtures import prepare_mixture  # torch

        if calibrated and checkpoint.headers_only:
            checkpoint = open_source(recipe.model, **options)
            assert isinstance(checkpoint, InMemory)
        return prepare_mixture(recipe, checkpoint, calibration, progress, only_plan=True, token=token).plan
    if not (recipe.compresses or recipe.metric or recipe.calibrate or calibration is not None):
        return plan_checkpoint(resolve_recipe(recipe, checkpoint), checkpoint)
    from .prepare import prepare  # torch, which plans of headers do without

    return prepare(recipe, checkpoint, calibration, progress, only_plan=True, token=token).plan
