"""Find what --ffn could name: modules of a model that compute an FFN, seen by running them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from itertools import permutations

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import FamilyError
from .architecture import Architecture
from .probe import describe_slot


def proposals(architecture: Architecture, names: Collection[str]) -> list[str]:
    """Every text of --ffn that is accepted for a model: each of its layers has such an FFN, all alike.

    Args:
        architecture: of the model.
        names: of the checkpoint's tensors.

    Raises:
        FamilyError: as `Architecture.build`.
    """
    base, found = architecture.base, []
    for path, module in base.named_modules():
        parts = path.split(".")
        linears = [name for name, child in module.named_children() if isinstance(child, (nn.Linear, Conv1D))]
        if "0" not in parts[:-1] or len(linears) not in (2, 3):
            continue
        at = parts.index("0")
        layers, slot = ".".join([*parts[:at], "{}"]), ".".join(parts[at + 1 :])
        found += [
            f"{layers}.{slot}:{','.join(order)}"
            for order in permutations(linears)
            if _is_accepted(base, layers, slot, order, names)
        ][:1]
    return found


def _is_accepted(
    base: PreTrainedModel, layers: str, slot: str, projections: tuple[str, ...], names: Collection[str]
) -> bool:
    rows = []
    for layer in _layers(base, layers):
        tensors = [f"{layer}.{slot}.{projection}.weight" for projection in projections]
        if not all(any(f".{name}".endswith(f".{tensor}") for name in names) for tensor in tensors):
            return False
        try:
            rows.append(describe_slot(base, layer, slot, projections))
        except FamilyError:
            return False
    return all(row == rows[0] for row in rows)


def _layers(base: PreTrainedModel, layers: str) -> Iterator[str]:
    """The paths of all layers of a stack."""
    pattern = re.compile(re.escape(layers).replace(r"\{\}", r"\d+"))
    return (path for path, _ in base.named_modules() if pattern.fullmatch(path))
