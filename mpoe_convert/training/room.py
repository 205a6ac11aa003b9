"""How much disk a run takes: its checkpoints, with the optimizer's state, and the model that it writes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ..artifact.folder import check_space

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn
    from transformers import TrainingArguments

    from .trainer import MpoeTrainer, Watch

# Bytes per parameter in a checkpoint: weights are float32, and so are Adam's two moments of what is trained.
WEIGHT_BYTES, MOMENT_BYTES = 4, 8


def check_room(trainer: MpoeTrainer, output: Path, result_bytes: int, watch: Watch) -> None:
    """Say how much disk a run takes at most.

    Args:
        trainer, result_bytes: as of `disk_bytes`.
        output: folder to write; what it holds has its room.
        watch: is told.

    Raises:
        OutputError: there is less.
    """
    needed = disk_bytes(trainer, result_bytes)
    held = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    check_space(output, needed - held, "the run")
    watch(f"needs up to {needed / 1e6:,.1f} MB in '{output}'", 0, 0)


def disk_bytes(trainer: MpoeTrainer, result_bytes: int) -> int:
    """Bytes that a run takes at most on the disk, by its weights and its optimizer's state.

    A new checkpoint is whole before an old one goes, and checkpoints stay until the result is there.

    Args:
        trainer: as it was made, before the first step.
        result_bytes: of the model that is written in the end.
    """
    parameters = list(cast("nn.Module", trainer.model).parameters())
    copies = 2 if trainer.is_fsdp_enabled else 1  # the model's, and that of the shards
    trained = 0 if trainer.args.save_only_model else sum(p.numel() for p in parameters if p.requires_grad)
    checkpoint = copies * WEIGHT_BYTES * sum(p.numel() for p in parameters) + MOMENT_BYTES * trained
    saves = num_saves(trainer.args, len(cast("Dataset", trainer.train_dataset)))
    limit = trainer.args.save_total_limit
    kept = min(saves, max(limit, 1 + trainer.args.load_best_model_at_end) if limit else saves)
    return max(min(saves, kept + 1) * checkpoint, kept * checkpoint + result_bytes)


def num_saves(args: TrainingArguments, num_examples: int) -> int:
    """How many checkpoints a run saves."""
    batches = math.ceil(num_examples / (args.train_batch_size * args.world_size))
    per_epoch = math.ceil(batches / args.gradient_accumulation_steps)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)
    if args.save_strategy == "no":
        return 0
    if args.save_strategy == "epoch":
        return math.ceil(steps / per_epoch)
    every = args.save_steps if args.save_steps >= 1 else math.ceil(steps * args.save_steps)
    return math.ceil(steps / every)
