"""Where a converted model can be taken: one module each, discovered; the name is the one on the command line.

A target offers:

* `plan(source, request, shares, output)`: everything that will be written, with no tensor made yet. It raises
  ExportError, in words, where the model has no exact form there;
* `Options`: a subclass of `targets.Options` with the options that it reads. They become fields of `Export`
  and options of the command line, and are refused with other targets;
* `ABOUT`: what it writes, for people;
* `NEEDS`: {extra of this package: the libraries of it that are needed}.

The modules import torch inside functions: `--help` reads their options.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from ...options import OptionGroup, described, option
from ...planning.recipe import WeightFiles
from ...request import Request, plugin_options

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from ...artifact.verify import Comparison

TARGETS: tuple[str, ...] = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def load(target: str) -> ModuleType:
    """The module of a target."""
    return import_module(f"{__name__}.{target}")


@described
class Options(OptionGroup):
    """What every target is told: nothing."""


@dataclass(frozen=True)
class Made:
    """A tensor that will be written: `make` reads what it needs and builds it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    make: Callable[[], Tensor] = field(repr=False)


@dataclass(frozen=True)
class Part:
    """A model or an adapter: what lies in one folder of an export.

    Attributes:
        folder: its path in the export; "" is the export itself.
        configs: JSON files by name.
        tensors: in the order of the files.
        adapter: weights are `adapter_model.safetensors`, in one file, and nothing else comes with them.
    """

    folder: str
    configs: Mapping[str, dict]
    tensors: tuple[Made, ...] = field(repr=False)
    adapter: bool = False


@dataclass(frozen=True)
class Checked:
    """How an export is compared with the model that it was made from.

    Attributes:
        experts: one after the other all tokens of the original go to these; None: where routers send them.
        adapters: folders in the export that are put on its model one after the other, each for its expert.
        model: the folder in the export with the model.
        base / base_revision: a folder or Hub id of a model that is no part of the export, in its place.
        same: they have to compute the same.
    """

    experts: tuple[int, ...] | None = None
    adapters: tuple[str, ...] | None = None
    model: str = ""
    base: str | None = None
    base_revision: str | None = None
    same: bool = True


@dataclass(frozen=True)
class ExportPlan:
    """What a target makes of a model.

    Attributes:
        model_type: of what is written.
        title: what it is in a few words: "expert 0".
        about: the same in a sentence or two.
        usage: Python that loads it.
        checked: how it is compared with the original; None: it cannot be here.
        warnings: what it does not carry over.
        library: that loads it.
        write: what else is written into the folder, and how it compares with the original.
        num_bytes_written: by that, about.
    """

    parts: tuple[Part, ...]
    model_type: str
    title: str
    about: str
    usage: str
    checked: Checked | None
    warnings: tuple[str, ...] = ()
    library: str = "transformers"
    write: Callable[[Path], Comparison | None] | None = None
    num_bytes_written: int = 0


# Last: the targets import what stands above.
_TARGET_OPTIONS = plugin_options("to", Options, {target: load(target).Options for target in TARGETS})


@described
class Export(_TARGET_OPTIONS, WeightFiles, Request):
    """What to write. The options of the targets are fields as well.

    Raises:
        RecipeError: a value is out of range, or an option does not go with the target.
    """

    NOUN = "export"

    to: str = option(
        "dense",
        f"What to write. {'; '.join(f'{target}: {load(target).ABOUT}' for target in TARGETS)}.",
        group="Target",
        choices=TARGETS,
        kw_only=False,
    )
    check: bool = option(
        True,
        "Load what was written and compare its outputs with the artifact's.",
        group="General",
        default_text="check",
    )
