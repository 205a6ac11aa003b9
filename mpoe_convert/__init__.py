"""Turn a pretrained dense transformer into a mixture of experts that share most of their parameters.

from mpoe_convert import Recipe, convert, plan, verify

convert(Recipe("gpt2", experts=8, bond_dim=64), "out")
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

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
    "Recipe": "planning.recipe",
    "convert": "conversion.convert",
    "draw_pictures": "artifact.pictures",
    "evaluate": "training.evaluate",
    "export": "exports.export",
    "finetune": "training.finetune",
    "freeze": "training.roles",
    "mask_centre": "training.roles",
    "param_groups": "training.roles",
    "plan": "compression.prepare",
    "push": "artifact.push",
    "router_stats": "training.router_stats",
    "verify": "artifact.verify",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str):
    # On demand: torch takes seconds to import, and `--help` needs none of it.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
