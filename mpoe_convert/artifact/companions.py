"""Companions: the files that travel with the weights (tokenizer, licence, chat templates, custom code)."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..source.architecture import Architecture
from ..source.checkpoint import Checkpoint
from ..source.custom_code import files, localised, naming_files
from ..source.json_files import read_json_object, write_json


def copy_companions(folder: Path, checkpoint: Checkpoint, architecture: Architecture) -> None:
    """Copy tokenizer, licence and the other companions unchanged, and the custom code if it may run.

    Args:
        folder: the artifact that is being written.
        checkpoint: the source.
        architecture: of the source; its `code` is None where custom code must not run.

    Raises:
        OSError: a file cannot be read or written.
        FamilyError: a file of the custom code has the name of one that this tool writes.
    """
    for path in checkpoint.companion_files():
        copy = folder / path.relative_to(checkpoint.folder)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, copy)
    for path in files(checkpoint.folder, architecture):
        shutil.copyfile(path, folder / path.name)
    for path in naming_files(folder):
        _keep_auto_map(path, architecture.code is not None)


def _keep_auto_map(path: Path, keeps: bool) -> None:
    """Let the auto_map name the copied files, or remove it: an entry whose file is missing fails to load."""
    config = read_json_object(path)
    if "auto_map" not in config:
        return
    rest = {key: value for key, value in config.items() if key != "auto_map"}
    write_json(path, rest | {"auto_map": localised(config["auto_map"])} if keeps else rest)
