"""The modelling file where importing transformers, or torch too, would take seconds for nothing.

What `modeling_mpoe.py` says of names, shapes and costs, of which plans are made, needs of torch modules that
hold parameters, and parameters that have a shape. Its functions of tensors need torch alone. So the same file
is run here with a stand-in for what is not needed, which has every name and computes nothing.
"""

from __future__ import annotations

import builtins
import functools
import math
import sys
from importlib import import_module
from importlib.machinery import SourceFileLoader
from types import ModuleType, SimpleNamespace
from typing import Any

from . import MODELING_PATH


@functools.cache
def modeling() -> Any:
    """The modelling file as a module: its `FeedForward` has names, shapes and costs, and no tensors."""
    return _run("shapes", {"torch": _TORCH, "transformers": _Nothing})


def functions() -> Any:
    """The modelling file as a module, for its functions of tensors; it does not import transformers."""
    if "transformers.modeling_utils" in sys.modules:  # what takes seconds is there already
        return import_module(f"{__package__}.{MODELING_PATH.stem}")
    return _functions()


@functools.cache
def _functions() -> Any:
    return _run("functions", {"transformers": _Nothing})


def _run(name: str, stand_ins: dict[str, Any]) -> ModuleType:
    """Run the modelling file with something else in place of these packages."""

    def load(name: str, *args: Any, **kwargs: Any) -> Any:
        package = name.partition(".")[0]
        return stand_ins[package] if package in stand_ins else builtins.__import__(name, *args, **kwargs)

    module = ModuleType(f"{__package__}.{MODELING_PATH.stem}:{name}")
    code = SourceFileLoader(module.__name__, str(MODELING_PATH)).get_code(module.__name__)
    assert code is not None
    module.__dict__["__builtins__"] = vars(builtins) | {"__import__": load}
    exec(code, module.__dict__)
    return module


class _NothingType(type):
    """Classes that have every attribute, and that can be called, as decorators too."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _NothingType(name, (_Nothing,), {})

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return args[0] if args and callable(args[0]) else cls


class _Nothing(metaclass=_NothingType):
    """What the file names and does not use here."""


class Parameter:
    """A parameter that has a shape and no numbers; float32, as a new one is.

    Attributes:
        shape: sizes.
        itemsize: bytes per number.
        nbytes: of all.
    """

    itemsize = 4

    def __init__(self, of: Parameter | tuple[int, ...]):
        self.shape: tuple[int, ...] = of.shape if isinstance(of, Parameter) else of
        self.nbytes = self.itemsize * self.numel()

    def numel(self) -> int:
        """How many numbers it would hold."""
        return math.prod(self.shape)


class Module:
    """What `torch.nn.Module` knows of its parameters and of the modules in it, in its order."""

    _parameters: dict[str, Parameter]
    _modules: dict[str, Module]

    def __init__(self) -> None:
        self.__dict__["_parameters"] = {}
        self.__dict__["_modules"] = {}

    def __setattr__(self, name: str, value: object) -> None:
        self.__dict__[name] = value
        if isinstance(value, Parameter):
            self._parameters[name] = value
        elif isinstance(value, Module):
            self._modules[name] = value

    def register_parameter(self, name: str, value: Parameter | None) -> None:
        """Set it; None stands for a parameter that is not there."""
        setattr(self, name, value)

    register_buffer = register_parameter

    def state_dict(self, prefix: str = "") -> dict[str, Parameter]:
        """Name -> parameter, of this module and of those in it."""
        found = {prefix + name: value for name, value in self._parameters.items()}
        for name, module in self._modules.items():
            found |= module.state_dict(f"{prefix}{name}.")
        return found


class _ModuleList(Module):
    def __init__(self, modules: Any):
        super().__init__()
        for number, module in enumerate(modules):
            setattr(self, str(number), module)


def _empty(*sizes: Any, **options: Any) -> Parameter:
    return Parameter(tuple(sizes[0]) if isinstance(sizes[0], tuple) else sizes)


class _Torch(SimpleNamespace):
    def __getattr__(self, name: str) -> Any:
        return getattr(_Nothing, name)


_NN = _Torch(Module=Module, ModuleList=_ModuleList, Parameter=Parameter, Identity=Module)
_TORCH = _Torch(nn=_NN, empty=_empty)
