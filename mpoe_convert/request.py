"""Requests: the options of one command as a value, with those of the plug-in that it names.

A kind of expert or an export target declares its options as the request does (`options`). The request has the
options of all plug-ins as flat fields (`plugin_options`) and refuses those that the chosen one does not know.
"""

from __future__ import annotations

import dataclasses
import errno
import inspect
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, Field, field, make_dataclass
from functools import cached_property, reduce
from operator import or_
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from .errors import RecipeError, RequestError, did_you_mean, one_line
from .options import (
    OptionGroup,
    assigned,
    by_name,
    called,
    default_in_words,
    default_of,
    description,
    in_order,
)

AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])


class Request(OptionGroup):
    """The options of one command, as a value: made in Python, by the command line, or of a YAML file."""

    # What messages call it.
    NOUN: ClassVar[str] = "request"
    # Options that count as given wherever they are listed, also with the value of the default.
    MEANT: ClassVar[frozenset[str]] = frozenset()
    # The option that names a plug-in, and the options of every plug-in (see `plugin_options`).
    CHOOSER: ClassVar[str] = ""
    PLUGINS: ClassVar[Mapping[str, type[OptionGroup]]] = {}
    # The fields that were given, also with the value of the default; None, False and () give nothing.
    given: frozenset[str]

    def __new__(cls, *args: Any, **values: Any) -> Self:
        made = super().__new__(cls)
        positional = [each.name for each in in_order(cls) if not each.kw_only]
        object.__setattr__(made, "given", _given(dict(zip(positional, args, strict=False)) | values))
        return made

    def __post_init__(self) -> None:
        of_plugins = {name for plugin in self.PLUGINS.values() for name in by_name(plugin)}
        for name, each in by_name(type(self)).items():
            if name not in of_plugins:
                object.__setattr__(self, name, self._checked(each))
        self._refuse_options_of_other_plugins()
        if self.CHOOSER:
            for name in by_name(type(self.own_options)):
                object.__setattr__(self, name, getattr(self.own_options, name))
        self.check_together()

    @cached_property
    def own_options(self) -> Any:
        """The options of the plug-in that is chosen, as the plug-in declares and checks them."""
        cls = self.PLUGINS[getattr(self, self.CHOOSER)]
        return cls(**{name: getattr(self, name) for name in by_name(cls)})

    def _refuse_options_of_other_plugins(self) -> None:
        for each in in_order(type(self)):
            only = description(each).only
            chosen = getattr(self, self.CHOOSER) if only else None
            if chosen not in (None, *only) and getattr(self, each.name) != default_of(each):
                raise self.ERROR(
                    f"{called(each)} given with {assigned(self.CHOOSER, chosen)}; expected with "
                    f"{assigned(self.CHOOSER, *only)} only"
                )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """From the contents of a YAML file; None stands for the default.

        Raises:
            MpoeError: a name is unknown or given twice, or one that is needed is missing.
        """
        known = by_name(cls)
        values = {name: value for name, value in normalised(values, cls.NOUN).items() if value is not None}
        if unknown := sorted(set(values) - set(known)):
            meant = _meant(unknown[0], known) or "; its keys are the options that --help lists"
            raise cls.ERROR(f"the {cls.NOUN} has no key {unknown[0]!r}{meant}")
        for name, each in known.items():
            if default_of(each) is MISSING and not values.get(name):
                raise cls.ERROR(f"{called(each)} is missing from the {cls.NOUN}")
        return cls(**values)

    @classmethod
    def of(cls, given: Any) -> Self:
        """The request itself, or one of its first value alone: a model, an export's target, or None for none.

        Raises:
            MpoeError: it is neither, or the request needs more values.
        """
        if isinstance(given, cls):
            return given
        known = by_name(cls).values()
        needed = [each.name for each in known if default_of(each) is MISSING]
        first = next(each.name for each in known if not each.kw_only)
        if given is None and not needed:
            return cls()
        if isinstance(given, (str, PathLike)) and set(needed) <= {first}:
            return cls(**{first: given})
        usage = f"{cls.__name__}({', '.join(f'{name}=...' for name in needed or [first])})"
        raise cls.ERROR(f"the {cls.NOUN} is {one_line(repr(given), 60)}; expected {usage}")

    def replace(self, **changes: Any) -> Self:
        """A copy with other values, checked again; of them alone it counts as given what was not before."""
        made = object.__new__(type(self))
        object.__setattr__(made, "given", (self.given - changes.keys()) | _given(changes))
        made.__init__(**{name: getattr(self, name) for name in by_name(type(self))} | changes)
        return made

    def read_from_file(self, names: Collection[str]) -> Self:
        """A copy in which those of these values that equal the default do not count as given.

        The files that conversions write list every option. Those of `MEANT` count all the same.
        """
        known = by_name(type(self))
        listed = (self.given & set(names)) - self.MEANT
        same = {name for name in listed if getattr(self, name) == default_of(known[name])}
        made = self.replace()
        object.__setattr__(made, "given", self.given - same)
        return made

    def to_mapping(self) -> dict[str, Any]:
        """Plain values, as a YAML file holds them."""
        values = {each.name: getattr(self, each.name) for each in in_order(type(self))}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _given(values: Mapping[str, Any]) -> frozenset[str]:
    """The names of values that say something."""
    said = {name for name, value in values.items() if value is not None and value is not False}
    return frozenset(
        name for name in said if not (isinstance(values[name], (tuple, list)) and not values[name])
    )


