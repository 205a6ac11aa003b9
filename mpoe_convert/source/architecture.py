"""The classes of a model: those of transformers, or those of its custom code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FamilyError, one_line
from .memo import remembered
from .stock_shapes import StockShapes, stock_config_name, stock_heads, stock_shapes

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def main_auto_class(config: dict, model_type: str) -> str:
    """The Auto class that loads the head that config.json names; AutoModel if none does.

    Args:
        config: config.json of a dense model.
        model_type: its model type in transformers.
    """
    own = custom_heads(config.get("auto_map") or {})
    known = {auto: name.rpartition(".")[2] for auto, name in own.items()} or heads(model_type)
    architecture = next(iter(config.get("architectures") or ()), None)
    matching = [auto for auto, stock in known.items() if stock == architecture]
    return min(matching, key=_preference, default="AutoModel")


def _preference(auto: str) -> tuple[int, str]:
    """Sort key of Auto classes that load the same head: BART's, for example, is in three of them."""
    first = (
        "AutoModelForImageTextToText",
        "AutoModelForCausalLM",
        "AutoModelForSeq2SeqLM",
        "AutoModelForMaskedLM",
        "AutoModel",
    )
    if auto in first:
        return first.index(auto), auto
    return len(first) + (auto == "AutoModelForPreTraining"), auto


def knows(model_type: str) -> bool:
    """Whether the installed transformers has this model type."""
    # Those of transformers alone: custom code may register more in CONFIG_MAPPING. The module declares no
    # exports, so pyright takes the name for a private one.
    from transformers.models.auto.configuration_auto import (
        CONFIG_MAPPING_NAMES,  # pyright: ignore[reportPrivateImportUsage]
    )

    return model_type in CONFIG_MAPPING_NAMES


def heads(model_type: str) -> dict[str, str]:
    """Auto class -> stock class name, for every Auto class that has a head on this very model type."""
    return remembered("heads", model_type, lambda: stock_heads(model_type) or _heads(model_type))


def _heads(model_type: str) -> dict[str, str]:
    import transformers
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

    found = {}
    for name, auto in vars(modeling_auto).items():
        if not (isinstance(auto, type) and issubclass(auto, _BaseAutoModelClass)):
            continue
        mapping = getattr(auto, "_model_mapping", None)
        stock = None if mapping is None else mapping._model_mapping.get(model_type)  # bool() imports all
        if stock and auto.__name__ == name:
            stock = stock[0] if isinstance(stock, (tuple, list)) else stock
            # Some Auto classes map a type to a model that merely contains it.
            config_class = getattr(getattr(transformers, stock, None), "config_class", None)
            if getattr(config_class, "model_type", None) == model_type:
                found[name] = stock
    return found


def custom_heads(auto_map: Mapping) -> dict[str, str]:
    """The entries of an auto_map that are models: Auto class -> "module.Class"."""
    return {auto: name for auto, name in auto_map.items() if auto.startswith("AutoModel")}


def _values(value: Any) -> Any:
    """A copy of what config.json holds, as `from_pretrained` reads it: configs change inner dictionaries.

    JSON has no infinity, so transformers writes {"__float__": "Infinity"}.
    """
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"])
        return {key: _values(each) for key, each in value.items()}
    return [_values(each) for each in value] if isinstance(value, list) else value


