"""Check that a checkpoint's tensors have the shapes that its config.json asks for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from logging import CRITICAL
from typing import Any

from ..errors import CheckpointError
from .checkpoint import Checkpoint


def check_shapes(checkpoint: Checkpoint) -> None:
    """Compare every tensor with the model that config.json describes; reads headers only.

    transformers itself loads tensors without data (torch's meta device) into the dense model, so that its
    renames of older checkpoints hold here too.

    Raises:
        CheckpointError: a tensor has another shape; names the first, both shapes and the config key.
        FamilyError: as `Architecture.build`.
    """
    import torch
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.modeling_utils import LoadStateDictConfig

    skeleton = checkpoint.architecture.build(checkpoint.architecture.model_class)
    tensors = {
        name: torch.empty(info.shape, dtype=getattr(torch, info.dtype), device="meta")
        for name, info in checkpoint.tensors.items()
        if hasattr(torch, info.dtype)
    }
    with _without_progress():
        # The mapping's type is wider than the field's annotation; transformers itself passes it so.
        mapping: Any = get_model_conversion_mapping(skeleton)
        config = LoadStateDictConfig(
            ignore_mismatched_sizes=True, device_map={"": torch.device("meta")}, weight_mapping=mapping
        )
        # Not `from_pretrained`: given a device map, it wants accelerate, which a conversion does not need.
        found, _ = type(skeleton)._load_pretrained_model(skeleton, tensors, None, config)
    if different := sorted(found.mismatched_keys):
        name, shape, expected = different[0]
        others = f" and {len(different) - 1} more" if len(different) > 1 else ""
        keys = ", ".join(_keys_of(checkpoint.config, shape, expected)) or "its sizes"
        raise CheckpointError(
            f"{checkpoint.source}: {name}{others} has the shape {list(shape)}, and config.json asks for "
            f"{list(expected)} ({keys}); correct config.json, or fetch the files that belong together"
        )


def _keys_of(config: dict, shape: Sequence[int], expected: Sequence[int]) -> Iterator[str]:
    """Config entries, as "hidden_size = 64", whose value is the expected size where the shapes differ."""
    pairs = zip(shape, expected, strict=False)
    sizes = {size for found, size in pairs if found != size}
    for key, value in config.items():
        if isinstance(value, int) and not isinstance(value, bool) and value in sizes:
            yield f"{key} = {value}"


@contextmanager
def _without_progress() -> Iterator[None]:
    """Silence transformers inside the block: `check_shapes` itself reports what differs."""
    from transformers.utils import logging

    was_on, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if was_on:
            logging.enable_progress_bar()
