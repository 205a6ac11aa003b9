"""What plans ask of a stock model, answered in milliseconds, or not at all.

The answers come from transformers' own files (`stock_files.py`); transformers and torch, whose imports take
seconds, are not imported. What is not certain is not answered: then the model itself has to be asked.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, TypeVar

from packaging.version import Version

from .safetensors_file import DTYPE2BYTES, TensorInfo
from .stand_ins import Conv2d, Linear
from .stock_files import PreTrained, StockFiles, stock_files

T = TypeVar("T")

# The first and the last release whose files were tried: what others do is not known.
TRIED = "5.18", "5.24"
# What `from_pretrained` renames in checkpoints of every type.
_RENAMED = re.compile(r"gamma|beta|weight_g|weight_v|parametrizations|language_model")
# Entries of config.json that change how a model is built, whatever its class; models with them are asked.
_MACHINERY = re.compile(
    r"_?(attn|experts)_implementation\w*|gradient_checkpointing|pruned_heads|per_layer_config|\w*_plan"
)


@dataclass(frozen=True)
class StockShapes:
    """A stock model without numbers.

    Attributes:
        parameters: name -> shape, of all of them; in two places under both names.
        buffers: the same of the buffers that are stored; None where the shape is not known.
        ties: target -> source.
        prefix: of the model without its head; "" if there is none.
        products: (path, numbers in the weight) of the layers that multiply with one.
    """

    parameters: dict[str, tuple[int, ...]]
    buffers: dict[str, tuple[int, ...] | None]
    ties: dict[str, str]
    prefix: str
    products: tuple[tuple[str, int], ...]

    def holds_all(self, tensors: dict[str, TensorInfo], is_buffer: Callable[[str], bool]) -> bool:
        """Whether these are certain to be the model's tensors, all of them, and no others but its buffers."""
        own, loaded = self.parameters | self.buffers, set()
        for name, info in tensors.items():
            known = name if name in own else f"{self.prefix}.{name}"
            if known not in own and is_buffer(name):
                continue
            alike = info.shape == own.get(known) and info.dtype in DTYPE2BYTES
            if not alike or known in loaded or _RENAMED.search(name):
                return False
            loaded.add(known)
        return all(self.ties.get(name) in loaded for name in self.parameters.keys() - loaded)


def stock_shapes(config: dict) -> StockShapes | None:
    """The model that config.json describes, with the head that it names first; None if it is not certain.

    Args:
        config: config.json of a model without custom code.
    """
    return None if any(map(_is_unusual, _entries(config))) else _answer(lambda files: _shapes(files, config))


def stock_heads(model_type: str) -> dict[str, str] | None:
    """Auto class -> class name, for every Auto class with a head on this very model type; None as above."""
    return _answer(lambda files: files.heads(model_type))


def stock_config_name(model_type: str) -> str | None:
    """The name of the config's class; None as above."""
    return _answer(lambda files: files.config_class(model_type).__name__)


def stock_processors() -> dict[str, str | None] | None:
    """Model type -> class of its processor; None as above."""
    return _answer(lambda files: dict(files.module("models.auto.processing_auto").PROCESSOR_MAPPING_NAMES))


def _answer(ask: Callable[[StockFiles], T]) -> T | None:
    """None where the models of transformers are imported, it was not tried, or its files do not say."""
    if _has_models() or not _is_tried(version("transformers")):
        return None
    try:
        with stock_files() as files:
            return ask(files)
    except Exception:  # whatever the files do that the stand-ins do not know
        return None


def _has_models() -> bool:
    return "transformers.modeling_utils" in sys.modules


def _is_tried(release: str) -> bool:
    first, last = map(Version, TRIED)
    return first.release[:2] <= Version(release).release[:2] <= last.release[:2]


def _entries(value: Any, key: str = "") -> Iterable[tuple[str, Any]]:
    """(key, value) of all values in config.json, also of those further in; items have their list's key."""
    if isinstance(value, dict):
        for name, each in value.items():
            yield from _entries(each, name)
    elif isinstance(value, list):
        for each in value:
            yield from _entries(each, key)
    yield key, value


def _is_unusual(entry: tuple[str, Any]) -> bool:
    """Whether an entry of config.json changes how a model is built, or might make that fail."""
    key, value = entry
    if key in ("dtype", "torch_dtype"):
        return value is not None and not (isinstance(value, str) and value in DTYPE2BYTES)
    if isinstance(value, (int, float)) and value < 0 and re.search("init|std", key):
        return True
    return bool(value) and _MACHINERY.fullmatch(key) is not None


def _shapes(files: StockFiles, config: dict) -> StockShapes:
    model_type, name = config["model_type"], config["architectures"][0]
    cls = files.model_class(model_type, name)
    assert cls.config_class is files.config_class(model_type)
    model = cls(cls.config_class.from_dict(config))
    modules = list(model.named_modules())
    assert not any(f'"{each}"' in files.renamed for each in _titles(module for _, module in modules))
    layers = (Linear, Conv2d, files.module("pytorch_utils").Conv1D)
    products = {
        id(module): (path, module) for path, module in reversed(modules) if isinstance(module, layers)
    }
    return StockShapes(
        parameters={name: parameter.shape for name, parameter in model.named_parameters()},
        buffers={name: buffer.shape for name, buffer in model.named_buffers()},
        ties=model.ties,
        prefix=model.base_model_prefix if model.base_model_prefix in model._modules else "",
        products=tuple((path, module.weight.numel()) for path, module in reversed(products.values())),
    )


def _titles(modules: Iterable[object]) -> set[str]:
    """Names under which transformers' table of renames may have an entry for a model of these modules."""
    models = [module for module in modules if isinstance(module, PreTrained)]
    return {type(model).__name__ for model in models} | {model.config.model_type for model in models}
