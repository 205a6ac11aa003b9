"""Export targets: one module each, discovered; its name is the one on the command line.

A target offers:

* `plan(source, request, expert_weights, output)`: everything that will be written, with no tensor made yet.
  It raises ExportError, in words, where the model has no exact form there;
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

from ...artifact.weight_files import PlannedTensor as PlannedTensor
from ...options import OptionGroup, described, option
from ...planning.recipe import CodeOfArtifacts, WeightFiles
from ...request import Request, plugin_options

if TYPE_CHECKING:
    from pathlib import Path

    from ...artifact.verify import Comparison

TARGETS: tuple[str, ...] = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def load(target: str) -> ModuleType:
    """The module of a target."""
    return import_module(f"{__name__}.{target}")


@described
class Options(OptionGroup):
    """What every target is told: nothing."""


@dataclass(frozen=True)
class Part:
    """One folder of an export, with a model or an adapter.

    Attributes:
        folder: path in the export; "" is the export itself.
        configs: {name of a JSON file: its contents}.
        tensors: in the order of the files.
        adapter: a PEFT adapter: one weight file, `adapter_model.safetensors`, and no companion files.
    """

    folder: str
    configs: Mapping[str, dict]
    tensors: tuple[PlannedTensor, ...] = field(repr=False)
    adapter: bool = False


@dataclass(frozen=True)
class Checked:
    """How an export is compared with its artifact.

    Attributes:
        experts: the artifact is run once per expert, with all tokens sent to it; None: once, as it routes.
        adapters: folders in the export: its model is run once with each of them, in the order of `experts`.
        model: folder in the export that holds the model.
        base / base_revision: folder or Hub id of a model outside the export, to be run in place of `model`.
        same: the outputs have to agree.
    """

    experts: tuple[int, ...] | None = None
    adapters: tuple[str, ...] | None = None
    model: str = ""
    base: str | None = None
    base_revision: str | None = None
    same: bool = True


@dataclass(frozen=True)
class ExportPlan:
    """All that a target will write.

    Attributes:
        parts: folders with weights.
        model_type: architecture of the export.
        title: a few words, such as "expert 0".
        about: one or two sentences for the card.
        usage: Python that loads the export.
        checked: how the export is compared with the artifact; None: not at all, or by `write`.
        warnings: what the export loses.
        library: the Hub's name of the library that loads the export.
        write: writes further files into the folder and returns their comparison with the artifact.
        num_bytes_written: by `write`, roughly.
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
if TYPE_CHECKING:  # of all targets
    from .dense import Options as _DenseOptions
    from .lora import Options as _LoraOptions

    class _TargetOptions(_DenseOptions, _LoraOptions): ...
else:
    _TargetOptions = plugin_options("to", Options, {target: load(target).Options for target in TARGETS})


@described
class Export(_TargetOptions, CodeOfArtifacts, WeightFiles, Request):
    """What to write. The options of the targets are fields as well.

    Raises:
        RecipeError: a value is out of range, or an option does not go with the target.
    """

    NOUN = "export"

    to: str = option(
        default="dense",
        help=f"What to write. {'; '.join(f'{target}: {load(target).ABOUT}' for target in TARGETS)}.",
        group="Target",
        choices=TARGETS,
        kw_only=False,
    )
    check: bool = option(
        default=True,
        help="Load what was written and compare its outputs with the artifact's.",
        group="General",
        default_text="check",
    )
