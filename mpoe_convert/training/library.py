"""transformers' Trainer and what belongs to it; without what it needs, its import says what to install."""

from __future__ import annotations

from ..extras import need

try:
    from accelerate import PartialState
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config
    from transformers.trainer_utils import rotate_checkpoints
except ImportError:
    need("fine-tuning", "accelerate", "datasets", extra="train")
    raise

__all__ = [
    "PartialState",
    "PrinterCallback",
    "Trainer",
    "TrainerCallback",
    "TrainingArguments",
    "rotate_checkpoints",
    "set_seed",
    "unset_hf_deepspeed_config",
]
