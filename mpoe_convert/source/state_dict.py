"""Check that a checkpoint's tensors are those of the model that its config.json describes."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from logging import CRITICAL
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, FamilyError, few
from .architecture import Architecture
from .checkpoint import Checkpoint
from .families import Family
from .ffn import FFN
from .locate import projection_names
from .memo import remembered

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Causal masks, position indices and constants that checkpoints carry: stored, but not parameters.
_BUFFER = re.compile(
    r"(^|\.)(attn|attention|self_attention)\.(masked_)?bias$|"
    r"inv_freq$|position_ids$|final_logits_bias$"
)


@dataclass(frozen=True)
class Loaded:
    """The stock model that a checkpoint fits.

    Attributes:
        architecture: of the checkpoint.
        model: on the meta device.
        poolers: parameters of the model that the checkpoint lacks.
        unexpected: names of tensors, as transformers renames them, that the model has no place for.
    """

    architecture: Architecture
    model: PreTrainedModel = field(repr=False)
    poolers: tuple[str, ...]
    unexpected: frozenset[str]

    def without_unread_biases(self, family: Family, ffns: Iterable[FFN]) -> tuple[FFN, ...]:
        """The FFNs without the biases that the stock model does not have, whatever the checkpoint holds."""
        return tuple(self._without_unread_biases(family, ffn) for ffn in ffns)

    def _without_unread_biases(self, family: Family, ffn: FFN) -> FFN:
        try:
            layer = self.model.base_model.get_submodule(ffn.path)
        except AttributeError:  # the head that config.json names lacks this stack
            return ffn
        names = projection_names(layer, family.spellings, ffn.projections)
        unread = [
            role
            for role, source in ffn.projections.items()
            if source.bias and getattr(layer.get_submodule(names[role]), "bias", None) is None
        ]
        return _without_biases(ffn, unread)

    def notes(self, ffns: Iterable[FFN]) -> Iterator[str]:
        """What is no fault of the checkpoint, but should be known.

        Args:
            ffns: those that are converted, as `without_unread_biases` gives them.
        """
        if self.poolers:
            yield (
                f"the checkpoint lacks {few(self.poolers)}: transformers fills them with random numbers, in "
                "the dense model and in the artifact."
            )
        left_out = [name for ffn in ffns for name in ffn.unread]
        if left_out:
            yield f"{type(self.model).__name__} of this config.json has no {few(left_out)}: left out."
        ends = tuple(f".{name}" for name in left_out)
        unused = {name for name in self.unexpected if not is_buffer(name) and not f".{name}".endswith(ends)}
        if unused and (unused := unused - self._of_other_heads(unused)):
            yield (
                f"no {self.architecture.model_type} model with this config.json has {few(sorted(unused))}: "
                "copied, and not used."
            )

    def _of_other_heads(self, names: Iterable[str]) -> set[str]:
        """Those of the names that a head of this type has: a checkpoint may hold more than one."""
        known: set[str] = set()
        for cls in self.architecture.head_classes:
            try:
                head = self.architecture.build(cls)
            except FamilyError:  # a head that this config is not for
                continue
            known |= {name.removeprefix(f"{head.base_model_prefix}.") for name in head.state_dict()}
        return {name for name in names if name in known or name.partition(".")[2] in known}


def fit(
    checkpoint: Checkpoint, family: Family, ffns: Sequence[FFN]
) -> tuple[tuple[FFN, ...], tuple[str, ...]]:
    """The FFNs without the biases that the stock model does not have, and what a user should know.

    Args:
        checkpoint: where they are.
        family: how they are wired.
        ffns: those to convert.

    Raises:
        CheckpointError, FamilyError: as `check_state_dict`.
    """

    def learn() -> dict:
        shapes = checkpoint.architecture.shapes
        if shapes is not None and shapes.holds_all(checkpoint.tensors, is_buffer):
            return {"unread": [[] for _ in ffns], "notes": []}
        loaded = check_state_dict(checkpoint)
        converted = loaded.without_unread_biases(family, ffns)
        unread = [
            [role for role in ffn.projections if ffn.projections[role] != kept.projections[role]]
            for ffn, kept in zip(ffns, converted, strict=True)
        ]
        return {"unread": unread, "notes": [*loaded.notes(converted)]}

    headers = [(name, info.dtype, info.shape) for name, info in checkpoint.tensors.items()]
    of = [checkpoint.source, checkpoint.config, headers, repr(family), repr(ffns)]
    found = learn() if checkpoint.architecture.is_custom else remembered("state dict", of, learn)
    converted = [_without_biases(ffn, roles) for ffn, roles in zip(ffns, found["unread"], strict=True)]
    return tuple(converted), tuple(found["notes"])


def _without_biases(ffn: FFN, roles: Collection[str]) -> FFN:
    """The FFN without the biases of these projections."""
    if not roles:
        return ffn
    kept = {
        role: replace(source, bias=None) if role in roles else source
        for role, source in ffn.projections.items()
    }
    names = [source.bias for role, source in ffn.projections.items() if role in roles and source.bias]
    return replace(ffn, experts=(kept,), unread=tuple(dict.fromkeys(names)))


def check_state_dict(checkpoint: Checkpoint) -> Loaded:
    """Compare the names and shapes of all tensors with the stock model's; reads headers only.

    transformers itself loads tensors without data (torch's meta device) into the dense model, so that its
    renames of older checkpoints, its ties and what its classes ignore hold here too. Buffers and frozen
    tables (Pegasus' positions) are computed by the model's code, so they may be missing; a pooler may,
    because many encoders are published without.

    Raises:
        CheckpointError: tensors are missing, or have another shape; names them, and what is there instead.
        FamilyError: as `Architecture.build`.
    """
    architecture = checkpoint.architecture
    model = architecture.build(architecture.model_class)
    parameters = model.named_parameters(remove_duplicate=False)
    learnt = {name for name, parameter in parameters if parameter.requires_grad}
    found = _load_headers(model, checkpoint)
    missing = sorted(found.missing_keys & learnt)
    poolers = [name for name in missing if "pooler" in name.split(".")]
    missing = [name for name in missing if name not in poolers]
    if missing or found.mismatched_keys:
        raise CheckpointError(_message(checkpoint, model, missing, found))
    return Loaded(architecture, model, tuple(poolers), frozenset(found.unexpected_keys))


def _load_headers(model: PreTrainedModel, checkpoint: Checkpoint) -> Any:
    """transformers' loading info, as `from_pretrained` reports it."""
    import torch
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.modeling_utils import LoadStateDictConfig

    tensors = {
        name: torch.empty(info.shape, dtype=getattr(torch, info.dtype), device="meta")
        for name, info in checkpoint.tensors.items()
        if hasattr(torch, info.dtype)
    }
    if not hasattr(model, "all_tied_weights_keys"):
        model.post_init()  # which makes it; custom code may not call it
    with _without_progress():
        # The mapping's type is wider than the field's annotation; transformers itself passes it so.
        mapping: Any = get_model_conversion_mapping(model)
        config = LoadStateDictConfig(
            ignore_mismatched_sizes=True, device_map={"": torch.device("meta")}, weight_mapping=mapping
        )
        # Not `from_pretrained`: given a device map, it wants accelerate, which a conversion does not need.
        found, _ = type(model)._load_pretrained_model(model, tensors, None, config)
        # The rest of what `from_pretrained` does to the lists of names.
        model.mark_tied_weights_as_initialized(found)
        model.tie_weights(missing_keys=found.missing_keys, recompute_mapping=False)
        model._adjust_missing_and_unexpected_keys(found)
    return found


def _message(checkpoint: Checkpoint, model: PreTrainedModel, missing: list[str], found: Any) -> str:
    """All that does not fit, as one line, and what to do."""
    different, unexpected = sorted(found.mismatched_keys), sorted(found.unexpected_keys)
    parts = []
    if different:
        name, shape, expected = different[0]
        others = f" and {len(different) - 1} more" if len(different) > 1 else ""
        keys = ", ".join(_keys_of(checkpoint.config, shape, expected)) or "its sizes"
        parts.append(
            f"{name}{others} has the shape {list(shape)}, and config.json asks for {list(expected)} ({keys})"
        )
    if missing:
        instead = f" (it has {few(unexpected)} instead)" if unexpected else ""
        parts.append(f"the checkpoint lacks {few(missing)} of {type(model).__name__}{instead}")
    shapes = [(tuple(shape), tuple(expected)) for _, shape, expected in different]
    advice = _advice(checkpoint.architecture, model, missing, shapes)
    return f"'{checkpoint.source}': {'; '.join(parts)}; {advice}"


def _advice(
    architecture: Architecture, model: PreTrainedModel, missing: list[str], shapes: list[tuple[tuple, tuple]]
) -> str:
    """What to do about what does not fit, by its likely cause."""
    if shapes and all(shape == (0,) for shape, _ in shapes):
        return (
            "empty tensors are what DeepSpeed's ZeRO-3 saves of a model that was not gathered: make the "
            "weights from its checkpoint with zero_to_fp32.py, and convert those"
        )
    if shapes and all(len(shape) == 2 and shape == expected[::-1] for shape, expected in shapes):
        return "they are transposed: save the weights as transformers does, and convert those"
    advice = "correct config.json, or fetch the files that belong together"
    base, prefix = architecture.heads.get("AutoModel"), f"{model.base_model_prefix}."
    only_the_head = model.base_model is not model and not any(name.startswith(prefix) for name in missing)
    if base and only_the_head and not shapes:
        advice += f'; to convert the model without a head, write "architectures": ["{base}"] there'
    return advice


def _keys_of(config: dict, shape: Sequence[int], expected: Sequence[int]) -> Iterator[str]:
    """Config entries, as "hidden_size = 64", whose value is the expected size where the shapes differ."""
    pairs = zip(shape, expected, strict=False)
    sizes = {size for found, size in pairs if found != size}
    for key, value in config.items():
        if isinstance(value, int) and not isinstance(value, bool) and value in sizes:
            yield f"{key} = {value}"


def is_buffer(name: str) -> bool:
    """Whether a tensor is no parameter but a mask or a table, by its name."""
    return bool(_BUFFER.search(name))


@contextmanager
def _without_progress() -> Iterator[None]:
    """Silence transformers inside the block: `check_state_dict` itself reports what differs."""
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
