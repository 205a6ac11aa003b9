"""Options: each is described once, where its field is declared.

Help, heading, choices, range and default stand in the field; the command line, the keys of YAML files,
`--help`, docstrings and the checks of values are made of it.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import MISSING, Field, dataclass, field, fields
from numbers import Integral, Real
from os import PathLike
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, ClassVar, Union, dataclass_transform, get_args, get_origin

from .errors import MpoeError, RecipeError, did_you_mean

# The largest count of anything: the libraries below keep counts in 32 bits.
LARGEST_COUNT = 2**31 - 1

if TYPE_CHECKING:
    # Fields whose constructor takes more than they hold: type checkers read what `__set__` takes.
    class Text:
        """Text; also a path."""

        def __get__(self, instance: object, owner: Any) -> str: ...
        def __set__(self, instance: object, value: str | PathLike[str]) -> None: ...

    class OptionalText:
        """Text, or a path; or nothing."""

        def __get__(self, instance: object, owner: Any) -> str | None: ...
        def __set__(self, instance: object, value: str | PathLike[str] | None) -> None: ...

    class Texts:
        """Texts; also one alone, or a list, and paths."""

        def __get__(self, instance: object, owner: Any) -> tuple[str, ...]: ...
        def __set__(
            self, instance: object, value: str | PathLike[str] | Sequence[str | PathLike[str]]
        ) -> None: ...

    class Numbers:
        """One whole number, or several; also as text, separated by commas. Or one per expert, as text."""

        def __get__(self, instance: object, owner: Any) -> int | tuple[int, ...] | str: ...
        def __set__(self, instance: object, value: int | str | Sequence[int]) -> None: ...
else:
    Text, OptionalText, Texts, Numbers = str, str | None, tuple[str, ...], int | tuple[int, ...] | str


@dataclass(frozen=True)
class Description:
    """What a field says of its option beside its type and its default.

    Attributes:
        help: one sentence or two.
        group: the heading in `--help`.
        choices: what it may be, or, of a list, what may be in it.
        at_least / above / at_most / below: range of a number, or of the numbers in a list; a number needs
            both ends, `math.inf` for one that may be anything finite.
        valid: whether a value of the right type is a good one; `expected` says in words which are.
        such_as: a good value, for messages.
        item: what a list holds, for messages.
        read: turns what was given into a value of the type; raises in words of its own.
        metavar: the value in `--help`.
        flag: the option's name on the command line, if it is not that of the field.
        default_text: the default in words, where the field says None.
        only: the plug-ins that declare it; empty: all do.
    """

    help: str
    group: str = "General"
    choices: tuple[str, ...] = ()
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    valid: Callable[[Any], bool] | None = None
    expected: str | None = None
    such_as: object = None
    item: str = "text"
    read: Callable[[Any], Any] | None = None
    metavar: str | None = None
    flag: str | None = None
    default_text: str | Callable[[], str] | None = None
    only: tuple[str, ...] = ()


def option(*, default: Any = MISSING, help: str = "", kw_only: bool = True, **description: Any) -> Any:
    """A dataclass field that is an option. Type checkers read `default` and `kw_only` where it is called.

    Args:
        default: a class, such as `dict`, makes a new one every time; none: the option has to be given.
        description: the fields of `Description`.
    """
    metadata = {"option": Description(help, **description)}
    if isinstance(default, type):
        return field(default_factory=default, kw_only=kw_only, metadata=metadata)
    return field(default=default, kw_only=kw_only, metadata=metadata)


def again(cls: type, name: str, help: str, **changes: Any) -> Any:
    """An option of a base class, declared again in other words."""
    each = by_name(cls)[name]
    about = dataclasses.replace(description(each), help=help, **changes)
    return option(default=default_of(each), kw_only=each.kw_only is True, **vars(about))


def description(each: Field) -> Description:
    """What a field of a class of options says of its option."""
    return each.metadata["option"]


def by_name(cls: Any) -> dict[str, Field]:
    """The fields of a class by their names."""
    return {each.name: each for each in fields(cls)}


def default_of(each: Field) -> Any:
    """The default of a field, MISSING if it has none."""
    return each.default if each.default_factory is MISSING else each.default_factory()


def default_in_words(each: Field) -> str | None:
    """The default as help says it; None if there is nothing to say."""
    text, default = description(each).default_text, default_of(each)
    if text is not None:
        return text if isinstance(text, str) else text()
    nothing = default is MISSING or default is None or isinstance(default, bool) or default in ((), {})
    return None if nothing else str(default)


# ---------------------------------------------------------------------------------------------------
# Names in messages


_BY_FLAG: ContextVar[bool] = ContextVar("_BY_FLAG", default=False)


@contextmanager
def named_by_flags() -> Iterator[None]:
    """Messages inside the block call options as the command line does."""
    before = _BY_FLAG.set(True)
    try:
        yield
    finally:
        _BY_FLAG.reset(before)


def called(name: str | Field) -> str:
    """The name of a field in messages: "bond_dim" from Python, "--bond-dim" on the command line."""
    each, name = (None, name) if isinstance(name, str) else (name, name.name)
    if not _BY_FLAG.get():
        return name
    return (each and description(each).flag) or f"--{name.replace('_', '-')}"


def assigned(name: str, *values: object) -> str:
    """An option with a value, or with one of several: "kind='mpo'"; "--kind mpo" on the command line."""
    if _BY_FLAG.get():
        return f"{called(name)} {' or '.join(map(str, values))}"
    return f"{name}={' or '.join(map(repr, values))}"


def switched(name: str) -> str:
    """An option that is switched on: "overwrite=True"; "--overwrite" on the command line."""
    return called(name) if _BY_FLAG.get() else f"{name}=True"


def switched_off(name: str) -> str:
    """An option that is switched off: "check=False"; "--no-check" on the command line."""
    return called(f"no_{name}") if _BY_FLAG.get() else f"{name}=False"


# ---------------------------------------------------------------------------------------------------
# Classes of options


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(option,))
def described(cls: type) -> Any:
    """A frozen dataclass of options; its docstring lists them, its fields know their types as objects.

    Raises:
        TypeError: a field is no option, has no help, or is a number without a range.
    """
    hints = inspect.get_annotations(cls, eval_str=True)
    made = dataclass(frozen=True, repr=False)(cls)
    for each in fields(made):
        each.type = hints.get(each.name, each.type)
        if "option" not in each.metadata or not description(each).help:
            raise TypeError(f"{each.name} says nothing of itself; expected option(default=..., help=...)")
        if not _has_range(each):
            raise TypeError(f"{each.name} has no range; expected both ends, math.inf where there is none")
    listed = "".join(f"\n    {each.name}: {_for_python(made, each)}" for each in in_order(made))
    intro, raises, errors = inspect.cleandoc(made.__doc__ or "").partition("\n\nRaises:")
    listed = f"\n\nAttributes:{listed}" if listed else ""
    made.__doc__ = f"{intro}{listed}{raises}{errors}\n"
    return made


def _has_range(each: Field) -> bool:
    """Whether a number says how small and how large it may be."""
    members = {hint for member in types_of(each.type) for hint in (member, *get_args(member))}
    about = description(each)
    ends = (about.at_least, about.above), (about.at_most, about.below)
    return not members & {int, float} or all(end != (None, None) for end in ends)


def in_order(cls: Any) -> list[Field]:
    """The fields of a class: first those that its own body declares, then what it inherits."""
    own = inspect.get_annotations(cls)
    return sorted(fields(cls), key=lambda each: each.name not in own)


def _for_python(cls: type, each: Field) -> str:
    """Its help, with other options under the names that they have in Python."""
    names = by_name(cls)

    def name_in_python(match: re.Match) -> str:
        name = match[1].replace("-", "_")
        return f"`{name}`" if name in names else match[0]

    about = description(each)
    text = about.help + (f" Default: {about.default_text}." if isinstance(about.default_text, str) else "")
    return re.sub(r"--([a-z][a-z-]*[a-z])", name_in_python, text)


# ---------------------------------------------------------------------------------------------------
# Checking values


class OptionGroup:
    """Options that are checked when they are put together: subclasses are `described`."""

    ERROR: ClassVar[type[MpoeError]] = RecipeError

    def __post_init__(self) -> None:
        for name, each in by_name(type(self)).items():
            object.__setattr__(self, name, self._checked(each))
        self.check_together()

    def check_together(self) -> None:
        """The rules between options. Raises `ERROR`."""

    def __repr__(self) -> str:
        """What differs from the defaults."""
        given = [
            f"{each.name}={getattr(self, each.name)!r}"
            for each in in_order(type(self))
            if getattr(self, each.name) != default_of(each)
        ]
        return f"{type(self).__name__}({', '.join(given)})"

    def _checked(self, each: Field) -> Any:
        """The value of a field in its type. Raises `ERROR`: it has another one, or is out of range."""
        about, given = description(each), getattr(self, each.name)
        value = _read(each, given)
        is_right = any(_fits(value, member, about) for member in types_of(each.type))
        if not is_right or (value == () and default_of(each) is MISSING):
            raise self.ERROR(f"{called(each)} is {given!r}; expected {_expected(each, given)}")
        return value


def in_home(given: Any) -> Any:
    """A name, or each of a list, with the user's home for a "~" at its beginning; anything else as it is."""
    if isinstance(given, (list, tuple)):
        return type(given)(map(in_home, given))
    return os.path.expanduser(given) if isinstance(given, str) else _plain(given)


