"""Sentence encoders: the modules that sentence-transformers puts behind a transformer, in folders beside it.

modules.json lists the class and the folder of each; the transformer itself is in the folder of the whole. A
pooling, a normalisation or a dense layer in such a folder belongs to what the model computes. PyLate, SetFit
and serving engines read the same files.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path, PurePosixPath

from ..errors import CheckpointError
from ..options import switched
from .json_files import read_json_object
from .paths import stays_inside

MODULES_FILE = "modules.json"
# What stands directly in the folder, beside the transformer's own files.
ENCODER_PATTERNS = (
    *(MODULES_FILE, "sentence_*_config.json", "config_sentence_transformers.json"),
    *("config_setfit.json", "artifact.metadata"),  # of SetFit, and of ColBERT
)
PLAIN_SUFFIXES = (".json", ".txt", ".model", ".jinja")
ENCODER_CLASSES = ("SentenceTransformer", "SparseEncoder", "CrossEncoder", "MultiVectorEncoder")
# A pickle of tensors, which is read without running anything, and is written as SAFE_WEIGHTS.
PICKLED_WEIGHTS, SAFE_WEIGHTS = "pytorch_model.bin", "model.safetensors"
# Parts of a model that are pickles or that only other libraries know, beside the weights.
_LEFT_OUT = ("model_head.pkl", "colbert_linear.pt", "sparse_linear.pt")


def module_folders(folder: Path) -> list[str]:
    """The folders of the modules below a model's folder; [] of a model without modules.json.

    Raises:
        CheckpointError: modules.json is damaged, or names a folder outside.
        OSError: it cannot be read.
    """
    paths = [path for _, path in _modules(folder)]
    for path in paths:
        if path and not stays_inside(path):
            raise CheckpointError(
                f"'{folder / MODULES_FILE}' names the folder {path!r}, expected one inside the model's: do "
                "not trust this checkpoint"
            )
    return [inside for path in paths if (inside := PurePosixPath(path).as_posix()) != "."]


def encoder_class(folder: Path) -> str | None:
    """The class of sentence-transformers that loads a model as a whole; None of a model without modules.json.

    Raises:
        CheckpointError: config_sentence_transformers.json is no JSON object.
        OSError: it cannot be read.
    """
    if not (folder / MODULES_FILE).is_file():
        return None
    path = folder / "config_sentence_transformers.json"
    named = read_json_object(path).get("model_type") if path.is_file() else None
    return named if named in ENCODER_CLASSES else ENCODER_CLASSES[0]


def _modules(folder: Path) -> list[tuple[str, str]]:
    """(class, folder) of every module that modules.json lists."""
    path = folder / MODULES_FILE
    if not path.is_file():
        return []
    try:
        found = [(entry["type"], entry["path"]) for entry in json.loads(path.read_text(encoding="utf-8"))]
        if not all(isinstance(text, str) for each in found for text in each):
            raise ValueError("an entry has a 'type' or a 'path' that is no text")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"'{path}' is not a list of modules ({type(error).__name__}: {error}), expected 'type' and "
            "'path' of each: fetch it again, or remove it"
        ) from error
    return found


def module_files(folder: Path, names: Iterable[str], *, weights: bool = True) -> list[str]:
    """Of the files of a model, those in the folders of its modules: configs, vocabularies and weights.

    Of a module with both, safetensors and a pickle, the former. Never code, nor other pickles.

    Args:
        folder: with modules.json.
        names: paths of all files below it, with "/".
        weights: also the modules' weights.

    Raises:
        CheckpointError / OSError: as for `module_folders`.
    """
    folders = module_folders(folder)
    inside = {name for name in names if any(name.startswith(f"{each}/") for each in folders)}
    found = [name for name in inside if name.endswith(PLAIN_SUFFIXES) and "/." not in name]
    if weights:
        found += [name for name in inside if name.endswith(".safetensors")]
        pickles = [PurePosixPath(name) for name in inside if PurePosixPath(name).name == PICKLED_WEIGHTS]
        found += [str(name) for name in pickles if str(name.with_name(SAFE_WEIGHTS)) not in inside]
    return sorted(found)


def local_module_files(folder: Path) -> list[Path]:
    """The files of `module_files` in a local folder."""
    paths = (path for each in module_folders(folder) for path in (folder / each).rglob("*") if path.is_file())
    return [folder / name for name in module_files(folder, {p.relative_to(folder).as_posix() for p in paths})]


def module_code(folder: Path, names: Iterable[str] | None = None) -> list[str]:
    """The Python modules beside the weights whose classes modules.json names.

    Args:
        folder: with modules.json.
        names: of the model's files; by default those in the folder.
    """
    found = {name.partition(".")[0] for name, _ in _modules(folder) if name.count(".") == 1}
    there = {path.name for path in folder.glob("*.py")} if names is None else {*names}
    return sorted(name for name in found if f"{name}.py" in there)


def notes(folder: Path, names: Collection[str], trusted: bool) -> Iterator[str]:
    """What a user should know: what of a sentence encoder, or beside one, does not come along.

    Args:
        folder: of the source.
        names: of the source's files.
        trusted: its custom code comes along.
    """
    if not trusted and (code := module_code(folder, names)):
        files = ", ".join(f"{name}.py" for name in code)
        yield (
            f"{MODULES_FILE} names classes of custom code ({files}), which does not come along: "
            "sentence-transformers cannot load the result. Read it, and pass "
            f"{switched('trust_remote_code')} to keep it."
        )
    if _is_module(folder):
        yield (
            f"'{folder.parent / MODULES_FILE}' lists this folder as a module of a sentence encoder, whose "
            "other modules do not come along. Load the encoder with SentenceTransformer, save it, and "
            "convert that: there the transformer lies beside its modules."
        )
    if found := [name for name in _LEFT_OUT if name in names]:
        yield (
            f"{', '.join(found)} does not come along: pickles may run code. If you trust it, copy it into "
            "the result."
        )


def _is_module(folder: Path) -> bool:
    """Whether the folder above is a sentence encoder's, of which this one holds a module."""
    try:
        return folder.name in module_folders(folder.parent)
    except (CheckpointError, OSError):  # a file of that name need not be a sentence encoder's
        return False
