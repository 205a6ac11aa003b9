"""What an artifact consists of, read from its config, its report and its tensor headers."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ..request import as_path
from ..source.safetensors_file import TensorInfo, read_header
from .layout import MODELING_FILE, file_names, read_artifact


@dataclass(frozen=True)
class Summary:
    """What an artifact consists of.

    Attributes:
        folder: where it is.
        config: its config.json.
        report: its conversion report.
        parts: a kind of tensor, such as "routers" -> (number of tensors, parameters, bytes).
        files: a path inside the folder -> bytes.
    """

    folder: str
    config: dict
    report: dict
    parts: dict[str, tuple[int, int, int]]
    files: dict[str, int]

    @property
    def heads(self) -> tuple[str, ...]:
        """The Auto classes that load it."""
        entries = self.config["auto_map"].items()
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
            "auto_map": self.config["auto_map"],
            "mpoe": block,
            "recipe": self.report["recipe"],
            "parts": parts,
            "files": self.files,
            "fewer_experts": self.report.get("fewer_experts"),
            "max_relative_error": self.report["max_relative_error"],
            "max_clone_drift": self.report["max_clone_drift"],
            "warnings": self.report["warnings"],
        }


def inspect(folder: str | Path) -> Summary:
    """Summarise an artifact. Reads headers only.

    Raises:
        CheckpointError: the folder is no artifact of this tool, or a weight file is damaged.
    """
    folder = as_path("folder", folder)
    config, report = read_artifact(folder)
    tensors: list[TensorInfo] = []
    for path in sorted(folder.glob("*.safetensors")):
        tensors += read_header(path, path.name).values()
    parts: dict[str, tuple[int, int, int]] = {}
    for tensor in tensors:
        part = part_of(tensor.name, len(tensor.shape))
        count, params, size = parts.get(part, (0, 0, 0))
        parts[part] = (count + 1, params + prod(tensor.shape), size + tensor.num_bytes)
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
    if tail.startswith("central_"):
        return "central tensors (shared)"
    if tail.startswith("aux_"):
        return "auxiliary tensors (per expert)"
    if ".router." in name:
        return "routers"
    if name.endswith((".up.bias", ".down.bias", ".gate.bias")):
        return "biases (shared)" if num_dims == 1 else "biases (per expert)"
    return "copied from the base"
