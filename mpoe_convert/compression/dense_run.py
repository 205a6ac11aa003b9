"""The calibration session: a dense model, the batches it runs on, and where."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..planning.plan import Plan
from ..ranks import ALONE, Ranks
from ..source.checkpoint import Checkpoint
from .batches import Batch, is_causal, share_of, split
from .stream import load_dense, streamed_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Called with (what is worked on, steps done, steps in all).
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class DenseRun:
    """A dense model on calibration batches.

    Attributes:
        plan: the FFNs and matrices that are converted.
        checkpoint: of the dense model.
        batches: model inputs. `attention_mask` and the `labels` of decoders mark padding; other `labels` mark
            the predictions that are scored (see `batches.prediction_mask`).
        device: where the model runs.
        ranks: the processes that share the batches.
    """

    plan: Plan
    checkpoint: Checkpoint
    batches: tuple[Batch, ...]
    device: torch.device
    ranks: Ranks = ALONE

    @property
    def own(self) -> list[int]:
        """Numbers of the batches that this process runs, see `share_of`."""
        return share_of(self.batches, self.ranks)

    @property
    def is_spare(self) -> bool:
        """Whether there are fewer batches than processes, and what this one runs counts elsewhere."""
        return self.ranks.rank >= len(self.batches)

    @property
    def fitted_to(self) -> list[Batch]:
        """The batches that matrices are fitted to."""
        return split(self.batches)[0]

    @property
    def held_out(self) -> list[Batch]:
        """The batches that only measure."""
        return split(self.batches)[1]

    @property
    def is_causal(self) -> bool:
        return is_causal(self.checkpoint)

    def streamed(self) -> AbstractContextManager[PreTrainedModel]:
        """The model with one block in memory at a time."""
        paths = [*(ffn.ffn.path for ffn in self.plan.ffns), *self.plan.kept_dense]
        return streamed_model(self.checkpoint, paths, self.device)

    def in_memory(self, dtype: str | torch.dtype) -> PreTrainedModel:
        """The whole model."""
        return load_dense(self.checkpoint, self.device, dtype=dtype)
