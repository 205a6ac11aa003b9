"""Click options made of the fields of a request, listed by `--help` under headings."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, Field
from types import NoneType
from typing import Any, TypeVar, get_origin

import click

from ..errors import nearest, one_line
from ..options import by_name, default_in_words, default_of, description, in_order, types_of
from ..request import Request, normalised, read_recipe

AnyRequest = TypeVar("AnyRequest", bound=Request)
Decorator = Callable[[Callable], Callable]

# Headings in this order, then all others as they come, General last.
FIRST = (
    "Output",
    "Hub",
    "Source",
    "Target",
    "Data",
    "Experts",
    "Decomposition",
    "Compression",
    "Calibration",
)
LAST = "General"
TYPES = {int: click.INT, float: click.FLOAT}


class Choice(click.Choice):
    """A choice that knows what was meant."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as error:
            meant = nearest(str(value), self.choices)
            self.fail(f"{error.message} Did you mean {meant!r}?" if meant else error.message, param, ctx)


class GroupedOption(click.Option):
    """An option that `--help` lists under a heading."""

    def __init__(self, *args: Any, heading: str = LAST, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.heading = heading


class GroupedCommand(click.Command):
    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        format_options_by_heading(self, ctx, formatter)


def format_options_by_heading(
    command: click.Command, ctx: click.Context, formatter: click.HelpFormatter
) -> None:
    """Write one definition list per heading."""
    headings: dict[str, list] = {heading: [] for heading in FIRST}
    for param in command.get_params(ctx):
        record = None if isinstance(param, click.Argument) else param.get_help_record(ctx)
        if record:
            headings.setdefault(getattr(param, "heading", LAST), []).append(record)
    headings[LAST] = headings.pop(LAST, [])
    for heading, records in headings.items():
        if records:
            with formatter.section(heading):
                formatter.write_dl(records)


def option(*names: str, heading: str, help: str, **kwargs: Any) -> Decorator:
    """An option that is no field of a request."""
    return click.option(*names, cls=GroupedOption, heading=heading, help=help, **kwargs)


def add(*options: Decorator) -> Decorator:
    """One decorator out of several options, listed by --help in this order."""

    def decorate(function: Callable) -> Callable:
        for each in reversed(options):
            function = each(function)
        return function

    return decorate


# ---------------------------------------------------------------------------------------------------
# Of a request


def options_of(request: type[Request], *, skip: Collection[str] = (), from_file: bool = False) -> Decorator:
    """The options of a request. None or () means "not given": a YAML file, then the field's default, decides.

    Args:
        skip: fields that are arguments of the command.
        from_file: a YAML file may give what has no default.
    """
    return add(*(_option(each, from_file) for each in in_order(request) if each.name not in skip))


def _option(each: Field, from_file: bool) -> Decorator:
    about, default = description(each), default_in_words(each)
    flag = about.flag or f"--{each.name.replace('_', '-')}"
    kinds = [member for member in types_of(each.type) if member is not NoneType]
    kind = kinds[0] if len(kinds) == 1 else str
    origin = get_origin(kind) or kind
    settings: dict[str, Any] = {"metavar": about.metavar}
    if kind is bool:
        settings = {"is_flag": True, "default": None}
        flag += f"/--no-{flag[2:]}" if default_of(each) else ""
    elif issubclass(origin, Mapping):
        settings = {"multiple": True, "metavar": "NAME=VALUE", "callback": _assignments}
    else:
        settings["multiple"] = origin is tuple
        settings["type"] = Choice(tuple(about.choices)) if about.choices else TYPES.get(kind)
    return option(
        flag,
        each.name,
        heading=about.group,
        help=about.help + (f"  [default: {default}]" if default else ""),
        required=default_of(each) is MISSING and not from_file,
        **settings,
    )


def _assignments(ctx: click.Context, param: click.Parameter, texts: tuple[str, ...]) -> dict[str, Any]:
    """{"name": value} of "name=value"; values are read as YAML. Raises BadParameter for other texts."""
    import yaml

    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise click.BadParameter(f"{text!r}; expected NAME=VALUE")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise click.BadParameter(f"{text!r}; its value is not YAML ({one_line(error)})") from None
    return found


def request_of(
    cls: type[AnyRequest], options: Mapping[str, Any], config: str | None = None, model: str | None = None
) -> tuple[AnyRequest, str | None]:
    """(request, output) of a YAML file, overridden by what the command line gives."""
    values = normalised(read_recipe(config, cls.NOUN), cls.NOUN) if config else {}
    output = values.pop("output", None)
    given = {name: value for name, value in options.items() if value not in (None, (), {})}
    for name, value in given.items():
        if isinstance(value, dict) and isinstance(values.get(name), dict):
            given[name] = values[name] | value
    if model is not None:
        if values.get("model") not in (None, model):
            values.pop("revision", None)  # the file's commit belongs to the file's model
        given["model"] = model
    if "model" in by_name(cls) and not (values | given).get("model"):
        raise click.UsageError("Missing argument 'MODEL'.")
    return cls.from_mapping(values | given).read_from_file(values.keys() - given.keys()), output


# ---------------------------------------------------------------------------------------------------
# Of several commands


def token_option(heading: str) -> Decorator:
    return option(
        "--token", heading=heading, envvar="HF_TOKEN", help="Hub token; by default the stored login."
    )


def output_option(**settings: Any) -> Decorator:
    return option("-o", "--output", heading="Output", type=click.Path(), help="Folder to write.", **settings)


def config_option(heading: str) -> Decorator:
    return option(
        "--config",
        heading=heading,
        type=click.Path(dir_okay=False),
        help="YAML file with these options and the output; the command line overrides it.",
    )


COMMON = add(
    option(
        "--json",
        "as_json",
        heading=LAST,
        is_flag=True,
        help="Print one JSON document on stdout and nothing else there.",
    ),
    option("-q", "--quiet", heading=LAST, is_flag=True, help="Print no tables and no progress."),
    option(
        "-v",
        "--verbose",
        heading=LAST,
        count=True,
        help="Of a conversion: a row per matrix, not per layer. Twice: tracebacks of errors.",
    ),
)
