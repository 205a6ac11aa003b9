"""Custom code, the Python files beside a model's weights: which they are, and whether they may run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, FamilyError
from ..options import called, switched
from . import hub
from .architecture import Architecture, custom_heads, knows
from .json_files import write_whole
from .sentence_encoder import module_code

GLUE_FILE = "modeling_mpoe_source.py"
# Files that may name custom code, beside config.json: those of tokenizers and processors.
NAMING_FILES = ("tokenizer_config.json", "*processor_config.json")


def admit(
    source: str, folder: Path, config: dict, trusted: bool, token: str | None
) -> tuple[dict, Path | None]:
    """(config.json, folder of the custom code that may run, or None) of a dense source.

    Custom code in other repositories is fetched, and the auto_map then names the fetched files. Nothing is
    run. Without custom code, `trusted` makes no difference.

    Args:
        source: what the user typed, for messages.
        folder: the source's folder.
        config: its config.json.
        trusted: the user allows custom code to run.
        token: Hub token for code in other repositories.

    Raises:
        FamilyError: the model needs custom code and it is not trusted, or the custom code has no model class.
        CheckpointError: a file of the custom code is missing.
    """
    auto_map = config.get("auto_map") or {}
    _check_entries(source, auto_map)
    names = list(references(auto_map))
    if not trusted:
        if names and not knows(config["model_type"]):
            files = ", ".join(sorted({f"{module}.py" for _, module in names}))
            raise FamilyError(
                f"transformers has no model type {config['model_type']!r}, and '{source}' has custom code "
                f"({files}): read it, and pass {switched('trust_remote_code')} to run it"
            )
        _check_has_stock_head(source, config, names)
        return {key: value for key, value in config.items() if key != "auto_map"}, None
    names += [name for each in naming_files(folder) for name in references(_auto_map(each))]
    names += [("", module) for module in module_code(folder)]
    if not names:
        return config, None
    if "AutoConfig" in auto_map and not custom_heads(auto_map):
        raise FamilyError(
            f"'{source}' has a custom config ({auto_map['AutoConfig']}) and no custom model that uses it; "
            f"leave out {called('trust_remote_code')} to use the classes of transformers"
        )
    return config | {"auto_map": localised(auto_map)}, _gather(folder, names, token)


def _check_entries(source: str, auto_map: object) -> None:
    if not isinstance(auto_map, Mapping):
        raise CheckpointError(
            f"the auto_map of '{source}' is {auto_map!r}; expected Auto classes and their names"
        )
    for auto, name in auto_map.items():
        named = isinstance(name, str) and all(name.rpartition("--")[2].rpartition(".")[::2])
        if auto.startswith(("AutoModel", "AutoConfig")) and not named:
            raise CheckpointError(f"'{source}' maps {auto} to {name!r}; expected 'module.Class'")


def _check_has_stock_head(source: str, config: dict, names: list[tuple[str, str]]) -> None:
    """Raise FamilyError if a config of a known type names classes that transformers does not have."""
    heads = config.get("architectures") or ()
    if not (names and heads):
        return
    import transformers

    if not any(hasattr(transformers, str(head)) for head in heads):
        files = ", ".join(sorted({f"{module}.py" for _, module in names}))
        raise FamilyError(
            f"'{source}' is a {heads[0]} of custom code ({files}); transformers' {config['model_type']} "
            f"may compute something else: read it, and pass {switched('trust_remote_code')}"
        )


def code_of_artifact(folder: Path, block: dict) -> Path | None:
    """The folder of the custom code that an artifact has from its source; None if it has none.

    Args:
        folder: the artifact's folder.
        block: the `mpoe` block of its config.json.
    """
    named = [*references(block.get("base_auto_map"))]
    named += [name for each in naming_files(folder) for name in references(_auto_map(each))]
    return folder if named or module_code(folder) else None


def naming_files(folder: Path) -> list[Path]:
    """The files beside config.json that may name custom code: of tokenizers and processors."""
    return sorted(path for pattern in NAMING_FILES for path in folder.glob(pattern))


def _auto_map(path: Path) -> object:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # the code that uses this file reports the error
        return None
    return values.get("auto_map") if isinstance(values, dict) else None


def references(auto_map: object) -> Iterator[tuple[str, str]]:
    """(repository or "", module) of every class that an auto_map names; tokenizers' entries are pairs."""
    if isinstance(auto_map, str):
        repo, _, name = auto_map.rpartition("--")
        yield repo, name.partition(".")[0]
    elif isinstance(auto_map, (list, tuple)):
        for each in auto_map:
            yield from references(each)
    elif isinstance(auto_map, Mapping):
        yield from references(list(auto_map.values()))


