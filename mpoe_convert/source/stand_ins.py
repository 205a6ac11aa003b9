"""Stand-ins for torch and for what transformers' files import, enough to build a model without numbers.

A stub stands for what has no say in which parameters a model has: it can be called, subclassed and used as a
decorator. What would make the model depend on it raises UnknownError: whether it is true, what is in it, a
comparison, and a module that keeps it, as it would keep a part. torch's modules are here with the parameters
that they have, as far as the supported families need them; all others are stubs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any


class UnknownError(Exception):
    """A stand-in was asked for something that it does not know."""


# ------------------------------------------------------------------------------------------------ stubs


class _StubType(type):
    """Of stubs, and of classes that subclass one, which are ordinary otherwise."""

    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict, **options: Any) -> _StubType:
        return super().__new__(mcs, name, bases, namespace)

    def __init__(cls, name: str, bases: tuple[type, ...], namespace: dict, **options: Any) -> None:
        super().__init__(name, bases, namespace)

    def __getattr__(cls, name: str) -> Any:
        if not is_stub(cls) or name.startswith("__"):
            raise AttributeError(name)
        return stub(name, of_torch=cls.__dict__["of_torch"])

    def __call__(cls, *args: Any, **options: Any) -> Any:
        if not is_stub(cls):
            return super().__call__(*args, **options)
        is_decorator = len(args) == 1 and callable(args[0]) and not options
        return args[0] if is_decorator else stub(cls.__name__, of_torch=cls.__dict__["of_torch"])

    def __getitem__(cls, key: Any) -> Any:
        return cls

    def __bool__(cls) -> bool:
        if is_stub(cls):
            raise UnknownError(f"whether {cls.__name__}")
        return True

    def __eq__(cls, other: object) -> bool:
        if is_stub(cls) and cls is not other:
            raise UnknownError(f"whether {cls.__name__} is {other!r}")
        return cls is other

    def __hash__(cls) -> int:
        return id(cls)

    def __iter__(cls) -> Iterator:
        raise UnknownError(f"what is in {cls.__name__}")

    def __instancecheck__(cls, instance: object) -> bool:
        if is_stub(cls):
            raise UnknownError(f"whether {instance!r} is a {cls.__name__}")
        return super().__instancecheck__(instance)

    def __subclasscheck__(cls, other: type) -> bool:
        if is_stub(cls):
            raise UnknownError(f"whether {other!r} is a {cls.__name__}")
        return super().__subclasscheck__(other)


def is_stub(value: object) -> bool:
    """Whether it is a stub, and no class that subclasses one."""
    return isinstance(value, _StubType) and "of_torch" in vars(value)


def stub(name: str, *, of_torch: bool = False) -> Any:
    """Something of that name, without meaning.

    Args:
        of_torch: a module may keep it: it is none of torch's modules, so that it holds no parameters.
    """
    return _StubType(name, (), {"of_torch": of_torch})


class Namespace:
    """A module of which some names are known, and all others are stubs.

    Functions that say whether something optional is available say no.
    """

    def __init__(self, name: str, known: dict[str, Any], *, of_torch: bool = False) -> None:
        self.__dict__.update(known, __name__=name, __path__=[])
        self._of_torch = of_torch

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name.startswith("is_") and name.endswith(("_available", "_compiling")):
            return lambda *args, **options: False
        return stub(name, of_torch=self._of_torch)


# ------------------------------------------------------------------------------------------------ torch


class Tensor:
    """A tensor without numbers. `shape` is None where it is not known; then it is no parameter."""

    requires_grad = False

    def __init__(self, shape: tuple[int, ...] | None = None) -> None:
        self.shape = shape

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **options: Tensor()

    def _computed(self, *others: object) -> Tensor:
        return Tensor()

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _computed
    __pow__ = __rpow__ = __neg__ = __floordiv__ = __getitem__ = _computed

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def _unknown(self, *others: object) -> Any:
        raise UnknownError("a number in a tensor")

    __bool__ = __len__ = __iter__ = __int__ = __float__ = __index__ = __lt__ = __gt__ = __eq__ = _unknown
    __hash__ = object.__hash__


class Parameter(Tensor):
    """A parameter that has a shape and no numbers."""

    shape: tuple[int, ...]

    def __init__(self, data: Tensor, requires_grad: bool = True) -> None:
        if not isinstance(data, Tensor) or data.shape is None:
            raise UnknownError("the shape of a parameter")
        super().__init__(data.shape)
        self.requires_grad = requires_grad

    def numel(self) -> int:
        """How many numbers it would hold."""
        return math.prod(self.shape)


class Buffer(Tensor):
    """A buffer; see `Module.register_buffer`."""

    def __init__(self, data: Tensor, *, persistent: bool = True) -> None:
        if not isinstance(data, Tensor):
            raise UnknownError("what a buffer holds")
        super().__init__(data.shape)
        self.persistent = persistent


def _made(*sizes: Any, size: Any = None, **options: Any) -> Tensor:
    """What torch.empty, zeros and their like return."""
    sizes = (size,) if size is not None else sizes
    shape = tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes
    return Tensor(shape if all(type(each) is int and each >= 0 for each in shape) else None)


def _filled(size: Any, *value: Any, **options: Any) -> Tensor:
    return _made(size)


def _computed(*args: Any, **options: Any) -> Tensor:
    return Tensor()


class Module:
    """What `torch.nn.Module` knows of its parameters and of the modules in it, in its order."""

    training = True

    _parameters: dict[str, Parameter]
    _modules: dict[str, Module]
    _buffers: dict[str, Tensor]

    def __new__(cls, *args: Any, **options: Any) -> Any:
        module = super().__new__(cls)
        module.__dict__.update(
            _parameters={}, _modules={}, _buffers={}
        )  # classes set values before `__init__`
        return module

    def __init__(self, *args: Any, **options: Any) -> None:
        pass

    def __setattr__(self, name: str, value: Any) -> None:
        if is_stub(value) and not vars(value)["of_torch"]:
            raise UnknownError(f"what {type(self).__name__} keeps as {name}")
        self._forget(name)
        object.__setattr__(self, name, value)
        if isinstance(value, Parameter):
            self._parameters[name] = value
        elif isinstance(value, Module):
            self._modules[name] = value
        elif isinstance(value, Buffer) and value.persistent:
            self._buffers[name] = value

    def __delattr__(self, name: str) -> None:
        self._forget(name)
        object.__delattr__(self, name)

    def _forget(self, name: str) -> None:
        for each in (self._parameters, self._modules, self._buffers):
            each.pop(name, None)

    def register_parameter(self, name: str, value: Parameter | None) -> None:
        """Set it; None stands for a parameter that is not there."""
        setattr(self, name, value)

    def register_buffer(self, name: str, value: Tensor | None, persistent: bool = True) -> None:
        """Set it. Only those that are stored with the parameters are listed."""
        object.__setattr__(self, name, value)
        if persistent and value is not None:
            self._buffers[name] = value

    def add_module(self, name: str, module: Module | None) -> None:
        """Set it."""
        setattr(self, name, module)

    register_module = add_module

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """(path, module) of this module and of those in it; of one in two places both."""
        yield prefix, self
        for name, module in self._modules.items():
            yield from module.named_modules(f"{prefix}.{name}" if prefix else name)

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """(name, parameter) of this module and of those in it; of one in two places both."""
        for path, module in self.named_modules():
            for name, parameter in module._parameters.items():
                yield f"{path}.{name}" if path else name, parameter

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """The same of buffers that are stored."""
        for path, module in self.named_modules():
            for name, buffer in module._buffers.items():
                yield f"{path}.{name}" if path else name, buffer

    def children(self) -> Iterator[Module]:
        """The modules right below."""
        yield from self._modules.values()

    def apply(self, function: Callable) -> Module:
        """Numbers alone are changed so."""
        return self

    eval = train = requires_grad_ = to = apply


class ModuleList(Module):
    """See `torch.nn.ModuleList`."""

    def __init__(self, modules: Iterable[Module] = ()) -> None:
        super().__init__()
        self.extend(modules)

    def append(self, module: Module) -> ModuleList:
        """Add one."""
        if not isinstance(module, Module):
            raise UnknownError("an item of a list of modules")
        setattr(self, str(len(self)), module)
        return self

    def extend(self, modules: Iterable[Module]) -> ModuleList:
        """Add several."""
        for module in modules:
            self.append(module)
        return self

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[Module]:
        return iter(self._modules.values())

    def __getitem__(self, index: int) -> Module:
        return list(self._modules.values())[index]


class Sequential(ModuleList):
    """See `torch.nn.Sequential`; of modules without names."""

    def __init__(self, *modules: Module) -> None:
        super().__init__(modules)


class Linear(Module):
    """See `torch.nn.Linear`."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, **options: Any) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = Parameter(_made(out_features, in_features))
        self.bias = Parameter(_made(out_features)) if bias else None


