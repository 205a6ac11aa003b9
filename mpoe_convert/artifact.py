"""The written folder: its config, its code, its companion files, and how it appears whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .architecture import Architecture
from .checkpoint import Checkpoint, read_json_object, stays_inside, weight_files
from .errors import CheckpointError, OutputError
from .hub_errors import one_line
from .planning import Plan
from .runtime import MODELING_PATH
from .safetensors_header import read_header
from .source_code import GLUE_FILE, code_of_artifact, files, glue, localised, naming_files

MODELING_FILE = "modeling_mpoe.py"
REPORT_FILE = "conversion_report.json"
RECIPE_FILE = "mpoe_recipe.yaml"
CARD_FILE = "README.md"
TRAINING_REPORT_FILE = "training_report.json"
EXPORT_REPORT_FILE = "export_report.json"
EVALUATION_REPORT_FILE = "evaluation_report.json"
# What `verify` and `inspect` read of a report.
_REPORT_KEYS = {
    *("base_model", "revision", "model_type", "recipe", "max_relative_error", "max_clone_drift", "warnings")
}


def is_artifact(folder: Path) -> bool:
    """Whether the folder was written by this tool: it says so in its config and holds the report."""
    try:
        config = read_json_object(folder / "config.json")
    except (OSError, CheckpointError):
        return False
    return "mpoe" in config and (folder / REPORT_FILE).is_file()


def read_artifact(folder: Path) -> tuple[dict, dict]:
    """(config, conversion report) of an artifact.

    Raises:
        CheckpointError: the folder is no artifact of this tool, or its report is damaged.
    """
    if not is_artifact(folder):
        what = "is not an artifact of mpoe-convert" if folder.is_dir() else "is not a folder"
        raise CheckpointError(
            f"{folder} {what}: expected a folder that a conversion wrote, with {REPORT_FILE} and a "
            "config.json with an mpoe block"
        )
    path = folder / REPORT_FILE
    try:
        report = read_json_object(path, "a conversion report", remedy="convert again")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): check its permissions") from None
    if lacks := sorted(_REPORT_KEYS - set(report)):
        raise CheckpointError(f"{path} is damaged (it lacks {lacks}): convert again")
    return read_json_object(folder / "config.json"), report


def file_names(folder: Path) -> list[str]:
    """The files in a folder and its subfolders, by their paths inside it, with "/" on every system."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def register_files(folder: Path, names: Iterable[str]) -> None:
    """Count files that were added to an artifact among its own, so that it can be replaced as a whole.

    Files that are gone do not count any more.
    """
    report = read_artifact(folder)[1]
    names = {*report.get("files", ()), *names}
    report["files"] = sorted(name for name in names if (folder / name).is_file())
    write_json(folder / REPORT_FILE, report)


def listed_files(report: dict) -> list[str]:
    """The files that a conversion report lists, without what is no file inside the artifact."""
    names = report.get("files")
    names = names if isinstance(names, list) else []
    return [name for name in names if isinstance(name, str) and stays_inside(name)]


def own_files(folder: Path) -> list[str]:
    """The files that make up an artifact: those that its report lists, and the weights that load.

    A training loop may have written the weights anew, in other files. Whatever else lies in the folder, such
    as checkpoints and notes, is not the artifact's.

    Raises:
        CheckpointError: it is no artifact, lists what lies outside, or lacks what it needs to load.
    """
    report = read_artifact(folder)[1]
    listed = listed_files(report)
    if listed != report.get("files"):
        raise CheckpointError(
            f"{folder / REPORT_FILE} lists as files {one_line(str(report.get('files')), 80)}; expected names "
            "of files inside: convert again"
        )
    weights, _, index = weight_files(str(folder), folder, None)
    for name in weights:
        read_header(folder / name, name)
    needed = {*weights, *filter(None, [index]), *_code_files(folder), "config.json", REPORT_FILE}
    if missing := sorted(name for name in needed if not (folder / name).is_file()):
        raise CheckpointError(f"{folder} lacks {', '.join(missing)}, which it needs to load: convert again")
    beside = {name for name in listed if not is_weights(name) and (folder / name).is_file()}
    return sorted(needed | beside)


