"""What `--option` and `--set` may name, and what values fit: told before anything is loaded."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from copy import deepcopy
from dataclasses import fields
from enum import Enum
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, get_type_hints

from ..artifact.loading import shapes_of
from ..errors import TrainingError, did_you_mean, few, one_line
from ..options import by_name, called, fits, type_in_words, types_of
from .request import Finetuning

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# What a model is, by the names that all configs know; from another value it would be another model.
_FIXED = {
    *("architectures", "auto_map", "model_type", "mpoe", "transformers_version", "is_encoder_decoder"),
    *("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "tie_word_embeddings"),
    "return_dict",  # by which training finds the loss
}
# What `from_pretrained` sets in a config under another name than config.json has.
_BESIDE = {"attn_implementation", "num_labels"}


def check_options(options: Mapping[str, Any], config: PretrainedConfig, model: str) -> dict[str, Any]:
    """The options of a model's config, with numbers as numbers.

    Args:
        options: name -> value, of `--option`.
        config: the model's.
        model: its name, for messages.

    Raises:
        TrainingError: the config has no such option, or the value does not fit; names the nearest.
    """
    known = {*config.to_dict(), *config.attribute_map, *_BESIDE}
    return {name: _checked(name, value, known, config, model) for name, value in options.items()}


def _checked(name: str, value: Any, known: Collection[str], config: PretrainedConfig, model: str) -> Any:
    shown = f"{_flag('options')} {name}"
    if name not in known:
        raise TrainingError(
            f"{shown}: the config of '{model}' has no such option{did_you_mean(str(name), known)}"
        )
    if config.attribute_map.get(name, name) in {config.attribute_map.get(each, each) for each in _FIXED}:
        raise TrainingError(
            f"{shown} is fixed: with another value '{model}' would be another model, or could not be "
            "trained; expected another option"
        )
    kind = _types(config).get(name)
    if kind is not None:
        value = _number(value) if float in types_of(kind) else value
        if not fits(value, kind):
            raise TrainingError(f"{shown} is {value!r}; expected {type_in_words(kind)}")
    elif name == "dtype":
        _check_dtype(shown, value)
    elif name not in _BESIDE:
        try:
            setattr(deepcopy(config), name, value)
        except Exception as error:  # configs check their fields, each in its own way
            raise TrainingError(f"{shown} is {value!r}: {one_line(error)}") from error
    return value


def check_weights_fit(
    options: Mapping[str, Any],
    config: PretrainedConfig,
    model: str,
    auto: Any,
    token: str | None,
    **trust: bool,
) -> None:
    """Check that a model takes all its weights under every option. Builds models without weights.

    Args:
        options: as `check_options` returns them.
        auto: the Auto class that loads the model.

    Raises:
        TrainingError: transformers builds no model with an option, or one of other tensors; names some.
    """
    own = shapes_of(auto, model, config, token, **trust) if options else {}
    for name, value in options.items():
        shown = f"{_flag('options')} {name} is {value!r}"
        try:
            made, beside = deepcopy(config), {}
            if name == "attn_implementation":
                beside = {name: value}
            else:
                setattr(made, name, value)
            found = shapes_of(auto, model, made, token, **trust, **beside)
        except Exception as error:  # whatever reads the value first
            raise TrainingError(
                f"{shown}, and transformers makes no model of it: {one_line(error)}"
            ) from error
        if lost := [tensor for tensor, shape in own.items() if found.get(tensor) != shape]:
            raise TrainingError(
                f"{shown}: that model has no place for {few(lost)} of '{model}', or another shape for them; "
                "expected an option that leaves the weights what they are"
            )
        if new := [tensor for tensor in found if tensor not in own]:
            raise TrainingError(
                f"{shown}: '{model}' lacks {few(new)} of that model; expected an option that leaves the "
                "weights what they are"
            )


def check_arguments(arguments: Mapping[str, Any], own: Mapping[str, str]) -> dict[str, Any]:
    """The fields of `transformers.TrainingArguments`, with numbers as numbers.

    Args:
        arguments: name -> value, of `--set`.
        own: {field: the option of a run that sets it}, fields that `--set` may not name.

    Raises:
        TrainingError: there is no such field, an option of a run sets it, or its value does not fit.
    """
    from transformers import TrainingArguments

    hints = get_type_hints(TrainingArguments)
    kinds = {each.name: hints[each.name] for each in fields(TrainingArguments) if each.init}
    found = {}
    for name, value in arguments.items():
        shown = f"{_flag('arguments')} {name}"
        if name not in kinds:
            meant = did_you_mean(str(name), kinds)
            raise TrainingError(f"{shown}: transformers.TrainingArguments has no such field{meant}")
        if name in own:
            raise TrainingError(f"{shown}: expected {own[name]}")
        found[name] = _argument(shown, value, kinds[name])
    return found


def check_schedule(schedule: str) -> None:
    """Raises TrainingError if transformers has no such scheduler."""
    from transformers import SchedulerType

    _one_of(called("schedule"), schedule, SchedulerType)


def check_trackers(names: Iterable[str]) -> None:
    """Raises TrainingError if transformers has no such experiment tracker."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK as KNOWN

    for name in names:
        if name not in {*KNOWN, "all", "none"}:
            meant = did_you_mean(name, KNOWN) or ", such as tensorboard or wandb"
            raise TrainingError(
                f"{called('report_to')} is {name!r}; expected a tracker that transformers has{meant}"
            )


def _flag(name: str) -> str:
    return called(by_name(Finetuning)[name])


def _argument(shown: str, value: Any, kind: Any) -> Any:
    """The value of a field; other types than numbers and words of a list are left to transformers."""
    kinds = set(types_of(kind))
    words = [each for each in kinds if isinstance(each, type) and issubclass(each, Enum)]
    if words and isinstance(value, str):
        _one_of(shown, value, words[0])
    if kinds <= {bool, int, float, NoneType}:
        value = _number(value) if float in kinds else value
        if not fits(value, kind):
            raise TrainingError(f"{shown} is {value!r}; expected {type_in_words(kind)}")
    return value


def _one_of(shown: str, value: str, words: type[Enum]) -> None:
    known = [str(each.value) for each in words]
    if value not in known:
        meant = did_you_mean(value, known) or f", such as {known[0]}"
        raise TrainingError(f"{shown} is {value!r}; expected one of transformers' {words.__name__}{meant}")


def _types(config: PretrainedConfig) -> dict[str, type | UnionType]:
    """Of the options that converted models have at the top level of their config."""
    from ..runtime.modeling_mpoe import CONFIG_OPTIONS

    is_converted = getattr(config, "mpoe", None) is not None
    return {option.name: option.type for option in CONFIG_OPTIONS} if is_converted else {}


def _number(value: Any) -> Any:
    """1e-4 without a dot is a text in YAML."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:  # another text, which the check of its type refuses
        return value


def _check_dtype(shown: str, value: Any) -> None:
    import torch

    if not isinstance(getattr(torch, str(value).removeprefix("torch."), None), torch.dtype):
        raise TrainingError(f"{shown} is {value!r}; expected float32, bfloat16 or float16")
