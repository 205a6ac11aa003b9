"""Names of tensors as trainers leave them: with the prefixes of modules that wrapped the model."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from ..errors import CheckpointError, few
from .architecture import Architecture, knows

# Wrappers around the whole model: DataParallel and DeepSpeed, PEFT, TRL's value heads, Lightning.
_AROUND = ("module.", "base_model.model.", "pretrained_model.", "_forward_module.")
# Wrappers around any module of it: torch.compile, FSDP and its activation checkpointing.
_WITHIN = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
# PEFT's name for a layer that has an adapter beside it.
_LAYER = "base_layer."
_WRAPPER = re.compile("|".join(map(re.escape, (*_AROUND, *_WITHIN))))
_ADAPTER = re.compile(r"\.(lora_\w+|modules_to_save|original_module)(?=\.)")


@dataclass(frozen=True)
class Unwrapping:
    """What was taken off the names of a checkpoint's tensors.

    Attributes:
        stored_names: name without wrappers -> name in the file, of all tensors.
        taken: regular expression -> what it finds and was taken off; each applies once, in this order.
    """

    stored_names: dict[str, str]
    taken: dict[str, str]

    @property
    def note(self) -> str:
        """What a user should know."""
        found = ", ".join(map(repr, sorted({*self.taken.values()})))
        return f"a trainer's wrapper of the model left {found} in the names of tensors: taken off."


def unwrap(source: str, architecture: Architecture, names: Collection[str]) -> Unwrapping | None:
    """Take the names of wrappers off the names of tensors, but for those that the stock model has itself.

    Args:
        source: what the user typed, for messages.
        architecture: of the checkpoint.
        names: of its tensors.

    Returns:
        None if no name holds a wrapper.

    Raises:
        CheckpointError: the tensors of an adapter lie beside those of its model, or two get the same name.
        FamilyError: as `Architecture.build`.
    """
    marks = (*_AROUND, *_WITHIN, _LAYER)
    if not any(part in name for name in names for part in marks) and not any(map(_ADAPTER.search, names)):
        return None
    if not (architecture.is_custom or knows(architecture.model_type)):
        return None  # whoever looks for the FFNs says so
    own = {
        part for name in architecture.build(architecture.model_class).state_dict() for part in name.split(".")
    }
    _reject_adapters(source, names, own)
    taken: dict[str, str] = {}
    stored: dict[str, str] = {}
    for name in names:
        plain = _plain(name, own, taken)
        if plain in stored:
            raise CheckpointError(
                f"'{source}' holds {stored[plain]!r} and {name!r}, two tensors for {plain}; expected one "
                "model: save one state dict alone"
            )
        stored[plain] = name
    if not taken:
        return None
    # Prefixes first, and a longer one before its own beginning.
    order = sorted(taken, key=lambda each: (not each.startswith("^"), -len(taken[each])))
    patterns = {each: taken[each] for each in order}
    for plain, name in stored.items():
        if (found := _as_loaded(name, patterns)) != plain:
            raise CheckpointError(
                f"'{source}': transformers would load {name!r} as {found!r}, expected {plain!r}: the names "
                "mix several wrappers; save the state dict of the model inside them"
            )
    return Unwrapping(stored, patterns)


def _as_loaded(name: str, patterns: Iterable[str]) -> str:
    """A name as `from_pretrained` reads it: each pattern is taken off once, in this order."""
    for pattern in patterns:
        name = re.sub(pattern, "", name, count=1)
    return name


def _plain(name: str, own: set[str], taken: dict[str, str]) -> str:
    """The name without wrappers; what was taken off is added to `taken`."""
    prefix = ""
    while (match := _WRAPPER.match(name)) and match[0].partition(".")[0] not in own:
        prefix, name = prefix + match[0], name[match.end() :]
    if prefix:
        taken[f"^{re.escape(prefix)}"] = prefix
    for part in (*_WITHIN, _LAYER):
        if part[:-1] not in own:
            name, times = re.subn(rf"(?<=\.){re.escape(part)}", "", name)
            for extra in range(times):  # transformers applies a pattern once: another pattern for each
                taken["(?:" * extra + re.escape(part) + ")" * extra] = part
    return name


def _reject_adapters(source: str, names: Iterable[str], own: set[str]) -> None:
    """Raise CheckpointError if there are adapters that the stock model does not have itself."""
    layers: set[str] = set()
    if _LAYER[:-1] not in own:
        layers = {name.partition(f".{_LAYER}")[0] for name in names if f".{_LAYER}" in name}
    beside = [
        name
        for name in names
        if ((match := _ADAPTER.search(name)) and match[1] not in own)
        or (f".{_LAYER}" not in name and any(name.startswith(f"{layer}.") for layer in layers))
    ]
    if beside:
        raise CheckpointError(
            f"'{source}' holds a model and a PEFT adapter beside it ({few(beside, 2)}), expected a whole "
            "model: merge it (merge_and_unload), save that, and convert the result"
        )
