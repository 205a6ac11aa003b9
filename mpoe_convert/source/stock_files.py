"""transformers' own files, run without importing transformers or torch: what they import is stood in for."""

from __future__ import annotations

import builtins
import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from importlib.machinery import SourceFileLoader
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from .stand_ins import TORCH, Module, Namespace, UnknownError, is_stub

# What the files get as it is, beside the standard library.
_AS_THEY_ARE = {"huggingface_hub", "packaging", "typing_extensions"}
# Files that run, beside those of the configs and the models; all others are stood in for.
_RUN = {
    "activations",
    "configuration_utils",
    "generation.configuration_utils",
    "integrations.heterogeneity",
    "integrations.heterogeneity.configuration_utils",
    "modeling_layers",
    "modeling_rope_utils",
    "models.auto.auto_mappings",
    "models.auto.configuration_auto",
    "models.auto.modeling_auto",
    "models.auto.processing_auto",
    "pytorch_utils",
    "utils.type_validators",
}
_MODEL = re.compile(r"models\.(?!auto\.)\w+\.modeling_\w+")
_CONFIG = re.compile(r"models\.(?!auto\.)\w+\.configuration_\w+")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.]+\.(weight|bias)")


@contextmanager
def stock_files() -> Iterator[StockFiles]:
    """The files of the installed transformers.

    Raises:
        UnknownError: it is not installed as files.
    """
    found = find_spec("transformers")
    if found is None or found.origin is None or not found.origin.endswith("__init__.py"):
        raise UnknownError("where transformers is")
    files = StockFiles(Path(found.origin).parent)
    try:
        yield files
    finally:
        files.forget()


