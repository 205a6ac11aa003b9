"""Export targets: one module each, discovered; its name is the one on the command line.

A target offers `plan(source, request, expert_weights, output)`: everything that will be written, with no
tensor made yet. It raises ExportError, in words, where the model has no exact form there.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from ...errors import RequestError
from ...planning.recipe import check_calibration_tokens

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from ...artifact.verify import Comparison


TARGETS: tuple[str, ...] = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def load(target: str) -> ModuleType:
    """The module of a target."""
    return import_module(f"{__name__}.{target}")


@dataclass(frozen=True)
class Export:
    """What to write.

    Attributes:
        to: a module of this package.
        expert: which one, for `dense`; by default the first.
        calibrate: for `dense`: average the experts instead, weighted by the combine weights that the routers
            give them on this text: files or Hub datasets (see `texts.read`), or "builtin".
        calibration_tokens / calibration_split / text_column / target_column: of that text, as in `Recipe`.
        base: for `lora`: folder or Hub id of the model that the adapters go on; by default it is written.
        base_revision: of a Hub id.
        max_shard_size: upper limit of one weight file.
        check: load what was written, and compare it with the model that it was made from.

    Raises:
        RequestError: an option does not go with the target.
    """

    to: str = "dense"
    expert: int | None = None
    calibrate: tuple[str, ...] = ()
    calibration_tokens: int = 65536
    calibration_split: str = "train"
    text_column: str = "text"
    target_column: str = "target"
    base: str | None = None
    base_revision: str | None = None
    max_shard_size: str = "1GB"
    check: bool = True

    def __post_init__(self):
        if self.to not in TARGETS:
            raise RequestError(f"to is {self.to!r}; expected one of {', '.join(TARGETS)}")
        sources = (self.calibrate,) if isinstance(self.calibrate, str) else tuple(self.calibrate)
        object.__setattr__(self, "calibrate", sources)
        belongs = {"expert": "dense", "calibrate": "dense", "base": "lora", "base_revision": "lora"}
        for name, target in belongs.items():
            if getattr(self, name) not in (None, ()) and self.to != target:
                raise RequestError(f"{name} given with --to {self.to}; expected with --to {target} only")
        if self.expert is not None and self.calibrate:
            raise RequestError("expert and calibrate given; expected one expert, or the average by a text")
        check_calibration_tokens(self.calibration_tokens)
        text = ("calibration_tokens", "calibration_split", "text_column", "target_column")
        given = [
            name for name in text if getattr(self, name) != type(self).__dataclass_fields__[name].default
        ]
        if given and not self.calibrate:
            raise RequestError(f"{given[0]} given without calibrate; expected the text that it is about")
        if self.base_revision is not None and self.base is None:
            raise RequestError("base_revision given without base; expected the revision of a base on the Hub")


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor that will be written; `make` reads its sources and computes it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    make: Callable[[], Tensor] = field(repr=False)


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