class Embedding(Module):
    """See `torch.nn.Embedding`."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        _freeze: bool = False,
    ) -> None:
        super().__init__()
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise UnknownError("a padding index beyond the table")
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.weight = Parameter(_made(num_embeddings, embedding_dim), not _freeze)


class LayerNorm(Module):
    """See `torch.nn.LayerNorm`."""

    has_bias = True

    def __init__(
        self,
        normalized_shape: int | tuple[int, ...],
        eps: float | None = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__()
        shape = _made(normalized_shape)
        self.weight = Parameter(shape) if elementwise_affine else None
        self.bias = Parameter(shape) if elementwise_affine and bias and self.has_bias else None


class RMSNorm(LayerNorm):
    """See `torch.nn.RMSNorm`."""

    has_bias = False


class Conv2d(Module):
    """See `torch.nn.Conv2d`; of kernels without groups."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: Any = 1,
        padding: Any = 0,
        *,
        bias: bool = True,
    ) -> None:
        super().__init__()
        kernel = (kernel_size, kernel_size) if isinstance(kernel_size, int) else tuple(kernel_size)
        self.weight = Parameter(_made(out_channels, in_channels, *kernel))
        self.bias = Parameter(_made(out_channels)) if bias else None


class _Dropout(Module):
    def __init__(self, p: float = 0.5, inplace: bool = False) -> None:
        super().__init__()
        if not 0.0 <= p <= 1.0:
            raise UnknownError(f"a dropout of {p}")
        self.p = p


