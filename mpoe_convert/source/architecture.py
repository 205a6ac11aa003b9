"""The classes of a model: those of transformers, or those of the code that came with its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import FamilyError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def main_auto_class(config: dict, model_type: str) -> str:
    """The Auto class that loads the head which the source was saved with; AutoModel if none does."""
    own = own_heads(config.get("auto_map") or {})
    known = {auto: name.rpartition(".")[2] for auto, name in own.items()} or heads(model_type)
    architecture = next(iter(config.get("architectures") or ()), None)
    matching = [auto for auto, stock in known.items() if stock == architecture]
    return min(matching, key=_preference, default="AutoModel")


def _preference(auto: str) -> tuple[int, str]:
    """Sort key of the Auto classes that load one head: BART's, for example, is in three."""
    first = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM", "AutoModel")
    if auto in first:
        return first.index(auto), auto
    return len(first) + (auto == "AutoModelForPreTraining"), auto


def knows(model_type: str) -> bool:
    """Whether the installed transformers has this model type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return model_type in CONFIG_MAPPING_NAMES


def heads(model_type: str) -> dict[str, str]:
    """Auto class -> stock class name, for every Auto class that has a head on this very model type."""
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


def own_heads(auto_map: Mapping) -> dict[str, str]:
    """Auto class -> "module.Class", of the models among the entries of an auto_map."""
    return {auto: name for auto, name in auto_map.items() if auto.startswith("AutoModel")}


@dataclass(frozen=True)
class Architecture:
    """What a dense model is built from.

    Attributes:
        config: its config.json; an auto_map in it names files in `code`.
        code: folder of the code of its own, if that may run.
    """

    config: dict = field(repr=False)
    code: Path | None = None

    @property
    def model_type(self) -> str:
        return self.config["model_type"]

    @property
    def auto_map(self) -> dict:
        """Auto class -> "module.Class" in `code`, of models, config, tokenizer and processors."""
        return self.config.get("auto_map") or {} if self.code else {}

    @property
    def is_own(self) -> bool:
        """Whether the model's classes are its own: those alone, no stock heads beside them."""
        return bool(own_heads(self.auto_map))

    @property
    def heads(self) -> dict[str, str]:
        """Auto class -> class name."""
        if not self.is_own:
            return heads(self.model_type)
        return {auto: name.rpartition(".")[2] for auto, name in own_heads(self.auto_map).items()}

    @cached_property
    def config_class(self) -> type[PretrainedConfig]:
        """Raises FamilyError if there is none."""
        from transformers import CONFIG_MAPPING

        if self.is_own and "AutoConfig" in self.auto_map:
            return self._own_class("AutoConfig")
        if not knows(self.model_type):
            raise FamilyError(
                f"transformers has no model type {self.model_type!r}; its code cannot be subclassed"
            )
        return CONFIG_MAPPING[self.model_type]

    @cached_property
    def model_class(self) -> type[PreTrainedModel] | None:
        """The class that the config names first, if it can be had."""
        import transformers

        for name in self.config.get("architectures") or ():
            if self.is_own:
                auto = next((auto for auto, head in self.heads.items() if head == name), None)
                cls = auto and self._own_class(auto)
            else:
                cls = getattr(transformers, name, None)
            if isinstance(cls, type):
                return cls
        return None

    @cached_property
    def base(self) -> PreTrainedModel:
        """The model without its head, on the meta device. Raises FamilyError, as `build`."""
        return self.build().base_model

    def make_config(self) -> PretrainedConfig:
        return self.config_class.from_dict(dict(self.config))

    def build(self, cls: type[PreTrainedModel] | None = None) -> PreTrainedModel:
        """The model on the meta device, without memory; by default AutoModel's class.

        Raises:
            FamilyError: there is no such model, or it cannot be built from this config.
        """
        import torch
        from transformers import AutoModel

        if cls is None and self.is_own:
            cls = self._own_class("AutoModel" if "AutoModel" in self.heads else next(iter(self.heads)))
        config_class = self.config_class
        try:
            with torch.device("meta"):
                if self.is_own:  # loaded file by file: its class of the config is another object than ours
                    return cls(cls.config_class.from_dict(dict(self.config)))
                config = config_class.from_dict(self.config)
                return cls(config) if cls else AutoModel.from_config(config)
        except Exception as error:  # whatever the model's code thinks of this config
            who = f"the code in {self.code}" if self.is_own else "transformers"
            raise FamilyError(
                f"{who} cannot build a {self.model_type} from this config.json "
                f"({type(error).__name__}: {error}), so what it computes cannot be told; repair the config"
            ) from error

    def _own_class(self, auto: str) -> type:
        """Runs the code."""
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        name = self.auto_map[auto]
        try:
            return get_class_from_dynamic_module(name, str(self.code))
        except Exception as error:  # whatever goes wrong in there
            raise FamilyError(
                f"the code in {self.code} does not give {auto}'s {name} ({type(error).__name__}: {error}); "
                "install what it needs, or repair it"
            ) from error