def _code_files(folder: Path) -> set[str]:
    """The names of an artifact's code: the modelling file, and what it has from its source."""
    block = read_json_object(folder / "config.json")["mpoe"]
    architecture = Architecture({"auto_map": block.get("base_auto_map")}, code_of_artifact(folder, block))
    own = {path.name for path in files(folder, architecture)}
    return own | {MODELING_FILE} | ({GLUE_FILE} if architecture.is_own else set())


def is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".safetensors.index.json"))


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse, before any work, an output that could not or must not be written.

    Raises:
        OutputError: it would replace something that is not ours, or its parent is not writable.
    """
    try:
        target = output.resolve()
        if output.is_symlink() or (output.exists() and not output.is_dir()):
            raise OutputError(f"{output} exists and is not a folder; choose another output")
        if target == Path.cwd():
            raise OutputError(f"the output {output} is the current folder; name one that can be replaced")
        if output.is_dir() and any(output.iterdir()):
            _check_replaceable(output, overwrite)
        parent = _existing_parent(target)
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise OutputError(f"cannot write {output}: {parent} is not writable; choose another output")
    except OSError as error:
        raise _output_error(error, output) from error


def check_fit(output: Path, source: Path | None, num_bytes: int) -> None:
    """Refuse an output that touches the source folder, or a disk that is too full.

    Raises:
        OutputError: with both sizes, or both folders.
    """
    target = output.resolve()
    if source is not None:
        source = source.resolve()
        if target == source or source in target.parents or target in source.parents:
            raise OutputError(
                f"the output {output} and the source {source} lie inside each other; choose a folder "
                "outside the source"
            )
    parent = _existing_parent(target)
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        raise OutputError(
            f"the artifact needs {num_bytes / 1e6:,.1f} MB and {parent} has {free / 1e6:,.1f} MB free; "
            "free some space or choose another output"
        )


def _existing_parent(target: Path) -> Path:
    return next((parent for parent in target.parents if parent.exists()), target)


def _check_replaceable(output: Path, overwrite: bool) -> None:
    is_export = (output / EXPORT_REPORT_FILE).is_file()
    if not is_export and not is_artifact(output):
        raise OutputError(
            f"{output} is not empty and not an artifact of mpoe-convert; nothing in it is touched, "
            "choose another output"
        )
    if not overwrite:
        what = "export" if is_export else "artifact"
        raise OutputError(f"{output} already holds an {what}; pass --overwrite to replace it")
    try:
        report = read_json_object(output / EXPORT_REPORT_FILE) if is_export else read_artifact(output)[1]
        files = [Path(name) for name in report.get("files", ())]
    except CheckpointError as error:
        raise OutputError(f"{error}; nothing in it is touched, choose another output") from None
    written = {*files, *(parent for file in files for parent in file.parents)}
    entries = (path.relative_to(output) for path in output.rglob("*"))
    foreign = sorted(entry.as_posix() for entry in entries if entry not in written)
    if foreign:
        raise OutputError(
            f"{output} also holds {', '.join(foreign[:4])}, which mpoe-convert did not write; move "
            "them away or choose another output"
        )


@contextmanager
def staged(output: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `output` when the block ends well, and is removed if not.

    Raises:
        OutputError: the disk is full or the folder cannot be written.
    """
    with scratch(output) as folder:
        yield folder
        mask = _umask()  # temporary folders and safetensors files are private to their owner
        folder.chmod(0o777 & ~mask)
        for path in folder.rglob("*"):
            path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
        _move_into_place(folder, output, overwrite)