def types_of(hint: Any) -> tuple:
    """The types of a union, or the one type."""
    return get_args(hint) if isinstance(hint, UnionType) or get_origin(hint) is Union else (hint,)


def _read(each: Field, value: Any) -> Any:
    """Paths as text, one value of a list as a list, other libraries' numbers as Python's; or as described."""
    members, about = types_of(each.type), description(each)
    is_list = any(get_origin(member) is tuple for member in members)
    if value is not None and about.read:
        value = about.read(_plain(value))
    if isinstance(value, (list, tuple)) and is_list:
        return tuple(map(_plain, value))
    value = _plain(value)
    return (value,) if isinstance(value, str) and is_list and str not in members else value


def _plain(value: Any) -> Any:
    """A path as text, a number of NumPy as one of Python; anything else as it is."""
    if isinstance(value, PathLike):
        return str(value)
    if isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def _fits(value: Any, hint: Any, about: Description) -> bool:
    if hint is Any or hint is NoneType:
        return hint is Any or value is None
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_fits(item, get_args(hint)[0], about) for item in value)
    types = (int, float) if hint is float else get_origin(hint) or hint
    if not isinstance(value, types) or (isinstance(value, bool) and hint is not bool):
        return False
    if isinstance(value, str) and (not value.strip() or "\0" in value):
        return False
    if about.choices and value not in about.choices:
        return False
    if isinstance(value, (int, float)) and not (_is_finite(value) and _in_range(value, about)):
        return False
    return about.valid is None or about.valid(value)


