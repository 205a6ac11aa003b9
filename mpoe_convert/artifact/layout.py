"""The files of an artifact: their names, which of them belong to it (its own files), and its report."""

from __future__ import annotations

import os
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from ..errors import CheckpointError, few, one_line
from ..runtime.shapes import modeling
from ..source.architecture import Architecture
from ..source.checkpoint import weight_files
from ..source.custom_code import GLUE_FILE, code_of_artifact, files
from ..source.hub import CHAT_TEMPLATES, GENERATE_FILE
from ..source.json_files import read_json_object, write_json
from ..source.paths import exists, is_dir, is_file, stays_inside, suggest_path
from ..source.repository import Folder
from ..source.safetensors_file import read_header
from ..source.sentence_encoder import module_files

MODELING_FILE = "modeling_mpoe.py"
REPORT_FILE = "conversion_report.json"
RECIPE_FILE = "mpoe_recipe.yaml"
CARD_FILE = "README.md"
TRAINING_REPORT_FILE = "training_report.json"
EXPORT_REPORT_FILE = "export_report.json"
EVALUATION_REPORT_FILE = "evaluation_report.json"
# What `verify` and `inspect` read of a report.
_REPORT_KEYS = frozenset(
    ("base_model", "revision", "model_type", "recipe", "max_relative_error", "max_clone_drift", "warnings")
)


def is_artifact(folder: Path) -> bool:
    """Whether this tool wrote the folder: its config has an mpoe block, and it holds a conversion report."""
    try:
        config = read_json_object(folder / "config.json")
    except (OSError, CheckpointError):
        return False
    return "mpoe" in config and is_file(folder / REPORT_FILE)


# Options that the configs of stock mixtures have under the same names.
STOCK_OPTIONS = {"router_aux_loss_coef", "router_z_loss_coef", "output_router_logits", "router_jitter_noise"}


def read_artifact(folder: Path) -> tuple[dict, dict]:
    """(config, conversion report) of an artifact.

    Raises:
        CheckpointError: the folder is no artifact of this tool, or its report is damaged.
    """
    if not is_artifact(folder):
        what = "is not an artifact of mpoe-convert" if is_dir(folder) else "is not a folder"
        raise CheckpointError(
            f"'{folder}' {what}: expected a folder that a conversion wrote, with {REPORT_FILE} and a "
            f"config.json with an mpoe block{'' if exists(folder) else suggest_path(str(folder))}"
        )
    path = folder / REPORT_FILE
    try:
        report = read_json_object(path, "a conversion report", remedy="convert again")
    except OSError as error:
        raise CheckpointError(f"'{path}' cannot be read ({error.strerror}): check its permissions") from None
    if lacks := sorted(_REPORT_KEYS - set(report)):
        raise CheckpointError(f"'{path}' is damaged (it lacks {lacks}): convert again")
    return read_json_object(folder / "config.json"), report


def base_path(source: Path, artifact: Path) -> str:
    """The path from an artifact's folder to that of its dense model, as its report holds it.

    Where they lie on different drives there is none, and it is absolute.
    """
    source = source.resolve()
    try:
        return Path(os.path.relpath(source, artifact.resolve())).as_posix()
    except ValueError:
        return source.as_posix()


def base_of(artifact: Path, report: dict) -> str:
    """Where an artifact's dense model is: a Hub id, or a folder, whatever the working directory is.

    A folder that is not at its place, seen from the artifact, is the one that was named in the conversion.
    """
    named = report["base_model"]
    place = artifact / str(report["base_path"]) if report.get("base_path") else None
    if place is None or not is_dir(place) or (is_dir(named) and os.path.samefile(named, place)):
        return named
    return str(place.resolve())


def move_base_path(folder: Path, before: Path, artifact: Path) -> None:
    """Correct the path to the dense model in a report that was copied to a folder from the artifact `before`.

    Args:
        artifact: where the folder's contents will lie.
    """
    report = read_json_object(folder / REPORT_FILE)
    if report.get("base_path"):
        place = before / report["base_path"]
        report["base_path"] = base_path(place, artifact) if place.is_dir() else None
        write_json(folder / REPORT_FILE, report)