class StockFiles:
    """Modules made of transformers' files, by their names below the package.

    Attributes:
        root: the package's folder.
        modules: those that were asked for.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.modules: dict[str, Any] = {}
        self._known = _known(self)
        self._builtins = vars(builtins) | {"__import__": self._import}

    def module(self, name: str) -> Any:
        """A module that was run, or a namespace of stubs. What running raises is passed on."""
        if name not in self.modules:
            path = self._path(name)
            if path is None:
                self.modules[name] = Namespace(name, self._known.get(name, {}))
            else:
                self._run(name, path)
        return self.modules[name]

    def forget(self) -> None:
        """Take the modules out of Python's list, where dataclasses look for them."""
        for name in self.modules:
            sys.modules.pop(_listed_as(name), None)

    def model_class(self, model_type: str, name: str) -> type[PreTrained]:
        """A class of the model type's own file. Raises UnknownError if it is not there."""
        folder = self.module("models.auto.configuration_auto").model_type_to_module_name(model_type)
        found = vars(self.module(f"models.{folder}.modeling_{folder}")).get(name)
        if is_stub(found) or not (isinstance(found, type) and issubclass(found, PreTrained)):
            raise UnknownError(f"the class {name} of the model type {model_type}")
        return found

    def config_class(self, model_type: str) -> type:
        """The class of a model type's config, of its own file."""
        auto = self.module("models.auto.configuration_auto")
        folder = auto.model_type_to_module_name(model_type)
        found = getattr(
            self.module(f"models.{folder}.configuration_{folder}"), auto.CONFIG_MAPPING_NAMES[model_type]
        )
        if is_stub(found) or not isinstance(found, type):
            raise UnknownError(f"the config of the model type {model_type}")
        return found

    def heads(self, model_type: str) -> dict[str, str]:
        """Auto class -> class name, for every Auto class that has a head on this very model type."""
        found = {}
        for name, auto in vars(self.module("models.auto.modeling_auto")).items():
            if not (isinstance(auto, type) and not is_stub(auto) and issubclass(auto, _AutoModel)):
                continue
            table = auto._model_mapping or {}
            stock = table.get(model_type)
            if stock and auto.__name__ == name:
                stock = stock[0] if isinstance(stock, (tuple, list)) else stock
                others = [other for other, cls in table.items() if cls == stock and other != model_type]
                if self._is_of([model_type, *others], stock):
                    found[name] = stock
        return found

    def _is_of(self, model_types: Iterable[str], name: str) -> bool:
        """Whether a class is a model of the first type; it is in the file of one of them."""
        first, *others = model_types
        for each in [first, *others]:
            try:
                cls = self.model_class(each, name)
            except UnknownError:
                continue
            return cls.config_class.model_type == first
        raise UnknownError(f"where the class {name} is")

    @cached_property
    def renamed(self) -> str:
        """The text of the table of renames by model type and class."""
        return (self.root / "conversion_mapping.py").read_text(encoding="utf-8")

    def _path(self, name: str) -> Path | None:
        """The file that runs as that module; None: it is stood in for."""
        if not (name in _RUN or _MODEL.fullmatch(name) or _CONFIG.fullmatch(name)):
            return None
        path = self.root.joinpath(*name.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        return path if path.is_file() else None

    def _run(self, name: str, path: Path) -> None:
        module = ModuleType(_listed_as(name))
        parts = name.split(".")
        module.__package__ = ".".join(parts if path.stem == "__init__" else parts[:-1])
        module.__dict__["__builtins__"] = self._builtins
        self.modules[name] = sys.modules[module.__name__] = module
        code = SourceFileLoader(f"transformers.{name}", str(path)).get_code(f"transformers.{name}")
        assert code is not None
        exec(code, module.__dict__)
        stubs = {each for each, value in vars(module).items() if is_stub(value)}
        if _CONFIG.fullmatch(name) and not all(each.endswith(("Config", "CONFIG_MAPPING")) for each in stubs):
            raise UnknownError(f"all that {name} imports, which may check a config")

    def _import(
        self,
        name: str,
        globals: Mapping[str, Any] | None = None,
        locals: Mapping[str, Any] | None = None,
        fromlist: tuple[str, ...] | None = (),
        level: int = 0,
    ) -> Any:
        """`__import__` of the files."""
        if level:
            assert globals is not None
            parts = globals["__package__"].split(".") if globals["__package__"] else []
            return self._from(".".join([*parts[: len(parts) - level + 1], *filter(None, [name])]), fromlist)
        package, _, rest = name.partition(".")
        if package == "transformers":
            return self._from(rest, fromlist)
        if package == "torch":
            return _below(TORCH, rest) if fromlist else TORCH
        if package in _AS_THEY_ARE or package in sys.stdlib_module_names:
            return builtins.__import__(name, globals, locals, fromlist or (), 0)
        return Namespace(name, {})

    def _from(self, name: str, fromlist: tuple[str, ...] | None) -> Any:
        found = self.module(name)
        for each in fromlist or ():
            below = f"{name}.{each}" if name else each
            if isinstance(found, Namespace) and each not in vars(found) and self._path(below):
                setattr(found, each, self.module(below))
        return found


def _listed_as(name: str) -> str:
    return f"{__name__}:{name}"


def _below(found: Any, path: str) -> Any:
    for name in filter(None, path.split(".")):
        found = getattr(found, name)
    return found


# ------------------------------------------------------------------------ what transformers' files import


class PreTrained(Module):
    """What `PreTrainedModel` does while it is built, as far as it concerns parameters and their ties."""

    files: StockFiles
    config_class: Any = None
    base_model_prefix = ""
    _tied_weights_keys: Any = None
    _no_split_modules: Any = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        annotated = inspect.get_annotations(cls).get("config")
        cls.config_class = vars(cls).get("config_class") or annotated or cls.config_class

    def __init__(self, config: Any, *args: Any, **options: Any) -> None:
        super().__init__()
        self.config = config
        if any("GenerationMixin" in each.__name__ for each in type(self).__mro__):
            generation = self.files.module("generation.configuration_utils")
            generation.GenerationConfig.from_model_config(config)

    @classmethod
    def _from_config(cls, config: Any) -> PreTrained:
        return cls(config)

    def post_init(self) -> None:
        """Collect the ties: target -> source, of this model and of those right below."""
        ties = {}
        if getattr(self.config, "tie_word_embeddings", False) and self._tied_weights_keys is not None:
            ties = dict(self._tied_weights_keys)
        if not all(_PLAIN_NAME.fullmatch(name) for pair in ties.items() for name in pair):
            raise UnknownError("ties by patterns")
        for name, module in self._modules.items():
            below = getattr(module, "ties", {}) if isinstance(module, PreTrained) else {}
            ties |= {f"{name}.{target}": f"{name}.{source}" for target, source in below.items()}
        self.ties = ties


class _AutoModel:
    """Base of the Auto classes: those have a table of class names by model type."""

    _model_mapping: Any = None


class _Log:
    """A logger that is silent."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **options: None


def _unchanged(*args: Any, **options: Any) -> Any:
    """A decorator that changes nothing, with arguments and without."""
    return args[0] if len(args) == 1 and callable(args[0]) and not options else _unchanged


def _decorator(*args: Any, **options: Any) -> Any:
    """The same of a decorator whose arguments may be functions."""
    return lambda decorated: decorated


def _no(*args: Any, **options: Any) -> bool:
    return False


def _known(files: StockFiles) -> dict[str, dict[str, Any]]:
    """Module -> name -> what the files find there, beside stubs."""
    names = ("use_kernelized_func", "use_kernel_forward_from_hub", "use_kernel_func_from_hub")
    kernels: dict[str, Any] = {name: _decorator for name in names}

    def from_config(config: Any) -> PreTrained:
        return files.model_class(config.model_type, files.heads(config.model_type)["AutoModel"])(config)

    return {
        "": {"__version__": version("transformers")},
        "integrations": kernels,
        "integrations.hub_kernels": kernels,
        "modeling_utils": {"PreTrainedModel": type("PreTrainedModel", (PreTrained,), {"files": files})},
        "models.auto": {"AutoModel": SimpleNamespace(from_config=from_config)},
        "models.auto.auto_factory": {
            "_BaseAutoModelClass": _AutoModel,
            "_LazyAutoMapping": lambda configs, models: models,
            "auto_class_update": lambda auto, **options: auto,
        },
        "utils.generic": {"is_flash_attention_requested": _no},
        "utils": {
            "CONFIG_NAME": "config.json",
            "PushToHubMixin": type("PushToHubMixin", (), {"push_to_hub": lambda self: None}),
            "auto_docstring": _unchanged,
            "copy_func": _unchanged,
            "is_flash_attention_requested": _no,
            "is_torch_available": lambda: True,
            "logging": SimpleNamespace(get_logger=lambda *args: _Log()),
        },
    }