def plugin_options(chooser: str, common: type[OptionGroup], plugins: Mapping[str, type[OptionGroup]]) -> Any:
    """A base class for the request whose option `chooser` names a plug-in: it has the options of all of them.

    An option that only some plug-ins declare is refused with the others. One that several describe
    differently has all their words in its help.

    Args:
        common: what every plug-in's options inherit from.

    Raises:
        TypeError: two plug-ins give the same option different defaults.
    """
    made = []
    for name in dict.fromkeys(name for cls in (common, *plugins.values()) for name in by_name(cls)):
        declared = {plugin: by_name(cls)[name] for plugin, cls in plugins.items() if name in by_name(cls)}
        made.append(_merged(name, by_name(common).get(name), declared, len(plugins), chooser))
    namespace = {"CHOOSER": chooser, "PLUGINS": plugins}
    return make_dataclass(
        "PluginOptions", made, namespace=namespace, frozen=True, init=False, repr=False, eq=False
    )


def _merged(
    name: str, common: Field | None, declared: Mapping[str, Field], num_plugins: int, chooser: str
) -> tuple[str, Any, Any]:
    """(name, type, field) of an option as several plug-ins declare it."""
    first, *others = declared.values()
    if any(default_of(other) != default_of(first) for other in others):
        raise TypeError(f"the defaults of {name} differ between {', '.join(declared)}; expected one for all")
    only = tuple(declared) if len(declared) < num_plugins else ()
    shared = None if common is None else description(common).help
    own = {plugin: description(each).help for plugin, each in declared.items()}
    if len(set(own.values())) == 1:
        shared, own = own[next(iter(own))], {}
    text = _in_all_words(shared, own)
    if only:
        text = f"{text} Only with --{chooser} {' or '.join(only)}."
    about = dataclasses.replace(description(common or first), help=text, only=only)
    if about.default_text is not None:
        about = dataclasses.replace(about, default_text=default_in_words(first))
    hint = reduce(or_, (each.type for each in declared.values()))
    made = field(
        default=first.default, default_factory=first.default_factory, metadata={"option": about}, kw_only=True
    )
    return name, hint, made