@dataclass(frozen=True)
class Architecture:
    """A dense model's classes and config.

    Attributes:
        config: its config.json; an auto_map in it names files in `code`.
        code: folder of the custom code, if there is some and it may run.
    """

    config: dict = field(repr=False)
    code: Path | None = None

    @property
    def model_type(self) -> str:
        """The model type that config.json names."""
        return self.config["model_type"]

    @property
    def auto_map(self) -> dict:
        """Auto class -> "module.Class" in `code`, of models, config and tokenizer; {} without custom code."""
        return self.config.get("auto_map") or {} if self.code else {}

    @property
    def is_custom(self) -> bool:
        """Whether the model's classes are custom code; then there are no stock heads beside them."""
        return bool(custom_heads(self.auto_map))

    @property
    def heads(self) -> dict[str, str]:
        """Auto class -> class name, of the models."""
        if not self.is_custom:
            return heads(self.model_type)
        return {auto: name.rpartition(".")[2] for auto, name in custom_heads(self.auto_map).items()}

    @cached_property
    def config_class(self) -> type[PretrainedConfig]:
        """The class of the config.

        Raises:
            FamilyError: transformers does not know the model type, or the custom code has no such class.
        """
        from transformers import CONFIG_MAPPING

        if self.is_custom and "AutoConfig" in self.auto_map:
            return self._custom_class("AutoConfig")
        if not knows(self.model_type):
            raise FamilyError(
                f"transformers has no model type {self.model_type!r}; its code cannot be subclassed"
            )
        return CONFIG_MAPPING[self.model_type]

    @property
    def config_class_name(self) -> str:
        """The name of `config_class`. Raises FamilyError."""
        if self.is_custom:
            return self.config_class.__name__

        def learn() -> str:
            return stock_config_name(self.model_type) or self.config_class.__name__

        return remembered("config class", self.model_type, learn)

    @cached_property
    def shapes(self) -> StockShapes | None:
        """The stock model's tensors, where they are certain without importing transformers."""
        return None if self.is_custom else stock_shapes(_values(self.config))

    @cached_property
    def model_class(self) -> type[PreTrainedModel] | None:
        """The first class that config.json names and that exists; None if there is none."""
        import transformers

        for name in self.config.get("architectures") or ():
            if self.is_custom:
                auto = next((auto for auto, head in self.heads.items() if head == name), None)
                cls = auto and self._custom_class(auto)
            else:
                cls = getattr(transformers, name, None)
            if isinstance(cls, type):
                return cls
        return None

    @cached_property
    def head_classes(self) -> list[type[PreTrainedModel]]:
        """The classes of `heads`, each once. Raises FamilyError if custom code does not load."""
        import transformers

        if self.is_custom:
            return [self._custom_class(auto) for auto in self.heads]
        return [getattr(transformers, name) for name in dict.fromkeys(self.heads.values())]

    @cached_property
    def base(self) -> PreTrainedModel:
        """The model without its head, on the meta device. Raises FamilyError, as `build`."""
        from transformers import PreTrainedModel

        base = self.build().base_model
        assert isinstance(base, PreTrainedModel)
        return base

    def make_config(self) -> PretrainedConfig:
        """A new config object with the values of config.json. Raises FamilyError as `config_class`."""
        # A copy: configs of several models may take what they read out of the inner dictionaries.
        return self.config_class.from_dict(_values(self.config))

    def build(self, cls: type[PreTrainedModel] | None = None) -> PreTrainedModel:
        """The model on the meta device, which takes no memory.

        Args:
            cls: by default the class that AutoModel gives, the model without a head; where it gives none, the
                first head.

        Raises:
            FamilyError: there is no such model, or it cannot be built from this config.
        """
        import torch
        from transformers import AutoModel

        if cls is None and self.is_custom:
            cls = self._custom_class("AutoModel" if "AutoModel" in self.heads else next(iter(self.heads)))
        elif cls is None and "AutoModel" not in self.heads and self.head_classes:
            cls = self.head_classes[0]
        config_class = self.config_class
        try:
            with torch.device("meta"):
                if cls is not None and self.is_custom:  # its own config class may be another object than ours
                    own_config: type[PretrainedConfig] = cls.config_class or config_class
                    return cls(own_config.from_dict(_values(self.config)))
                config = config_class.from_dict(_values(self.config))
                return cls(config) if cls else AutoModel.from_config(config)
        except Exception as error:  # the model's code may raise anything
            who = f"the code in '{self.code}'" if self.is_custom else "transformers"
            raise FamilyError(
                f"{who} cannot build a {self.model_type} from this config.json ({type(error).__name__}: "
                f"{one_line(error)}), so what it computes is unknown; repair the config"
            ) from error

    def _custom_class(self, auto: str) -> type:
        """The custom class of that Auto class; runs the code. Raises FamilyError if it does not load."""
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        name = self.auto_map[auto]
        try:
            return get_class_from_dynamic_module(name, str(self.code))
        except Exception as error:  # custom code may raise anything
            raise FamilyError(
                f"the code in '{self.code}' does not give {auto}'s {name} "
                f"({type(error).__name__}: {one_line(error)}); install what it needs, or repair it"
            ) from error
