"""What an artifact consists of, read from its config, its report and its tensor headers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ..request import as_path
from ..source.checkpoint import weight_files
from ..source.repository import Folder
from ..source.safetensors_file import read_header, read_tensor
from .block import checked_artifact
from .layout import MODELING_FILE, file_names, is_weights
from .rounding import PACKED, SCALE, SHAPE, bits_of

# A tensor that stands for a rounded core, or for one expert's part of a stack.
_ROUNDED = re.compile(rf"(central|aux)_\d+(\.\d+)?\.({PACKED}|{SCALE}|{SHAPE})$")


@dataclass(frozen=True)
class Summary:
    """What an artifact consists of.

    Attributes:
        folder: where it is.
        config: its config.json.
        report: its conversion report.
        parts: a kind of tensor, such as "routers" -> (number of tensors, parameters, bytes). The numbers of a
            rounded core count as parameters, its scales as bytes alone.
        files: a path inside the folder -> bytes.
    """

    folder: str
    config: dict
    report: dict
    parts: dict[str, tuple[int, int, int]]
    files: dict[str, int]

    @property
    def bits(self) -> int | None:
        """Of the rounded cores; None: none is rounded."""
        return bits_of(self.config) or None

    @property
    def heads(self) -> tuple[str, ...]:
        """The Auto classes that load it."""
        entries = (self.config.get("auto_map") or {}).items()
        ours = (auto for auto, name in entries if str(name).startswith(Path(MODELING_FILE).stem))
        return tuple(auto for auto in ours if auto != "AutoConfig")

    def to_json(self) -> dict[str, Any]:
        """The summary as `inspect --json` prints it."""
        names = ("tensors", "parameters", "bytes")
        parts = {part: dict(zip(names, counts, strict=True)) for part, counts in self.parts.items()}
        block = {k: v for k, v in self.config["mpoe"].items() if k != "family"}
        return {
            "folder": self.folder,
            "model_type": self.config["model_type"],
            "auto_map": self.config.get("auto_map"),
            "mpoe": block,
            "recipe": self.report["recipe"],
            "parts": parts,
            "bits": self.bits,
            "files": self.files,
            "fewer_experts": self.report.get("fewer_experts"),
            "max_relative_error": self.report["max_relative_error"],
            "max_clone_drift": self.report["max_clone_drift"],
            "warnings": self.report["warnings"],
        }


def inspect(folder: str | Path) -> Summary:
    """Summarise an artifact. Reads headers, and of rounded cores the shapes.

    Raises:
        CheckpointError: the folder is no artifact of this tool, a weight file is damaged, or config.json does
            not fit the tensors.
    """
    folder = as_path("folder", folder)
    config, report = checked_artifact(folder)
    parts: dict[str, tuple[int, int, int]] = {}
    for name in filter(is_weights, weight_files(Folder(str(folder), folder))[0]):
        path = folder / name
        for tensor in read_header(path, path.name).values():
            part, numbers = part_of(tensor.name, len(tensor.shape)), prod(tensor.shape)
            if tensor.name.endswith((PACKED, SCALE, SHAPE)) and _ROUNDED.search(tensor.name):
                is_shape = tensor.name.endswith(SHAPE)
                numbers = int(read_tensor(path, tensor.name).prod()) if is_shape else 0
            count, params, size = parts.get(part, (0, 0, 0))
            parts[part] = (count + 1, params + numbers, size + tensor.num_bytes)
    return Summary(
        folder=str(folder),
        config=config,
        report=report,
        parts=parts,
        files={name: (folder / name).stat().st_size for name in file_names(folder)},
    )


def part_of(name: str, num_dims: int) -> str:
    """Which part of the artifact a tensor belongs to, by its name and whether it has an expert axis."""
    tail = name.rpartition(".")[2]
    if rounded := _ROUNDED.search(name):
        tail = rounded[0]
    if tail.startswith("central_"):
        return "central tensors (shared)"
    if tail.startswith("aux_"):
        return "auxiliary tensors (per expert)"
    if ".router." in name:
        return "routers"
    if name.endswith((".up.bias", ".down.bias", ".gate.bias")):
        return "biases (shared)" if num_dims == 1 else "biases (per expert)"
    return "copied from the base"
