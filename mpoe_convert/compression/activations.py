"""Activations at every FFN of the dense model on calibration text: some tokens' inputs and hidden neurons."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ..experts.ffn import Activations
from ..planning.plan import FFNPlan
from .batches import evenly_spread
from .calibrate import check_scored
from .collecting import CollectingWalk
from .dense_run import DenseRun, Progress
from .moment_cache import Calibration
from .moments import joined, merge_rows
from .shared import collect_shared
from .stream import check_activations

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Tokens that are kept per FFN: to fit to, and held out.
FITTED, HELD_OUT = 4096, 512
WHAT = "activations"

Save = Callable[[str, dict[str, Tensor]], None]


def collect(run: DenseRun, progress: Progress) -> Calibration:
    """Run the dense model over its batches, or find the activations of an earlier run over the same.

    Raises:
        DataError: too little text, or no label that is scored.
        CheckpointError: the model computes NaN or Inf.
    """
    check_scored(run)
    found = Calibration.of(run)

    def save(path: str, tensors: dict[str, Tensor]) -> None:
        found.save(path, tensors, WHAT)
        progress(path, len(found.paths) - len(found.missing(WHAT)), len(found.paths))

    if missing := found.missing(WHAT):
        collect_shared(run, _collect, missing, save, progress)
    return found


def _collect(run: DenseRun, wanted: Sequence[str], save: Save, progress: Progress) -> None:
    with run.streamed() as model:
        _Walk(run, model, wanted, save).walk_batches()


def load(found: Calibration, path: str) -> Activations:
    """The activations of the FFN in the layer at `path`, in float32."""
    from safetensors.torch import load_file

    tensors = {name: tensor.float() for name, tensor in load_file(found.file(path, WHAT)).items()}
    return Activations(**tensors)


class _Walk(CollectingWalk):
    """Keeps the activations of some tokens at each FFN."""

    def __init__(self, run: DenseRun, model: PreTrainedModel, wanted: Collection[str], save: Save) -> None:
        super().__init__(run, model, wanted)
        self.save = save
        # By name and by number of the batch, at the FFN that the passes are in.
        self.kept: dict[str, dict[int, list[Tensor]]] = {}

    def see(self, ffn: FFNPlan, place: str, x: Tensor) -> None:
        path = ffn.ffn.path
        rows = self.rows(path, x)
        check_activations(rows, f"{path} ({place})")
        wanted, batches = (HELD_OUT, self.run.held_out) if self.holds_out else (FITTED, self.run.fitted_to)
        share = -(-wanted // len(batches))
        chosen = rows[evenly_spread(len(rows), min(share, len(rows)))].cpu()
        # Hidden neurons are many, and coarse numbers will do.
        chosen = chosen.bfloat16() if place == "inner" else chosen
        name = f"held_{place}" if self.holds_out else place
        self.kept.setdefault(name, {}).setdefault(self.number, []).append(chosen)

    def finish(self, path: str) -> None:
        own = {name: joined(parts) for name, parts in self.kept.items()}
        tensors = merge_rows(own, self.run.ranks)
        if self.run.ranks.is_first:
            self.save(path, tensors)

    def release(self, ffn: FFNPlan | None, place: str) -> None:
        super().release(ffn, place)
        self.kept = {}
