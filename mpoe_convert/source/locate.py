"""Locate the FFNs of a checkpoint: find its row in the table of families, and match tensor names with it.

Where no row fits, a row is made from names that the user gives (`--ffn`) or, for custom code, from names
that look like those of the table; `probe.py` then runs the module to learn what names do not say.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from ..errors import FamilyError, counted
from ..options import called
from .architecture import Architecture, knows
from .families import FAMILIES, Family, Spelling, row_of_module
from .ffn import FFN, Source
from .pairs import family_of
from .renames import check_slots, layer_on_disk, module_names, namings

if TYPE_CHECKING:
    from torch import nn


def resolve(
    architecture: Architecture, names: Iterable[str], ffn: str | None = None
) -> tuple[Family, list[FFN]]:
    """The family row of a checkpoint and all FFNs that its tensor names show, in layer order.

    Args:
        architecture: its config says how many layers there have to be.
        names: tensor names of the checkpoint.
        ffn: the text of --ffn, which names the FFNs of an architecture outside the table.

    Raises:
        FamilyError: the type is unknown, the names do not fit its row, or a layer has no FFN.
    """
    names, model_type = set(names), architecture.model_type
    if ffn is not None:
        family = family_by_hand(architecture, ffn)
    elif architecture.is_custom:
        family = _family_of_custom_code(architecture, names)
    else:
        family = family_of(architecture)
    if family is None:
        raise FamilyError(_unknown(architecture, names))
    for naming in namings(architecture, names):
        on_disk = {module: name for name, module in naming.items()}
        for spelling in family.spellings:
            if found := _find(family, spelling, on_disk, architecture):
                if any(name != module for name, module in naming.items()):
                    check_slots(architecture, family.slot, found)
                return family, found
    expected = family.spellings[0]
    example = f"{expected.layers[0].format(0)}.{expected.up}.weight"
    raise FamilyError(
        f"no FFN found: a {model_type} checkpoint has tensors such as {example}, this one has "
        f"{_examples(names)}; is it complete, and of the type that config.json names?"
    )


def _find(
    family: Family, spelling: Spelling, on_disk: Mapping[str, str], architecture: Architecture
) -> list[FFN]:
    """All FFNs under the one prefix ("", "transformer.", "model." ...) that the checkpoint uses.

    Args:
        on_disk: name in the model -> name on disk.
    """
    found, prefixes, names = [], set(), set(on_disk)
    for stack, (layer, path) in enumerate(zip(spelling.layers, family.layers, strict=True)):
        pattern = re.escape(layer).replace(r"\{\}", r"(\d+)")
        pattern = re.compile(rf"((?:.*\.)?){pattern}\.{re.escape(spelling.up)}\.weight")
        for name in names:
            if match := pattern.fullmatch(name):
                prefixes.add(match[1])
                index = int(match[2])
                found.append((stack, index, path.format(index), match[1] + layer.format(index)))
    if len(prefixes) > 1:
        raise FamilyError(
            f"FFNs under several prefixes {sorted(prefixes)}: this looks like several models in one "
            "checkpoint; extract the language model first"
        )
    for prefix in prefixes:
        for stack, (layer, path) in enumerate(zip(spelling.layers, family.layers, strict=True)):
            indices = {index for each, index, *_ in found if each == stack}
            has_ffn = partial(_has_ffn, architecture, family, path)
            count = _num_layers(architecture.config, layer)
            _check_complete(prefix + layer, spelling.up, indices, names, count, has_ffn)
    sources = {key: _sources(family, spelling, key, on_disk) for *_, key in found}
    tail = f"{spelling.up}.weight"
    return [
        FFN(path, index, f"{layer_on_disk(key, tail, on_disk)}.{family.slot}", (sources[key],))
        for _, index, path, key in sorted(found)
    ]


# Config keys with the number of layers of a stack, by the path of its layers; the first key that is present.
_COUNTS = {
    "encoder.albert_layer_groups.": ("num_hidden_groups",),
    "encoder.": ("encoder_layers", "num_layers", "num_hidden_layers"),
    "decoder.": ("decoder_layers", "num_decoder_layers", "num_layers", "num_hidden_layers"),
    "": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
}


# The text towers of vision-language models, which have a config of their own.
_TOWERS = ("language_model.", "text_model.")


def _num_layers(config: dict, layer: str) -> int | None:
    """The number of layers that config.json names for a stack, if it does."""
    if layer.startswith(_TOWERS):
        config, layer = config.get("text_config") or config, layer.partition(".")[2]
    keys = next(keys for start, keys in _COUNTS.items() if layer.startswith(start))
    count = next((config[key] for key in keys if config.get(key) is not None), None)
    return count if isinstance(count, int) else None


def _check_complete(
    layer: str,
    up: str,
    indices: set[int],
    names: set[str],
    count: int | None,
    has_ffn: Callable[[int], bool],
) -> None:
    """Check that every layer of a stack that has an FFN in the model has one in the checkpoint.

    A stack without tensors belongs to a head that lacks it.

    Raises:
        FamilyError: an FFN is missing (it would be random after loading), or there are too many.
    """
    pattern = re.compile(re.escape(layer).replace(r"\{\}", r"(\d+)") + r"\.")
    present = indices | {int(match[1]) for name in names if (match := pattern.match(name))}
    if not present:
        return
    expected = max(present) + 1 if count is None else count
    if missing := [i for i in range(expected) if i not in indices and has_ffn(i)]:
        some = ", ".join(f"{layer.format(i)}.{up}.weight" for i in missing[:3])
        raise FamilyError(
            f"the checkpoint is incomplete: {some} missing; found {counted(len(indices), 'FFN')}, expected "
            f"{len(indices) + len(missing)} by "
            f"{'the layers that have tensors' if count is None else 'config.json'}"
        )
    if len(indices) > expected:
        raise FamilyError(
            f"found {counted(len(indices), 'FFN')} up to {layer.format(max(indices))}, expected {expected} "
            "by config.json; correct the number of layers there"
        )


def _has_ffn(architecture: Architecture, family: Family, layer: str, index: int) -> bool:
    """Whether the model has an FFN in that layer, as far as is known: DeciLM leaves it out in some."""
    try:
        base = architecture.base
    except FamilyError:
        return True
    paths = [
        (f"{layer.format(index)}.{each.up}", f"{layer.format(index)}.{each.down}")
        for each in family.spellings
    ]
    return any(all(_has(base, path) for path in pair) for pair in paths)


def _sources(family: Family, spelling: Spelling, key: str, on_disk: Mapping[str, str]) -> dict[str, Source]:
    roles = {"gate": spelling.gate, "up": spelling.up, "down": spelling.down}
    if spelling.fused:
        roles["gate"] = spelling.up
    sources = {}
    for role, name in roles.items():
        if name is None:
            continue
        weight, bias = f"{key}.{name}.weight", f"{key}.{name}.bias"
        if weight not in on_disk:
            raise FamilyError(f"{weight} is missing while {key}.{spelling.up}.weight is there")
        part = {"gate": 0, "up": 1}.get(role) if spelling.fused else None
        sources[role] = Source(on_disk[weight], on_disk.get(bias), family.transposed, part)
    return sources


def projection_names(
    layer: nn.Module, spellings: Iterable[Spelling], roles: Collection[str]
) -> dict[str, str]:
    """Role -> path of the linear layer in a stock layer; a fused layer appears for gate and for up.

    Args:
        layer: a layer of the stock model.
        spellings: of its family, in order of preference.
        roles: of the FFN.

    Raises:
        FamilyError: the layer has none of the modules that the spellings name.
    """
    for spelling in spellings:
        names = {"up": spelling.up, "down": spelling.down}
        if spelling.gate or spelling.fused:
            names["gate"] = spelling.gate or spelling.up
        if set(names) != set(roles):
            continue
        try:
            for name in names.values():
                layer.get_submodule(name)
        except AttributeError:
            continue
        return {role: names[role] for role in roles}
    raise FamilyError(f"{type(layer).__name__} has none of the modules expected there")


def _examples(names: set[str], count: int = 3) -> str:
    layered = sorted(name for name in names if re.search(r"\.\d+\.", name) and name.endswith("weight"))
    return ", ".join((layered or sorted(names))[:count]) or "no tensors at all"


def _unknown(architecture: Architecture, names: set[str]) -> str:
    """The message for an unknown model type: what was found, the row that fits best, and what to do.

    Raises:
        FamilyError: the model cannot be built.
    """
    from .named_experts import proposals as experts_proposals
    from .proposals import proposals

    model_type = architecture.model_type
    nearest = next(iter(_by_likeness(names)), None)
    message = (
        f"model type {model_type!r} is not in the table of families; its tensors look like {_examples(names)}"
    )
    if architecture.is_custom:
        message = f"no row of the table of families is this model's; its tensors look like {_examples(names)}"
    elif not knows(model_type):
        message += "; transformers does not have it either"
        if nearest is None:
            return f"{message}, and no code lies beside it: it cannot be built"
        known = nearest[0].model_types[0]
        return (
            f"{message}; nearest is {known}: if the architecture is the same, set "
            f'"model_type": "{known}" in a copy of config.json'
        )
    if nearest is not None:
        message += f"; nearest is {nearest[0].model_types[0]}"
    if found := proposals(architecture, {*names, *module_names(architecture, names).values()}):
        texts = " or ".join(f'{called("ffn")} "{each}"' for each in found)
        return f"{message}; to name the FFNs by hand: {texts}"
    if found := experts_proposals(architecture.base):
        texts = " or ".join(f'{called("experts_at")} "{each}"' for each in found)
        return f"{message}; to name its experts by hand, if it is a mixture: {texts}"
    return (
        f"{message}; no module in its layers computes down(act(up(x))) or down(act(gate(x)) * up(x)) and "
        f"nothing else, so there is none that {called('ffn')} could name"
    )


def _by_hand(spelling: Spelling, parts: Iterable[str]) -> str:
    """The names of a spelling's first stack as --ffn takes them."""
    slot = spelling.up.rpartition(".")[0]
    layer = spelling.layers[0] + (f".{slot}" if slot else "")
    return f"{layer}:{','.join(part.rpartition('.')[2] for part in parts)}"


