"""Keep the moments of a calibration on disk, under a hash of everything they depend on."""

from __future__ import annotations

import hashlib
import json
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..artifact.folder import TemporaryFolder, check_space
from ..source import custom_code
from .dense_run import DenseRun
from .moments import FFNMoments, observed_side

FORMAT = 8


@dataclass(frozen=True)
class Calibration:
    """The moments of every FFN, on disk.

    Attributes:
        folder: two safetensors files per FFN, by its number in the plan: "0-moments", "0-gradients".
        paths: of the FFNs, in the plan's order.
        tokens: of the calibration text, held-out tokens included; 0 for inputs that are not text.
    """

    folder: Path
    paths: tuple[str, ...]
    tokens: int

    @classmethod
    def of(cls, run: DenseRun) -> Calibration:
        """Where the moments of a run are, or will be."""
        tokens = sum(batch["input_ids"].numel() for batch in run.batches if "input_ids" in batch)
        return cls(_folder(run), tuple(ffn.ffn.path for ffn in run.plan.ffns), tokens)

    def file(self, path: str, what: str = "moments") -> Path:
        """The file of the FFN in the layer at `path`. `what`: "moments" or "gradients"."""
        return self.folder / f"{self.paths.index(path)}-{what}.safetensors"

    def missing(self, what: str = "moments") -> list[str]:
        """Paths of the FFNs that have no such file yet."""
        return [path for path in self.paths if not self.file(path, what).is_file()]

    def check_space(self, num_bytes: int) -> None:
        """Raises OutputError if the disk has less room than what is to be saved takes."""
        check_space(self.folder, num_bytes, "the calibration", "point HF_ASSETS_CACHE at a larger disk")

    def save(self, path: str, tensors: dict[str, Tensor], what: str = "moments") -> None:
        """Write a file; it appears whole. What a run that was killed meanwhile has left there is removed."""
        from safetensors.torch import save_file

        file = self.file(path, what)
        with closing(TemporaryFolder("unfinished-", self.folder)) as folder:
            unfinished = folder.path / file.name
            save_file(tensors, unfinished)
            unfinished.replace(file)

    def load(self, path: str) -> FFNMoments:
        """The moments at the FFN in the layer at `path`, with gradients if they were taken."""
        from safetensors.torch import load_file

        gradients = self.file(path, "gradients")
        return FFNMoments(load_file(self.file(path)) | (load_file(gradients) if gradients.is_file() else {}))


def _folder(run: DenseRun) -> Path:
    """Named after weights, config, custom code, observed sides and batches."""
    from huggingface_hub import cached_assets_path

    checkpoint = run.checkpoint
    key = hashlib.sha256(json.dumps([FORMAT, checkpoint.config], sort_keys=True).encode())
    key.update(repr([(ffn.ffn, [observed_side(m) for m in ffn.matrices]) for ffn in run.plan.ffns]).encode())
    for name in checkpoint.stored_files:
        with (checkpoint.folder / name).open("rb") as file:
            key.update(hashlib.file_digest(file, "sha256").digest())
    for path in custom_code.files(checkpoint.folder, checkpoint.architecture):
        key.update(hashlib.sha256(path.read_bytes()).digest())
    for batch in run.batches:
        for name, tensor in sorted(batch.items()):
            key.update(name.encode() + str((tensor.dtype, tuple(tensor.shape))).encode())
            key.update(tensor.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return cached_assets_path("mpoe-convert", namespace="calibration", subfolder=key.hexdigest()[:32])