def file_names(folder: Path) -> list[str]:
    """Paths of all files in a folder and its subfolders, relative to it, with "/" on every system."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def register_files(folder: Path, names: Iterable[str]) -> None:
    """Add files to those that the conversion report lists, so that the artifact can be replaced as a whole.

    Files that no longer exist are taken off the list.

    Args:
        folder: an artifact.
        names: of files inside it.

    Raises:
        CheckpointError: the folder is no artifact, or its report is damaged.
        OSError: the report cannot be written.
    """
    report = read_artifact(folder)[1]
    names = {*report.get("files", ()), *names}
    report["files"] = sorted(name for name in names if (folder / name).is_file())
    write_json(folder / REPORT_FILE, report)


def listed_files(report: dict) -> list[str]:
    """The files that a conversion report lists, without entries that name no file inside the folder."""
    names = report.get("files")
    names = names if isinstance(names, list) else []
    return [name for name in names if isinstance(name, str) and stays_inside(name)]


def own_files(folder: Path) -> list[str]:
    """The artifact's own files: those that its report lists, and the weights that transformers would load.

    A training loop may have rewritten the weights in other files. Other files in the folder, such as training
    checkpoints and notes, do not belong to the artifact.

    Raises:
        CheckpointError: the folder is no artifact, its report lists files outside of it, or a file is missing
            without which it does not load.
    """
    report = read_artifact(folder)[1]
    listed = listed_files(report)
    if listed != report.get("files"):
        raise CheckpointError(
            f"'{folder / REPORT_FILE}' lists as files {one_line(str(report.get('files')), 80)}; expected "
            "names of files inside: convert again"
        )
    weights, _, index = weight_files(Folder(str(folder), folder))
    for name in weights:
        read_header(folder / name, name)
    needed = {*weights, *filter(None, [index]), *_code_files(folder), "config.json", REPORT_FILE}
    if missing := sorted(name for name in needed if not (folder / name).is_file()):
        raise CheckpointError(f"'{folder}' lacks {few(missing)}, which it needs to load: convert again")
    beside = {name for name in listed if not is_weights(name) and (folder / name).is_file()}
    return sorted(needed | beside)


def _code_files(folder: Path) -> set[str]:
    """The names of an artifact's Python files: the modelling file, and the custom code of its source."""
    block = read_json_object(folder / "config.json")["mpoe"]
    architecture = Architecture({"auto_map": block.get("base_auto_map")}, code_of_artifact(folder, block))
    own = {path.name for path in files(folder, architecture)}
    return own | {MODELING_FILE} | ({GLUE_FILE} if architecture.is_custom else set())


def files_in_folders(folder: Path) -> list[str]:
    """The artifact's own files in subfolders that belong to any model made of it.

    They are custom generation, chat templates and the modules of a sentence encoder. Pictures show the
    artifact itself.

    Raises:
        CheckpointError: the folder is no artifact, or its report is damaged.
    """
    listed = listed_files(read_artifact(folder)[1])
    modules = module_files(folder, listed)
    kept = [name for name in listed if fnmatchcase(name, CHAT_TEMPLATES) or name in {*modules, GENERATE_FILE}]
    return [name for name in kept if (folder / name).is_file()]


def is_weights(name: str) -> bool:
    """Whether a file of that name is the model's weights or their index; modules have theirs in folders."""
    return "/" not in name and name.endswith((".safetensors", ".safetensors.index.json"))


def keeps_routers(config: dict) -> bool:
    """Whether a config.json is of an artifact whose source was a mixture: its routers are stock ones."""
    return bool((config.get("mpoe") or {}).get("family", {}).get("experts"))


def base_config(config: dict) -> dict:
    """config.json of the dense base, reconstructed from the config.json of an artifact."""
    runtime = modeling()
    ours = {"auto_map", "mpoe", "quantization_config", *runtime.OPTIONS}
    if keeps_routers(config):
        ours -= STOCK_OPTIONS
    base = {key: value for key, value in config.items() if key not in ours}
    base["model_type"] = config["model_type"].removeprefix(runtime.MODEL_TYPE_PREFIX)
    base["architectures"] = [
        name.removeprefix(runtime.CLASS_PREFIX) for name in config.get("architectures") or ()
    ]
    if auto_map := (config.get("mpoe") or {}).get("base_auto_map"):
        base["auto_map"] = auto_map
    return base