def _by_likeness(names: set[str]) -> list[tuple[Family, Spelling]]:
    """The rows and spellings whose projections the checkpoint has, the best match first."""
    scored = [(_likeness(each, names), family, each) for family in FAMILIES for each in family.spellings]
    scored.sort(key=lambda found: found[0], reverse=True)
    return [(family, spelling) for score, family, spelling in scored if score[0]]


def _family_of_custom_code(architecture: Architecture, names: set[str]) -> Family:
    """The row of a model with custom code: its tensors are named as in a row of the table, and probing its
    module shows that it computes an FFN.

    Only FFNs that are modules of their own can be probed; the first match is taken.

    Raises:
        FamilyError: there is none; names the nearest row, and why it does not fit.
    """
    architecture.base  # noqa: B018  (raises first if the code does not build a model)
    reason = ""
    for _, spelling in _by_likeness(names):
        parts = [part for part in (spelling.gate, spelling.up, spelling.down) if part]
        homes = {part.rpartition(".")[0] for part in parts}
        if _likeness(spelling, names) != (1.0, 1.0) or len(homes) > 1 or homes == {""} or spelling.layers[1:]:
            continue
        try:
            return family_by_hand(architecture, _by_hand(spelling, parts))
        except FamilyError as error:
            reason = reason or f" ({error})"
    raise FamilyError(_unknown(architecture, names) + reason)


