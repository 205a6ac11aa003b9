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

# No module is called like a function of it: importing `mpoe_convert.plan` would replace the function.
_HOME = {
    "CentreMask": "finetuning",
    "Export": "exports",
    "Finetuning": "runs",
    "MpoeError": "errors",
    "Recipe": "recipe",
    "convert": "conversion",
    "draw_pictures": "pictures",
    "evaluate": "evaluation",
    "export": "exporting",
    "finetune": "finetuning",
    "freeze": "training",
    "mask_centre": "training",
    "param_groups": "training",
    "plan": "compression",
    "push": "publishing",
    "router_stats": "routing",
    "verify": "verification",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str):
    # On demand: torch takes seconds to import, and `--help` needs none of it.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