@contextmanager
def scratch(output: Path) -> Iterator[Path]:
    """A folder beside the output that is removed when the block ends.

    It is always called the same: transformers keeps a copy of an artifact's code by the name of its folder.

    Raises:
        OutputError: as `staged`.
    """
    outer = None
    made = [parent for parent in output.parents if not parent.exists()]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        outer = _sibling(output, ".partial")
        folder = outer / "artifact"
        folder.mkdir()
        yield folder
    except OSError as error:
        raise _output_error(error, output) from error
    finally:
        if outer is not None:
            shutil.rmtree(outer, ignore_errors=True)
        for parent in made:  # those that hold the artifact now are not empty and stay
            with suppress(OSError):
                parent.rmdir()


def _sibling(output: Path, suffix: str) -> Path:
    """A new hidden folder beside the output; a long name is cut, since ours is longer."""
    return Path(tempfile.mkdtemp(prefix=f".{output.name[:40]}.", suffix=suffix, dir=output.parent))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _move_into_place(folder: Path, output: Path, overwrite: bool) -> None:
    """Replace `output` by `folder`; an old artifact is put aside first and comes back on failure."""
    if not output.exists():
        os.replace(folder, output)
        return
    if any(output.iterdir()):
        _check_replaceable(output, overwrite)  # again: it may have changed meanwhile
    aside = _sibling(output, ".old")
    try:
        os.replace(output, aside)
        os.replace(folder, output)
    finally:
        if not output.exists():  # stopped between the two
            os.replace(aside, output)
        shutil.rmtree(aside, ignore_errors=True)


def _output_error(error: OSError, output: Path) -> OutputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(f"the disk is full; nothing was left at {output}: free some space and run again")
    reason = error.strerror or str(error)
    where = f" ({Path(error.filename).name})" if error.filename else ""
    return OutputError(
        f"cannot write {output}: {reason}{where}; nothing was left there, repair this or choose another"
    )


# ---------------------------------------------------------------------------------------------------
# config.json


def make_config(plan: Plan, architecture: Architecture) -> dict:
    """The base config plus our model type, the Auto classes' entries and the one `mpoe` block."""
    from .runtime.modeling_mpoe import CLASS_PREFIX, FORMAT_VERSION, MODEL_TYPE_PREFIX

    config = architecture.config
    forms: list[dict] = []
    ffns = {}
    for ffn in plan.ffns:
        if ffn.form not in forms:
            forms.append(ffn.form)
        ffns[ffn.ffn.path] = forms.index(ffn.form)
    names = architecture.heads
    auto_map = _auto_map(architecture)
    architectures = config.get("architectures") or [names.get("AutoModel") or next(iter(names.values()))]
    changes = {
        "model_type": MODEL_TYPE_PREFIX + plan.model_type,
        "architectures": [CLASS_PREFIX + name for name in architectures],
        "auto_map": auto_map,
        "mpoe": {
            "format": FORMAT_VERSION,
            "base_model_type": plan.model_type,
            "kind": plan.recipe.kind,
            "num_experts": plan.recipe.experts,
            "top_k": plan.recipe.top_k,
            "family": plan.family.runtime(),
            "forms": forms,
            "ffns": ffns,
        },
    }
    if architecture.auto_map:
        changes["mpoe"]["base_auto_map"] = architecture.auto_map
    if plan.recipe.dtype:
        config = {key: value for key, value in config.items() if key != "torch_dtype"}
        changes["dtype"] = plan.recipe.dtype
    return config | changes


def _auto_map(architecture: Architecture) -> dict:
    """Own classes are subclassed in a module of their own. Entries of tokenizers and processors stay."""
    from .runtime.modeling_mpoe import CLASS_PREFIX

    module = Path(GLUE_FILE if architecture.is_own else MODELING_FILE).stem
    classes = {"AutoConfig": architecture.config_class.__name__, **architecture.heads}
    return architecture.auto_map | {auto: f"{module}.{CLASS_PREFIX}{name}" for auto, name in classes.items()}


