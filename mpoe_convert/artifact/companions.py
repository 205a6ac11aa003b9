"""Companions: the files that travel with the weights (tokenizer, licence, chat templates, custom code)."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..source.architecture import Architecture
from ..source.checkpoint import Checkpoint
from ..source.custom_code import files, localised, naming_files
from ..source.json_files import read_json_object, write_json
from ..source.sentence_encoder import PICKLED_WEIGHTS, SAFE_WEIGHTS
from ..source.torch_file import BinReader
from .weight_files import save_shard


def copy_companions(folder: Path, checkpoint: Checkpoint, architecture: Architecture) -> None:
    """Copy tokenizer, licence and the other companions unchanged, and the custom code if it may run.

    Only a pickle with the weights of a sentence encoder's module is written anew, as safetensors.

    Args:
        folder: the artifact that is being written.
        checkpoint: the source.
        architecture: of the source; its `code` is None where custom code must not run.

    Raises:
        OSError: a file cannot be read or written.
        FamilyError: a file of the custom code has the name of one that this tool writes.
        CheckpointError: a file is damaged, or a pickle holds more than tensors.
    """
    for path in checkpoint.companion_files():
        copy = folder / path.relative_to(checkpoint.folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.name == PICKLED_WEIGHTS:
            _write_safely(path, copy.with_name(SAFE_WEIGHTS))
        else:
            shutil.copyfile(path, copy)
    for path in files(checkpoint.folder, architecture):
        shutil.copyfile(path, folder / path.name)
    for path in naming_files(folder):
        _keep_auto_map(path, architecture.code is not None)


def _write_safely(pickled: Path, path: Path) -> None:
    """Write the tensors of a pickle, which is read without running anything, as safetensors."""
    reader = BinReader()
    headers, _ = reader.headers(pickled, pickled.name)
    save_shard({name: reader.read(pickled, name) for name in headers}, path)


def _keep_auto_map(path: Path, keeps: bool) -> None:
    """Let the auto_map name the copied files, or remove it: an entry whose file is missing fails to load."""
    config = read_json_object(path)
    if "auto_map" not in config:
        return
    rest = {key: value for key, value in config.items() if key != "auto_map"}
    write_json(path, rest | {"auto_map": localised(config["auto_map"])} if keeps else rest)