def check_alike(architecture: Architecture, family: Family, chosen: Iterable[FFN]) -> None:
    """Check that the chosen layers are built like the first one, from which a row by hand was made.

    A row of the table needs no check. With custom code, the model's head has to contain the layers too.

    Raises:
        FamilyError: a layer is built differently, or the head's base_model_prefix is wrong.
    """
    if family.by_hand is None:
        return
    head = architecture.build(architecture.model_class) if architecture.is_custom else None
    for ffn in chosen:
        if head is not None and not _has(head.base_model, ffn.path):
            raise FamilyError(
                f"{type(head).__name__} has no {ffn.path} in its base model (its base_model_prefix is "
                f"{head.base_model_prefix!r}): correct that in its code"
            )
        first = _first_layer(architecture, family.by_hand)  # the row was made from it
        row, expected = (_describe(architecture, path, family.by_hand) for path in (ffn.path, first))
        if row != expected:
            raise FamilyError(
                f"the FFN of {ffn.path} is built differently from that of {first} ({row}, not {expected}); "
                f"convert only layers that are built like {first}: {called('layers')}"
            )


def _likeness(spelling: Spelling, names: set[str]) -> tuple[float, float]:
    """The fraction of a row's projections that exist: anywhere by their names, and below the row's layers."""
    parts = [part for part in (spelling.up, spelling.down, spelling.gate) if part]
    layers = "|".join(re.escape(layer).replace(r"\{\}", r"\d+") for layer in spelling.layers)

    def share(before: str) -> float:
        patterns = [re.compile(rf"{before}\.{re.escape(part)}\.weight") for part in parts]
        return sum(any(map(pattern.fullmatch, names)) for pattern in patterns) / len(parts)

    return share(".*"), share(rf"(.*\.)?({layers})")