def base_config(config: dict) -> dict:
    """config.json of the dense base, from that of an artifact."""
    from .runtime.modeling_mpoe import CLASS_PREFIX, MODEL_TYPE_PREFIX, OPTIONS

    ours = {"auto_map", "mpoe", *OPTIONS}
    base = {key: value for key, value in config.items() if key not in ours}
    base["model_type"] = config["model_type"].removeprefix(MODEL_TYPE_PREFIX)
    base["architectures"] = [name.removeprefix(CLASS_PREFIX) for name in config.get("architectures") or ()]
    if auto_map := (config.get("mpoe") or {}).get("base_auto_map"):
        base["auto_map"] = auto_map
    return base


# ---------------------------------------------------------------------------------------------------
# Files beside the weights


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_companions(folder: Path, checkpoint: Checkpoint, architecture: Architecture) -> None:
    """Tokenizer, licence and what else lies beside the weights, as it is; with code that may run, or none."""
    for path in checkpoint.companion_files():
        copy = folder / path.relative_to(checkpoint.folder)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
    for path in files(checkpoint.folder, architecture):
        shutil.copyfile(path, folder / path.name)
    for path in naming_files(folder):
        _keep_auto_map(path, architecture.code is not None)


def write_companions(folder: Path, plan: Plan, checkpoint: Checkpoint) -> None:
    """config.json, the modelling file, and everything that belongs to the model but its weights."""
    from .runtime.modeling_mpoe import CLASS_PREFIX

    architecture = checkpoint.architecture
    copy_companions(folder, checkpoint, architecture)
    _name_tokenizer_class(folder, plan.model_type, checkpoint.config.get("tokenizer_class"))
    write_json(folder / "config.json", make_config(plan, architecture))
    shutil.copyfile(MODELING_PATH, folder / MODELING_FILE)
    if architecture.is_own:
        text = glue(architecture, Path(MODELING_FILE).stem, CLASS_PREFIX)
        (folder / GLUE_FILE).write_text(text, encoding="utf-8")


def _keep_auto_map(path: Path, keeps: bool) -> None:
    """Name the source's own code where it was copied to, or forget it: an entry without its file fails."""
    config = read_json_object(path)
    if "auto_map" not in config:
        return
    rest = {key: value for key, value in config.items() if key != "auto_map"}
    write_json(path, rest | {"auto_map": localised(config["auto_map"])} if keeps else rest)


def _name_tokenizer_class(folder: Path, model_type: str, configured: str | None) -> None:
    """Write the class that transformers would find for the source into tokenizer_config.json.

    Without it a tokenizer beside an unknown model type loads as a bare backend without special tokens.
    A class that the file names stays, unless it belongs to code that is not part of transformers and did not
    come along.
    """
    path = folder / "tokenizer_config.json"
    known = (
        "tokenizer.json",
        "vocab.json",
        "vocab.txt",
        "spiece.model",
        "tokenizer.model",
        "source.spm",
    )
    if not path.exists() and not any((folder / name).exists() for name in known):
        return
    config = read_json_object(path) if path.exists() else {}
    if "auto_map" in config:
        return
    named = config.get("tokenizer_class")
    candidates = (named, configured, _stock_tokenizer_class(model_type))
    name = next((name for name in candidates if _is_in_transformers(name)), None)
    if name and name != named:
        write_json(path, config | {"tokenizer_class": name})


def _stock_tokenizer_class(model_type: str) -> str | None:
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    stock = TOKENIZER_MAPPING_NAMES.get(model_type)
    names = stock if isinstance(stock, (tuple, list)) else (stock,)
    return next((name for name in reversed(names) if name), None)


def _is_in_transformers(name: object) -> bool:
    """Whether transformers has this tokenizer class, be it under its older or newer name."""
    import transformers

    if not name or not isinstance(name, str):
        return False
    stem = name.removesuffix("Fast")
    return hasattr(transformers, stem) or hasattr(transformers, stem + "Fast")