def _without_parameters(name: str) -> type[Module]:
    return type(name, (Module,), {})


_PLAIN = (
    *("Identity", "GELU", "SiLU", "ReLU", "ReLU6", "LeakyReLU", "Tanh", "Sigmoid", "Mish", "Softmax", "ELU"),
    *("Flatten", "CrossEntropyLoss", "MSELoss", "BCEWithLogitsLoss"),
)
_NN = Namespace(
    "torch.nn",
    {
        **{name: _without_parameters(name) for name in _PLAIN},
        **{
            each.__name__: each
            for each in (*(Module, ModuleList, Sequential, Linear, Embedding, LayerNorm, RMSNorm, Conv2d),)
        },
        "Dropout": _Dropout,
        "Parameter": Parameter,
        "Buffer": Buffer,
        "functional": Namespace("torch.nn.functional", {}, of_torch=True),
        "init": Namespace("torch.nn.init", {}, of_torch=True),
    },
)
TORCH = Namespace(
    "torch",
    {
        "nn": _NN,
        "Tensor": Tensor,
        **dict.fromkeys(("empty", "zeros", "ones", "rand", "randn"), _made),
        "full": _filled,
        **dict.fromkeys(
            ("arange", "tensor", "tril", "triu", "sin", "cos", "outer", "cat", "log", "exp"), _computed
        ),
    },
    of_torch=True,
)