def family_by_hand(architecture: Architecture, ffn: str) -> Family:
    """A row from "layers.{}.mlp:gate_proj,up_proj,down_proj", completed by probing the module.

    The model is built on the meta device (no memory) for what names do not say: the orientation of the
    weights, the activation, dropouts, whether `up` holds the gate too, and whether the FFN adds the residual.

    Raises:
        FamilyError: the text is malformed, or the module does not match it.
    """
    layer, slot, projections = _parse_by_hand(ffn)
    *gate, up, down = projections
    row = _describe(architecture, _first_layer(architecture, ffn), ffn)
    gate = gate[0] if gate else None
    types = (architecture.model_type,)
    return row_of_module(slot, up, down, layer, gate=gate, model_types=types, by_hand=ffn, **row)


def _first_layer(architecture: Architecture, ffn: str) -> str:
    """The path of the first layer that has the FFN of --ffn; of layer 0 if none has."""
    layers, slot, projections = _parse_by_hand(ffn)
    base = architecture.base
    present = itertools.takewhile(partial(_has, base), map(layers.format, itertools.count()))
    own = (layer for layer in present if all(_has(base, f"{layer}.{slot}.{each}") for each in projections))
    return next(own, layers.format(0))


def _has(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


def _describe(architecture: Architecture, layer: str, ffn: str) -> dict:
    from .probe import describe_slot

    _, slot, projections = _parse_by_hand(ffn)
    return describe_slot(architecture.base, layer, slot, projections)


def _parse_by_hand(ffn: str) -> tuple[str, str, tuple[str, ...]]:
    """(layers, slot, projections) of the text that --ffn takes. Raises FamilyError."""
    match = re.fullmatch(r"([\w.]+\.)?(\w*\{\}\w*)\.([\w.]+):(\w+),(\w+)(?:,(\w+))?", ffn)
    if not match:
        raise FamilyError(
            f'{called("ffn")} is "{ffn}"; expected "LAYERS.{{}}.SLOT:up,down" or '
            '"LAYERS.{}.SLOT:gate,up,down"'
        )
    return (match[1] or "") + match[2], match[3], tuple(name for name in match.groups()[3:] if name)


def runs_per_token(config: dict, path: str) -> int:
    """How often a token passes a module: once, but ALBERT uses a few groups of weights for all its layers.

    Args:
        config: config.json of the dense model.
        path: the module's path.
    """
    match = re.search(r"(?:^|\.)albert_layer_groups\.(\d+)\.", path)
    if not match:
        return 1
    from transformers import AlbertConfig

    albert = AlbertConfig.from_dict(config)
    layers_each = albert.num_hidden_layers / albert.num_hidden_groups
    return sum(int(layer / layers_each) == int(match[1]) for layer in range(albert.num_hidden_layers))
