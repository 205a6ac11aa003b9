"""Relate names of tensors on disk to names in the model: transformers renames tensors when it loads them.

Checkpoints of vision-language models are the usual case: `language_model.model.layers.0.…` on disk is
`model.language_model.layers.0.…` in the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from ..errors import FamilyError
from .architecture import Architecture
from .ffn import FFN


def namings(architecture: Architecture, names: Iterable[str]) -> Iterator[dict[str, str]]:
    """{name on disk: name in the model}: taken as they are; then, if asked for, as transformers loads them.

    The second one builds the model on the meta device.

    Raises:
        FamilyError: as `Architecture.build`.
    """
    names = list(names)
    yield {name: name for name in names}
    yield module_names(architecture, names)


def module_names(architecture: Architecture, names: Iterable[str]) -> dict[str, str]:
    """{name on disk: name in the model that config.json describes}, in transformers' order of loading.

    A tensor that is loaded into several is given the name of the first of them.

    Raises:
        FamilyError: as `Architecture.build`.
    """
    from transformers.core_model_loading import dot_natural_key

    rename = _renaming(architecture)
    return {name: rename(name) for name in sorted(names, key=dot_natural_key)}


def _renaming(architecture: Architecture) -> Callable[[str], str]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    model = architecture.build(architecture.model_class)
    mapping = get_model_conversion_mapping(model)
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    prefix, tensors = model.base_model_prefix, model.state_dict()

    def rename(name: str) -> str:
        return rename_source_key(name, renamings, converters, prefix, tensors)[0]

    return rename


def layer_on_disk(layer: str, tail: str, on_disk: Mapping[str, str]) -> str:
    """The prefix on disk of a layer's tensors; the layer's own path where its tensors are renamed singly.

    Args:
        layer: path of the layer in the model.
        tail: name of one of its tensors below it.
        on_disk: name in the model -> name on disk.
    """
    name = on_disk[f"{layer}.{tail}"]
    return name.removesuffix(f".{tail}") if name.endswith(f".{tail}") else layer


def check_slots(architecture: Architecture, slot: str, ffns: Iterable[FFN]) -> None:
    """Check that transformers would load a mixture's tensors into the slots of these FFNs.

    Raises:
        FamilyError: it renames them to something else.
    """
    routers = {f"{ffn.key}.router.weight": f"{ffn.path}.{slot}.router.weight" for ffn in ffns}
    for name, found in module_names(architecture, routers).items():
        expected = routers[name]
        if found != expected and not found.endswith(f".{expected}"):
            raise FamilyError(
                f"transformers would load a mixture's {name} as {found}, expected {expected}: it renames "
                "this checkpoint's tensors one by one; load it with transformers, save and convert it"
            )