def localised(auto_map: Any) -> Any:
    """The auto_map without names of other repositories: all classes in files beside the weights."""
    if isinstance(auto_map, str):
        return auto_map.rpartition("--")[2]
    if isinstance(auto_map, (list, tuple)):
        return [localised(each) for each in auto_map]
    if isinstance(auto_map, Mapping):
        return {auto: localised(each) for auto, each in auto_map.items()}
    return auto_map


def _gather(folder: Path, names: Iterable[tuple[str, str]], token: str | None) -> Path:
    """A folder with all the custom code: the model's, or one with copies if some is in other repositories."""
    homes = {repo: hub.download_code(repo, token=token) if repo else folder for repo, _ in names}
    contents: dict[str, bytes] = {}
    for repo, module in names:
        for path in with_imports(homes[repo], [module]):
            content = path.read_bytes()
            if contents.setdefault(path.name, content) != content:
                raise CheckpointError(
                    f"the custom code that '{folder}' names has two different files '{path.name}': put all "
                    "of it beside the weights, and rename one"
                )
    if not any(homes):
        return folder
    from huggingface_hub import cached_assets_path

    digest = hashlib.sha256(repr(sorted(contents.items())).encode()).hexdigest()[:32]
    copies = cached_assets_path("mpoe-convert", namespace="code", subfolder=digest)
    for name, content in contents.items():
        copy = copies / name  # others may read it: the folder is named after the contents
        if not copy.is_file() or copy.read_bytes() != content:
            write_whole(copy, content)
    return copies


def with_imports(code: Path, modules: Iterable[str]) -> list[Path]:
    """The files of modules in a folder, and of all modules that they import relatively.

    Raises:
        CheckpointError: a file is missing.
    """
    from transformers.dynamic_module_utils import get_relative_import_files

    found: set[Path] = set()
    for module in modules:
        if not module.isidentifier():
            raise CheckpointError(f"an auto_map names {module!r}; expected a module beside the weights")
        path = code / f"{module}.py"
        try:
            found |= {path, *map(Path, get_relative_import_files(path))}
        except FileNotFoundError as error:
            raise CheckpointError(
                f"'{code}' lacks '{Path(error.filename).name}', which its code needs: fetch the model again"
            ) from None
    return sorted(found)


def files(folder: Path, architecture: Architecture) -> list[Path]:
    """The files of a model's custom code, including those of its tokenizer and processors.

    Raises:
        FamilyError: a file has the name of one that this tool writes.
    """
    if architecture.code is None:
        return []
    names = [*references(architecture.auto_map)]
    names += [name for each in naming_files(folder) for name in references(_auto_map(each))]
    found = with_imports(architecture.code, {module for _, module in names} | {*module_code(folder)})
    if clash := [path.name for path in found if path.name in (GLUE_FILE, "modeling_mpoe.py")]:
        raise FamilyError(
            f"the source's custom code has a file {clash[0]}, and so has every artifact: rename the source's"
        )
    return found


def glue(architecture: Architecture, subclasses: str, prefix: str) -> str:
    """Source text of a module that subclasses the custom classes, with mixtures in place of their FFNs.

    Its imports are relative: that is how transformers finds all files that belong to a model.

    Args:
        architecture: of a model with custom code.
        subclasses: name of the module whose `subclass` function makes the classes.
        prefix: of the names of the new classes.

    Raises:
        FamilyError: two of the custom classes have the same name.
    """
    config = architecture.config_class.__name__
    named = [architecture.auto_map.get("AutoConfig", f"transformers.{config}")]
    named += [architecture.auto_map[auto] for auto in architecture.heads]
    home: dict[str, str] = {}
    for module, _, cls in (name.rpartition(".") for name in named):
        if home.setdefault(cls, module) != module:
            raise FamilyError(f"two classes of the source's custom code are named {cls}: rename one")
    backbone = architecture.heads.get("AutoModel")
    imports = {"transformers": ["AutoModel"]} if backbone else {}
    for cls, module in home.items():
        imports.setdefault(module if module == "transformers" else f".{module}", []).append(cls)
    imports[f".{subclasses}"] = ["subclass"]
    lines = [
        "# Written by mpoe-convert. The classes of this checkpoint: those of its source's custom code, which",
        "# lies beside this file unchanged, with mixtures as their feed-forward networks.",
        "",
        *(f"from {module} import {', '.join(classes)}" for module, classes in imports.items()),
        "",
        *(f"{prefix}{cls} = subclass({cls}, __name__)" for cls in home),
    ]
    if backbone:
        lines += ["", f"AutoModel.register({prefix}{config}, {prefix}{backbone}, exist_ok=True)  # for heads"]
    return "\n".join(lines) + "\n"