def _in_all_words(shared: str | None, own: Mapping[str, str]) -> str:
    """What all plug-ins say, and after it what some say in words of their own: "a, b: ...; c: ..."."""
    plugins: dict[str, list[str]] = {}
    for plugin, text in own.items():
        if text != shared:
            plugins.setdefault(f"{text[0].lower()}{text[1:].rstrip('.')}", []).append(plugin)
    words = "; ".join(f"{', '.join(names)}: {text}" for text, names in plugins.items())
    return " ".join(filter(None, [shared, words and f"{words}."]))


def takes_options(cls: type[Request]) -> Callable[[AnyFunction], AnyFunction]:
    """For a function with `**options`, the fields of a request: they stand in its signature one by one."""

    def decorate(function: AnyFunction) -> AnyFunction:
        signature = inspect.signature(function)
        own = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
        taken = [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=default_of(each), annotation=each.type
            )
            for name, each in by_name(cls).items()
            if name not in signature.parameters
        ]
        function.__signature__ = signature.replace(parameters=[*own, *taken])  # type: ignore[attr-defined]
        return function

    return decorate


# ---------------------------------------------------------------------------------------------------
# Arguments that are no options


def as_path(name: str, given: Any) -> Path:
    """A path that was given as text or as a path. Raises RequestError."""
    return Path(as_text(name, given))


def as_text(name: str, given: Any) -> str:
    """The same as text, where "./model" is a path and "model" may be a Hub id; "~" is the user's home.

    Raises:
        RequestError: it is something else, or a name that no file can have.
    """
    if not isinstance(given, (str, PathLike)) or not str(given).strip() or "\0" in str(given):
        raise RequestError(f"{called(name)} is {one_line(repr(given), 60)}; expected a path")
    text = os.path.expanduser(given)
    try:
        os.lstat(text)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise RequestError(f"{called(name)} is {one_line(repr(given), 60)}, too long a name") from error
    return text


def check_function(name: str, given: Any, arguments: str) -> None:
    """Check that something can be called while work goes on, or is None. Raises RequestError."""
    if given is not None and not callable(given):
        raise RequestError(
            f"{called(name)} is {one_line(repr(given), 60)}; expected a function, called as "
            f"{name}({arguments})"
        )


def check_token(token: Any) -> None:
    """Check what is to be sent as a Hub token. Raises RequestError, which does not show it."""
    if token is None or (isinstance(token, str) and re.fullmatch(r"[!-~]+", token)):
        return
    what = "text with blanks or empty" if isinstance(token, str) else f"of type {type(token).__name__}"
    raise RequestError(
        f"{called('token')} is {what}; expected a Hub token, as hf_..., or none for HF_TOKEN or the stored "
        "login"
    )


# ---------------------------------------------------------------------------------------------------
# YAML files


def _meant(key: str, known: Mapping[str, Field]) -> str:
    """The end of a message about an unknown key: the one of that option, or one that is like it."""
    flags = {description(each).flag: name for name, each in known.items()}
    name = flags.get(f"--{key.replace('_', '-')}")
    return did_you_mean(key, known) if name is None else f"; the key of --{key} is {name!r}"


def normalised(values: Mapping[str, Any], noun: str = Request.NOUN) -> dict[str, Any]:
    """The same values under the names of fields: "bond-dim" -> "bond_dim".

    Raises:
        RecipeError: a name is given twice, in two spellings.
    """
    key2value, spelled = {}, {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name in key2value:
            raise RecipeError(f"the {noun} gives {name} twice, as {spelled[name]!r} and {key!r}; keep one")
        key2value[name], spelled[name] = value, key
    return key2value


def read_recipe(path: str | Path, noun: str = "recipe") -> dict[str, Any]:
    """The mapping in a YAML file; messages call it by the noun.

    Raises:
        RecipeError: the file cannot be read or does not hold a mapping.
    """
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise RecipeError(f"cannot read the {noun} '{path}': {reason}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"the {noun} '{path}' holds no lines of the form `name: value`")
    return values
