"""What `--option` and `--set` may name, and what values fit: told before anything is loaded."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from copy import deepcopy
from dataclasses import MISSING, fields
from types import UnionType
from typing import TYPE_CHECKING, Any, get_args, get_origin

from ..errors import TrainingError, nearest, one_line
from ..options import by_name, called
from .request import Finetuning

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# What a model is; from another value it would be another model.
_FIXED = {"architectures", "auto_map", "model_type", "mpoe", "transformers_version"}
# What `from_pretrained` sets in a config under another name than config.json has.
_BESIDE = {"attn_implementation", "num_labels"}
_OPTIONS, _ARGUMENTS = (by_name(Finetuning)[name] for name in ("options", "arguments"))


def check_options(options: Mapping[str, Any], config: PretrainedConfig, model: str) -> dict[str, Any]:
    """The options of a model's config, with numbers as numbers.

    Args:
        options: name -> value, of `--option`.
        config: the model's.
        model: its name, for messages.

    Raises:
        TrainingError: the config has no such option, or the value does not fit; names the nearest.
    """
    known = {*config.to_dict(), *config.attribute_map, *_BESIDE} - _FIXED
    return {name: _checked(name, value, known, config, model) for name, value in options.items()}


def _checked(name: str, value: Any, known: Collection[str], config: PretrainedConfig, model: str) -> Any:
    if name not in known:
        raise TrainingError(
            f"{called(_OPTIONS)} {name}: the config of {model} has no such option{_nearest(name, known)}"
        )
    kind = _types(config).get(name)
    if kind is not None:
        value = _number(value) if float in _members(kind) else value
        if not _fits(value, kind):
            raise TrainingError(f"{called(_OPTIONS)} {name} is {value!r}; expected {_in_words(kind)}")
    elif name == "dtype":
        _check_dtype(value)
    elif name not in _BESIDE:
        try:
            setattr(deepcopy(config), name, value)
        except Exception as error:  # configs check their fields, each in its own way
            raise TrainingError(f"{called(_OPTIONS)} {name} is {value!r}: {one_line(error)}") from error
    return value


def check_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `transformers.TrainingArguments`, with numbers as numbers.

    Args:
        arguments: name -> value, of `--set`.

    Raises:
        TrainingError: there is no such field, or its value is no number where one is expected; names the
            nearest.
    """
    from transformers import TrainingArguments

    defaults = {each.name: each.default for each in fields(TrainingArguments) if each.init}
    if "output_dir" in arguments:
        raise TrainingError(f"{called(_ARGUMENTS)} output_dir: expected {called('output')}")
    found = {}
    for name, value in arguments.items():
        if name not in defaults:
            known = _nearest(name, defaults)
            raise TrainingError(
                f"{called(_ARGUMENTS)} {name}: transformers.TrainingArguments has no such field{known}"
            )
        default = defaults[name]
        kind = type(default)
        if default is not MISSING and kind in (bool, int, float):
            value = value if kind is bool else _number(value)
            if not _fits(value, bool if kind is bool else float):
                raise TrainingError(f"{called(_ARGUMENTS)} {name} is {value!r}; expected {_in_words(kind)}")
        found[name] = value
    return found


def _nearest(name: object, known: Iterable[str]) -> str:
    """The end of a message about an unknown name."""
    found = nearest(str(name), sorted(known), alike=0.0)
    return f"; nearest is {found}" if found else ""


def _types(config: PretrainedConfig) -> dict[str, type | UnionType]:
    """Of the options that converted models have at the top level of their config."""
    from ..runtime.modeling_mpoe import CONFIG_OPTIONS

    is_converted = getattr(config, "mpoe", None) is not None
    return {option.name: option.type for option in CONFIG_OPTIONS} if is_converted else {}


def _members(kind: Any) -> tuple:
    return get_args(kind) if isinstance(kind, UnionType) else (kind,)


def _fits(value: Any, kind: Any) -> bool:
    for member in _members(kind):
        origin = get_origin(member) or member
        accepted = (int, float) if origin is float else origin
        if isinstance(value, accepted) and (origin is bool or not isinstance(value, bool)):
            return True
    return False


def _in_words(kind: Any) -> str:
    words = {bool: "true or false", int: "a number", float: "a number", str: "a text", list: "a list"}
    found = (words.get(get_origin(member) or member, "null") for member in _members(kind))
    return " or ".join(found)


def _number(value: Any) -> Any:
    """1e-4 without a dot is a text in YAML."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass
    return value


def _check_dtype(value: Any) -> None:
    import torch

    if not isinstance(getattr(torch, str(value).removeprefix("torch."), None), torch.dtype):
        raise TrainingError(f"{called(_OPTIONS)} dtype is {value!r}; expected float32, bfloat16 or float16")
