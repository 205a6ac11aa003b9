"""The one place where a recipe's holes are filled: what the user left open, by checkpoint, kind and data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from .. import experts
from ..errors import RecipeError, counted
from ..experts.selection import EXPERT_CHOICE, THRESHOLD, TOP_P
from ..options import assigned, by_name, called, default_of
from ..source.checkpoint import Checkpoint
from ..source.families import Family
from ..source.ffn import FFN
from ..source.locate import check_alike, resolve
from ..source.state_dict import fit
from ..source.text_options import TextSource
from .recipe import Recipe, parse_layers

# What is fitted to when the recipe names no metric: with calibration data, and without.
METRIC, METRIC_WITHOUT_DATA = "loss", "weights"
# The same of chains that --bond-dim truncates, which take no gradients.
METRIC_OF_CHAINS = "outputs"

# What can be chosen where the source is a mixture.
FOR_MIXTURES = frozenset(
    {
        *("model", "revision", "trust_remote_code", "layers", "include", "exclude", "device", "dtype"),
        *("max_shard_size", "bits", "keep", "share", "allocation", "experts", "top_k", "experts_at"),
        *by_name(TextSource),
    }
)


@dataclass(frozen=True)
class Resolved:
    """A recipe without holes, and what it converts.

    Attributes:
        recipe: repeats the run even if defaults change. `metric` and `allocation` are None where nothing is
            fitted or shared out.
        family: how the FFNs are wired into their layers.
        ffns: those to convert, in layer order.
        kept_dense: paths of the others.
        notes: what a user should know of the source.
    """

    recipe: Recipe
    family: Family
    ffns: tuple[FFN, ...]
    kept_dense: tuple[str, ...]
    notes: tuple[str, ...] = ()


def resolve_recipe(recipe: Recipe, checkpoint: Checkpoint, *, calibrated: bool = False) -> Resolved:
    """Resolve a recipe for an opened checkpoint, from its headers.

    Args:
        calibrated: there are calibration data, from the recipe or beside it.

    Raises:
        MpoeError: the checkpoint's FFNs cannot be located or converted, or the recipe does not fit them.
    """
    if recipe.share is not None:
        raise RecipeError(
            f"{called('share')} given with a dense source; it says what the experts of a mixture have in "
            "common: leave it out"
        )
    recipe.check_against_experts()
    if not recipe.compresses:
        recipe.check_chains()
    family, found = resolve(checkpoint.architecture, checkpoint.tensors, recipe.ffn)
    chosen = select_ffns(recipe, found)
    if recipe.select == EXPERT_CHOICE:
        check_bidirectional(checkpoint, chosen)
    check_alike(checkpoint.architecture, family, chosen)
    converted, told = fit(checkpoint, family, chosen)
    changes = with_fit(recipe, calibrated)
    full = recipe.replace(
        revision=checkpoint.revision,
        ffn=family.by_hand,
        bias=recipe.bias or experts.load(recipe.kind).DEFAULT_BIAS,
        metric=changes.metric,
        allocation=changes.allocation,
        threshold=recipe.threshold or (THRESHOLD if recipe.select == TOP_P else None),
        **recipe.own_options.resolved(recipe.compresses),
    )
    kept = tuple(ffn.path for ffn in found if ffn not in chosen)
    notes = (*checkpoint.notes, *told, *full.own_options.notes(checkpoint.config))
    return Resolved(full, family, converted, kept, notes)


def check_for_mixtures(recipe: Recipe) -> None:
    """Raises RecipeError for what is given and has no meaning where the source is a mixture."""
    for name in by_name(Recipe):
        if name in recipe.given - FOR_MIXTURES:
            raise RecipeError(
                f"{called(name)} given with a mixture of experts as the source; it is about dense sources: "
                "leave it out"
            )
    if recipe.keep is not None and recipe.keep > 1:
        raise RecipeError(
            f"{called('keep')} is {recipe.keep:g}; expected a share of the experts' numbers, such as 0.6 for "
            "60 %"
        )


def check_search(recipe: Recipe, calibrated: bool) -> None:
    """Raises RecipeError for a search without text to compare variants on."""
    if recipe.search and not calibrated:
        raise RecipeError(
            f"{called('search')} given without {called('calibrate')}; variants are compared on calibration "
            "text"
        )


def with_fit(recipe: Recipe, calibrated: bool) -> Recipe:
    """The recipe with its metric and, under a budget, its allocation; for a search, which varies them.

    Raises:
        RecipeError: it needs calibration data, and there are none.
    """
    if not recipe.compresses:
        fits_chains = calibrated and not recipe.own_options.takes_activations()
        return recipe.replace(metric=recipe.metric or (METRIC_OF_CHAINS if fits_chains else None))
    metric = recipe.metric or (METRIC if calibrated else METRIC_WITHOUT_DATA)
    if metric != METRIC_WITHOUT_DATA and not calibrated:
        raise RecipeError(needs_calibration("metric", metric))
    allocation = recipe.allocation or ("loss" if metric == "loss" else "energy")
    if allocation in ("loss", "measured") and not calibrated:
        raise RecipeError(needs_calibration("allocation", allocation))
    return recipe.replace(metric=metric, allocation=allocation)


def check_text_options(recipe: Recipe, calibrated: bool) -> None:
    """Raises RecipeError for options about a text where none is read."""
    if calibrated or recipe.calibrate:
        return
    for name, each in by_name(TextSource).items():
        if getattr(recipe, name) != default_of(each):
            raise RecipeError(f"{called(name)} given without {called('calibrate')}; no text is read")


def needs_calibration(name: str, value: str) -> str:
    """The message for an option that needs calibration data where there are none."""
    return (
        f"{called(name)} is {value!r}; expected {called('calibrate')} with it (from Python: calibration, if "
        "batches were given the first time)"
    )


def select_ffns(recipe: Recipe, found: Sequence[FFN]) -> list[FFN]:
    """The FFNs to convert.

    Raises:
        RecipeError: a part of the choice matches nothing or ends behind the last layer, or nothing is left.
    """
    paths = [ffn.path for ffn in found]
    names = ", ".join(paths if len(paths) <= 4 else [*paths[:3], "…", paths[-1]])
    has = f"this model has {counted(len(found), 'FFN')}: {names}"
    _check_layers(recipe.layers, [ffn.index for ffn in found], has)
    for option in ("include", "exclude"):
        for pattern in getattr(recipe, option):
            if not any(fnmatchcase(path, pattern) for path in paths):
                raise RecipeError(f"{called(option)} {pattern!r} matches no FFN; {has}")
    chosen = [ffn for ffn in found if recipe.selects(ffn.path, ffn.index)]
    if not chosen:
        names = "/".join(map(called, ("layers", "include", "exclude")))
        raise RecipeError(f"{names} leave no FFN to convert; {has}")
    return chosen


# A model with one of these heads is an encoder: its tokens see later ones.
_BIDIRECTIONAL = {"AutoModelForMaskedLM", "AutoModelForImageClassification"}


def check_bidirectional(checkpoint: Checkpoint, chosen: Sequence[FFN]) -> None:
    """Raises RecipeError if an FFN is of a decoder, whose experts cannot choose among all tokens."""
    config = checkpoint.config
    if config.get("is_encoder_decoder"):
        decoders = [ffn.path for ffn in chosen if "decoder" in ffn.path.split(".")]
        instead = f"leave the decoder dense by {called('exclude')}, or choose another {called('select')}"
    else:
        is_encoder = not _BIDIRECTIONAL.isdisjoint(checkpoint.architecture.heads)
        decoders = [] if is_encoder and not config.get("is_decoder") else [ffn.path for ffn in chosen]
        instead = f"choose another {called('select')}"
    if decoders:
        raise RecipeError(
            f"{assigned('select', EXPERT_CHOICE)} for '{decoders[0]}', a layer of a decoder, where an expert "
            f"would choose a token by later ones; {instead}"
        )


def _check_layers(layers: str | None, indices: Sequence[int], has: str) -> None:
    """Raises RecipeError if a number or a range names layers that are not there."""
    for part in parse_layers(layers) if layers is not None else ():
        number = f"{part[0]}-{part[-1]}" if part[0] != part[-1] else str(part[0])
        asked = f"{called('layers')} is {layers!r}, and {number}"
        if not any(index in part for index in indices):
            raise RecipeError(f"{asked} matches no FFN; {has}")
        if part[-1] > max(indices):
            raise RecipeError(f"{asked} ends behind the last FFN, in layer {max(indices)}; {has}")