def _is_finite(value: float) -> bool:
    return isinstance(value, int) or math.isfinite(value)  # huge integers are no floats


def _in_range(value: float, about: Description) -> bool:
    return (
        (about.at_least is None or value >= about.at_least)
        and (about.above is None or value > about.above)
        and (about.at_most is None or value <= about.at_most)
        and (about.below is None or value < about.below)
    )


def _expected(each: Field, given: Any) -> str:
    """What a field may be, in words; for a choice also what may have been meant."""
    about = description(each)
    if about.expected:
        return about.expected
    members = [member for member in types_of(each.type) if member is not NoneType]
    is_list = get_origin(members[0]) is tuple
    if about.choices:
        words = f"{'some' if is_list else 'one'} of {', '.join(about.choices)}"
        items = given if isinstance(given, (list, tuple)) else (given,)
        wrong = [item for item in items if isinstance(item, str) and item not in about.choices]
        return words + (did_you_mean(wrong[0], about.choices) if wrong else "")
    if is_list:
        return f"a {about.item} or a list of {about.item}s"
    noun = type_in_words(members[0])
    if members[0] is str and isinstance(given, str):  # an empty one
        noun = f"some {noun}"
    elif members[0] is str and isinstance(given, (bool, int, float)):
        noun += " (quote it in a YAML file)"
    such_as = "" if about.such_as is None else f", such as {about.such_as}"
    return f"{noun}{_range_in_words(about, given)}{such_as}"


def _range_in_words(about: Description, given: Any) -> str:
    """The range; that of a count ends at a number that is said only to who is beyond it."""
    is_beyond = isinstance(given, int) and given > LARGEST_COUNT
    at_most = None if about.at_most in (math.inf, None if is_beyond else LARGEST_COUNT) else about.at_most
    if about.at_least is not None and at_most is not None:
        return f" from {_number(about.at_least)} to {_number(at_most)}"
    limits = {"of at least": about.at_least, "above": about.above, "of at most": at_most}
    limits["below"] = about.below
    parts = [f"{words} {_number(limit)}" for words, limit in limits.items() if limit is not None]
    return f" {' and '.join(parts)}" if parts else ""


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a type; a number has to be finite, and truth is none."""
    for member in types_of(kind):
        origin = get_origin(member) or member
        if isinstance(value, bool):
            found = origin is bool
        elif origin is float:
            found = isinstance(value, int | float) and abs(value) <= sys.float_info.max
        elif isinstance(value, list):
            found = origin is list and all(fits(each, k) for k in get_args(member) for each in value)
        else:
            found = isinstance(value, origin)
        if found:
            return True
    return False


_TYPE_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    list[str]: "a list of texts",
    dict: "names and values, as {name: value}",
    NoneType: "null",
}


def type_in_words(kind: Any) -> str:
    """What a value of a type, or of one of several, is, for messages; other types by their Python names."""
    members = (member if member in _TYPE_WORDS else get_origin(member) or member for member in types_of(kind))
    return " or ".join(_TYPE_WORDS.get(member) or member.__name__ for member in members)
