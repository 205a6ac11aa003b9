"""Encoder-decoders that are pairs of two models (bert2bert): a row made of the row of both."""

from __future__ import annotations

from dataclasses import replace

from .architecture import Architecture
from .families import FAMILY_OF, PAIR, Family


def family_of(architecture: Architecture) -> Family | None:
    """The row of a stock model's type, or of a pair; None if there is none.

    Raises:
        FamilyError: a pair cannot be built.
    """
    if architecture.model_type == PAIR:
        return _pair(architecture)
    return FAMILY_OF.get(architecture.model_type)


def _pair(architecture: Architecture) -> Family | None:
    """The row of both models; None where they differ, as in bert2gpt2: an artifact has one wiring."""
    config = architecture.config
    encoder, decoder = (
        FAMILY_OF.get((config.get(part) or {}).get("model_type", "")) for part in ("encoder", "decoder")
    )
    if encoder is None or encoder is not decoder:
        return None
    below = architecture.base.get_submodule("decoder").base_model_prefix

    def both(layers: tuple[str, ...]) -> tuple[str, ...]:
        return (*(f"encoder.{each}" for each in layers), *(f"decoder.{below}.{each}" for each in layers))

    spellings = tuple(replace(each, layers=both(each.layers)) for each in encoder.spellings)
    return replace(encoder, model_types=(PAIR,), layers=both(encoder.layers), spellings=spellings)
