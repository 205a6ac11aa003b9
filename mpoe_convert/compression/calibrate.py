"""What passes through the FFNs of a dense model: second moments of every matrix's inputs or outputs.

The stock model runs as it is, with the weights of one block after the other read from the checkpoint's
files (accelerate's disk offload). Its batches walk in step: each is a greenlet that waits where the next FFN
begins until all the others are there, so that only one FFN's moments are in memory at a time and those of
finished FFNs are on disk. They stay there, under a hash of the weights and the tokens: an interrupted run
goes on where it was, and a second one reads what the first has found.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import DataError
from ..planning.plan import FFNPlan, Plan
from ..source import custom_code
from ..source.checkpoint import Checkpoint
from ..source.families import Family
from ..source.ffn import Source
from ..source.matrices import read_bias, read_matrix
from .batches import NOTHING_COUNTS, Batch, _spread, is_held_out, says_next, split, token_rows, used_tokens
from .fisher import _answers
from .moments import FFNMoments, observed_side
from .stream import InStep, _load, check_activations, projection_modules, run_batch, streamed_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


FORMAT = 4
SAMPLE = 256

Progress = Callable[[str, int, int], None]


class _Sums:
    """Accumulates `FFNMoments` over batches."""

    def __init__(self):
        self.sums: dict[str, Tensor] = {}
        self.samples: dict[str, list[Tensor]] = {}
        self.counts: dict[str, int] = {}

    def add(self, name: str, rows: Tensor, squares_only: bool, where: str) -> None:
        """Rows (tokens, n): their products, in float32 per batch and float64 over batches, or squares."""
        if squares_only:
            squares = rows.square().sum(0)
        else:
            gram = rows.mT @ rows
            squares = gram.diagonal()
            self._sum(name, gram.double())
        check_activations(squares, where)
        self._sum(f"{name}.scale", squares.double())
        self.counts[name] = self.counts.get(name, 0) + len(rows)

    def _sum(self, name: str, value: Tensor) -> None:
        if name in self.sums:
            self.sums[name] += value
        else:
            self.sums[name] = value

    def finish(self, path: str) -> FFNMoments:
        """Raises DataError if there were fewer rows than a moment needs."""
        for name, count in self.counts.items():
            if name in self.sums and count < len(self.sums[name]):
                needed = len(self.sums[name])
                raise DataError(
                    f"{path} saw {count:,} tokens of calibration data beside those held out; expected the "
                    f"{needed:,} that moments of {needed:,} features need"
                )
        tensors = {
            name: (total / self.counts[name.removesuffix(".scale")]).float().cpu()
            for name, total in self.sums.items()
            if not name.endswith("outputs.scale")
        }
        for name, parts in self.samples.items():
            rows = torch.cat(parts)
            tensors[f"{name}.sample"] = rows[_spread(len(rows), min(SAMPLE, len(rows)))].contiguous().cpu()
        return FFNMoments(tensors)


class _Walk:
    """All batches through the model, FFN by FFN."""

    def __init__(
        self,
        model: PreTrainedModel,
        plans: Sequence[FFNPlan],
        family: Family,
        batches: Sequence[Batch],
        read_bias: Callable[[Source], Tensor],
    ):
        self.model, self.batches, self.read_bias = model, batches, read_bias
        self.plans = {plan.ffn.path: plan for plan in plans}
        self.sums: dict[str, _Sums] = {}
        self.done: set[str] = set()
        self.passes = dict.fromkeys(self.plans, 0)
        self.entered: set[str] = set()
        self.left = [sum(plan.runs_per_token for plan in plans)] * len(batches)  # FFN calls to come
        self.steps = InStep()
        self.handles = []
        for plan in plans:
            self._watch(plan, family)

    def run(self, on_done: Callable[[str, FFNMoments], None]) -> None:
        """Raises whatever the model raises; nothing keeps running."""
        inside: set[str] = set()

        def all_wait() -> None:
            for path in inside:
                self._leave(path, on_done)
            inside.clear()
            inside.update(self.entered)
            self.entered.clear()

        try:
            with torch.no_grad():
                passes = [partial(run_batch, self.model, batch) for batch in self.batches]
                self.steps.run(passes, all_wait)
        finally:
            for handle in self.handles:
                handle.remove()

    def _watch(self, plan: FFNPlan, family: Family) -> None:
        modules = projection_modules(self.model, family, plan)
        sides = {matrix.role: observed_side(matrix) for matrix in plan.matrices}
        path = plan.ffn.path

        def enter(module, args):
            self.entered.add(path)
            self.steps.wait()
            if path not in self.done:
                self._see(path, "inputs", args[0], "in" not in (sides["up"], sides.get("gate")))

        def middle(module, args):
            if path not in self.done:
                self._see(path, "inner", args[0], sides["down"] != "in")

        def leave(module, args, output):
            self.left[self.steps.current] -= 1
            if not self.left[self.steps.current]:
                self.steps.stop()  # nothing to see behind the last FFN

        def outputs(role: str):
            def hook(module, args, output):
                if path not in self.done:
                    self._see_outputs(path, role, output)

            return hook

        first = modules.get("gate", modules["up"])
        self.handles.append(first.register_forward_pre_hook(enter))
        self.handles.append(modules["down"].register_forward_pre_hook(middle))
        for role, side in sides.items():
            if side == "out":
                self.handles.append(modules[role].register_forward_hook(outputs(role)))
        self.handles.append(modules["down"].register_forward_hook(leave))

    def _rows(self, path: str, x: Tensor) -> Tensor:
        return token_rows(self.model, self.batches[self.steps.current], path, x)

    @property
    def _holds_out(self) -> bool:
        return is_held_out(self.steps.current, self.batches)

    def _see(self, path: str, place: str, x: Tensor, squares_only: bool) -> None:
        rows = self._rows(path, x)
        sums = self.sums.setdefault(path, _Sums())
        if self._holds_out:
            sums.samples.setdefault(place, []).append(rows)
        else:
            sums.add(place, rows, squares_only, f"{path} ({place})")

    def _see_outputs(self, path: str, role: str, y: Tensor) -> None:
        if self._holds_out:
            return
        source = next(m.source for m in self.plans[path].matrices if m.role == role)
        if source.part is not None:
            y = y.chunk(2, dim=-1)[source.part]
        rows = self._rows(path, y)
        if source.bias:  # from the checkpoint: the offloaded module has given its own away
            rows = rows - self.read_bias(source).to(rows)
        self.sums[path].add(f"{role}.outputs", rows, False, f"{path} (outputs of {role})")

    def _leave(self, path: str, on_done: Callable[[str, FFNMoments], None]) -> None:
        self.passes[path] += 1
        if self.passes[path] == self.plans[path].runs_per_token and path not in self.done:
            on_done(path, self.sums.pop(path).finish(path))


@dataclass(frozen=True)
class Calibration:
    """The moments of every FFN, on disk.

    Attributes:
        folder: one safetensors file per FFN, by the number of its place in the plan.
        paths: of the FFNs, in the plan's order.
        tokens: of text that the moments come from, held-out tokens included; 0 for other inputs.
    """

    folder: Path
    paths: tuple[str, ...]
    tokens: int

    def file(self, path: str, what: str = "moments") -> Path:
        return self.folder / f"{self.paths.index(path)}-{what}.safetensors"

    def load(self, path: str) -> FFNMoments:
        """Of the FFN in the layer at that path."""
        from safetensors.torch import load_file

        tensors = load_file(self.file(path))
        answers = self.file(path, "answers")
        return FFNMoments(tensors | (load_file(answers) if answers.is_file() else {}))


def calibrate(
    plan: Plan,
    checkpoint: Checkpoint,
    device: torch.device,
    batches: Sequence[Batch],
    *,
    gradients: bool = False,
    progress: Progress | None = None,
) -> Calibration:
    """Run the dense model over calibration text, or find what an earlier run over the same has left.

    Args:
        plan: what is converted.
        batches: inputs of the model; `attention_mask` and decoders' `labels` say what is padding, other
            `labels` which predictions count (see `prediction_mask`).
        gradients: also what the model's loss answers, with the whole model in memory and a backward pass.
        progress: called with (what is worked on, steps done, steps in all).

    Raises:
        DataError: too little text, or labels by which none of it counts.
        CheckpointError: the model computes NaN or Inf.
    """
    tokens = sum(batch["input_ids"].numel() for batch in batches if "input_ids" in batch)
    _check_enough(plan, batches)
    found = Calibration(_folder(plan, checkpoint, batches), tuple(f.ffn.path for f in plan.ffns), tokens)
    missing = [ffn.ffn.path for ffn in plan.ffns if not found.file(ffn.ffn.path).is_file()]
    report = progress or (lambda *_: None)

    def save(path: str, moments: FFNMoments) -> None:
        _save(moments.tensors, found.file(path))
        missing.remove(path)
        report(path, len(plan.ffns) - len(missing), len(plan.ffns))

    if missing:
        with streamed_model(plan, checkpoint, device) as model:
            walk = _Walk(model, plan.ffns, plan.family, batches, lambda source: read_bias(checkpoint, source))
            walk.done = {ffn.ffn.path for ffn in plan.ffns} - set(missing)
            walk.run(save)
    if gradients and not all(found.file(path, "answers").is_file() for path in found.paths):
        model = _load(checkpoint, dtype=_gradient_dtype(plan)).to(device)
        answers = _answers(
            model,
            plan.ffns,
            plan.family,
            batches,
            lambda source: read_matrix(checkpoint, source, device),
            lambda *n: report("gradients", *n),
            says_next(checkpoint),
        )
        for path, tensors in answers.items():
            _save(tensors, found.file(path, "answers"))
    return found


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    save_file(tensors, unfinished)
    unfinished.replace(path)


def _check_enough(plan: Plan, batches: Sequence[Batch]) -> None:
    """A moment of n features needs n tokens, and something has to be held out."""
    if len(batches) < 2:
        raise DataError(f"calibration has {len(batches)} batch; expected two or more: one is held out")
    for part, what in zip(split(batches), ("beside those held out", "that are held out"), strict=True):
        labels = [batch.get("labels") for batch in part]
        if all(each is not None and each.dim() == 2 and not (each != -100).any() for each in labels):
            raise DataError(NOTHING_COUNTS.format(what))
    needed = max(m.rows if observed_side(m) == "in" else m.cols for m in plan.matrices)
    seen = used_tokens(batches)
    if seen is not None and seen < needed:
        raise DataError(
            f"calibration has {seen:,} tokens beside those held out; expected the {needed:,} that moments of "
            f"{needed:,} features need"
        )


def _folder(plan: Plan, checkpoint: Checkpoint, batches: Sequence[Batch]) -> Path:
    """Where the moments of these weights, run by this code, on these batches are kept."""
    from huggingface_hub import cached_assets_path

    key = hashlib.sha256(json.dumps([FORMAT, checkpoint.config], sort_keys=True).encode())
    key.update(repr([(ffn.ffn, [observed_side(m) for m in ffn.matrices]) for ffn in plan.ffns]).encode())
    for name in sorted({info.file for info in checkpoint.tensors.values()}):
        with (checkpoint.folder / name).open("rb") as file:
            key.update(hashlib.file_digest(file, "sha256").digest())
    for path in custom_code.files(checkpoint.folder, checkpoint.architecture):
        key.update(hashlib.sha256(path.read_bytes()).digest())
    for batch in batches:
        for name, tensor in sorted(batch.items()):
            key.update(name.encode() + str((tensor.dtype, tuple(tensor.shape))).encode())
            key.update(tensor.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return cached_assets_path("mpoe-convert", namespace="calibration", subfolder=key.hexdigest()[:32])


def _gradient_dtype(plan: Plan) -> str | torch.dtype:
    """Gradients leave the range of float16."""
    halves = any(tensor.dtype == "float16" for tensor in plan.tensors)
    return torch.float32 if halves else "auto"
