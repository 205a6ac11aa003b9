"""Turn a pretrained dense transformer into a mixture of experts that share most of their parameters.

from mpoe_convert import Recipe, convert, plan, verify

convert(Recipe("gpt2", experts=8, bond_dim=64), "out")
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what `__getattr__` finds, for type checkers and editors
    from .artifact.pictures import draw_pictures as draw_pictures
    from .artifact.push import push as push
    from .artifact.verify import verify as verify
    from .compression.plan import plan as plan
    from .conversion.convert import convert as convert
    from .errors import MpoeError as MpoeError
    from .exports.export import export as export
    from .exports.targets import Export as Export
    from .planning.recipe import Recipe as Recipe
    from .pruning.prune import prune as prune
    from .pruning.request import Pruning as Pruning
    from .training.evaluate import evaluate as evaluate
    from .training.finetune import finetune as finetune
    from .training.request import Finetuning as Finetuning
    from .training.roles import freeze as freeze
    from .training.roles import mask_centre as mask_centre
    from .training.roles import param_groups as param_groups
    from .training.router_stats import router_stats as router_stats
    from .training.trainer import CentreMask as CentreMask

try:
    __version__ = version("mpoe-convert")
except PackageNotFoundError:  # run from a source folder that was never installed
    __version__ = "0+unknown"

# No room is called like a function of it: importing `mpoe_convert.plan` would replace the function.
_HOME = {
    "CentreMask": "training.trainer",
    "Export": "exports.targets",
    "Finetuning": "training.request",
    "MpoeError": "errors",
    "Pruning": "pruning.request",
    "Recipe": "planning.recipe",
    "convert": "conversion.convert",
    "draw_pictures": "artifact.pictures",
    "evaluate": "training.evaluate",
    "export": "exports.export",
    "finetune": "training.finetune",
    "freeze": "training.roles",
    "mask_centre": "training.roles",
    "param_groups": "training.roles",
    "plan": "compression.plan",
    "prune": "pruning.prune",
    "push": "artifact.push",
    "router_stats": "training.router_stats",
    "verify": "artifact.verify",
}
__all__ = ["__version__", *_HOME]  # pyright: ignore[reportUnsupportedDunderAll]  (names that are found on demand)


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


def __getattr__(name: str):
    # On demand: torch takes seconds to import, and `--help` needs none of it.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
