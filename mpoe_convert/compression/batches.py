"""Calibration data: text into batches of the model's inputs, and which of their tokens count."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..artifact.loading import block_length, load_tokenizer, positions
from ..errors import DataError, RecipeError
from ..planning.recipe import BUILTIN_TEXT
from ..source import texts
from ..source.architecture import main_auto_class
from ..source.checkpoint import Checkpoint
from ..source.text_options import TextSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Tokens per forward pass: enough that reading a block's weights takes little of the time.
TOKENS_PER_BATCH = 4096
# One batch in so many is kept out of the moments; inputs of so many of its tokens measure the result.
HELD_OUT = 16

NOTHING_COUNTS = (
    "the labels of the calibration batches {} leave out every place (-100); expected some that count"
)

Batch = Mapping[str, Tensor]


def make_batches(recipe: TextSource, checkpoint: Checkpoint, token: str | None = None) -> list[Batch]:
    """Batches of the model's inputs from calibration text.

    Data with a target column are read as pairs: by encoder-decoders text and target on a side each, by
    models that say the next token one after the other, and then only what is said of the target counts.
    Else texts are read as blocks of tokens, by encoder-decoders on both sides.

    Raises:
        DataError: the data cannot be read, or are shorter than what was asked for.
        RecipeError: the model does not read text.
    """
    _check_reads_text(checkpoint)
    tokenizer = load_tokenizer(str(checkpoint.folder), trust_remote_code=checkpoint.code is not None)
    length = block_length(positions(checkpoint.architecture.make_config()))
    encode = _pairing(checkpoint) if recipe.target_column != recipe.text_column else None
    rows = _read(recipe, "seq2seq" if encode else "causal", token)
    if encode and recipe.target_column in rows.column_names:
        return _pair_batches(rows, encode, tokenizer, recipe, length)
    blocks = texts.language_blocks(rows, tokenizer, recipe.text_column, length)
    wanted = max(recipe.calibration_tokens // length, 2)
    if len(blocks) < wanted:
        raise DataError(
            f"the calibration text has {len(blocks) * length:,} tokens in blocks of {length}; expected the "
            f"{wanted * length:,} of --calibration-tokens: give more text or ask for fewer"
        )
    chosen = blocks.select(_spread(len(blocks), wanted))
    ids = torch.tensor(chosen["input_ids"])
    second = ()
    if checkpoint.config.get("is_encoder_decoder"):
        second = ("labels",) if _writes_text(checkpoint) else ("decoder_input_ids",)
    return [
        {"input_ids": part} | dict.fromkeys(second, part) for part in ids.split(_per_batch(wanted, length))
    ]


def _check_reads_text(checkpoint: Checkpoint) -> None:
    cls = checkpoint.architecture.model_class
    main = getattr(cls, "main_input_name", "input_ids")
    if main != "input_ids":
        raise RecipeError(
            f"calibration data are text, and {cls.__name__} reads {main}; expected batches of your own, as "
            "convert(..., calibration=batches)"
        )
    if checkpoint.config.get("is_encoder_decoder") and cls and cls.__name__.endswith("Classification"):
        raise RecipeError(
            f"calibration data are blocks of text, and {cls.__name__} reads texts as a whole; expected "
            "batches of your own, as convert(..., calibration=batches)"
        )


def _writes_text(checkpoint: Checkpoint) -> bool:
    cls = checkpoint.architecture.model_class
    return cls is not None and cls.__name__.endswith("ForConditionalGeneration")


def _pairing(checkpoint: Checkpoint) -> Callable | None:
    """What makes examples of rows with text and target, if the model can answer."""
    if _writes_text(checkpoint) and checkpoint.config.get("is_encoder_decoder"):
        return texts.pairs
    return texts.answers if says_next(checkpoint) else None


def says_next(checkpoint: Checkpoint) -> bool:
    """Whether what stands at a place of the model's outputs is about the next token."""
    if checkpoint.config.get("is_encoder_decoder"):
        return False
    cls = checkpoint.architecture.model_class
    causal = main_auto_class(checkpoint.config, checkpoint.config.get("model_type", ""))
    return causal == "AutoModelForCausalLM" or (cls is not None and cls.can_generate())


def _read(recipe: TextSource, task: str, token: str | None):
    """Rows with the columns of the task, or with texts alone where there are no targets."""
    from datasets import Dataset, concatenate_datasets

    columns = texts.Columns(text=recipe.text_column, target=recipe.target_column)
    sources = [source for source in recipe.calibrate if source != BUILTIN_TEXT]
    parts = []
    if len(sources) < len(recipe.calibrate):
        topics = pydoc_data.topics.topics
        parts.append(Dataset.from_dict({columns.text: [topics[name] for name in sorted(topics)]}))
    if sources:
        task = "causal" if parts else task
        rows = texts.read(sources, columns, task, recipe.calibration_split, token, targets_needed=False)
        parts.append(rows)
    return concatenate_datasets(parts)


def _spread(count: int, wanted: int) -> list[int]:
    """So many numbers below `count`, evenly spread."""
    return [k * count // wanted for k in range(wanted)]


def _per_batch(count: int, length: int) -> int:
    """Examples per batch: at most `TOKENS_PER_BATCH` tokens, and at least `HELD_OUT` batches."""
    return max(min(TOKENS_PER_BATCH // length, count // HELD_OUT), 1)


def _pair_batches(rows, encode: Callable, tokenizer, recipe: TextSource, length: int) -> list[Batch]:
    columns = texts.Columns(text=recipe.text_column, target=recipe.target_column)
    encoded = encode(rows, tokenizer, columns, length)
    sizes = [len(ids) for ids in encoded["input_ids"]]
    wanted = min(recipe.calibration_tokens * len(sizes) // max(sum(sizes), 1) + 1, len(sizes))
    if sum(sizes) < recipe.calibration_tokens:
        raise DataError(
            f"the calibration pairs have {sum(sizes):,} tokens that the model reads; expected the "
            f"{recipe.calibration_tokens:,} of --calibration-tokens: give more text or ask for fewer"
        )
    chosen = sorted(_spread(len(sizes), wanted), key=lambda i: (sizes[i], i))  # little padding
    per_batch = _per_batch(wanted, max(sizes[i] for i in chosen))
    order = [chosen[start : start + per_batch] for start in range(0, len(chosen), per_batch)]
    return [_pad(encoded.select(part), tokenizer.pad_token_id or 0) for part in order]


def _pad(rows, pad: int) -> Batch:
    def padded(values: list[list[int]], fill: int) -> Tensor:
        return nn.utils.rnn.pad_sequence([torch.tensor(v) for v in values], True, fill)

    ids = rows["input_ids"]
    mask = [[1] * len(row) for row in ids]
    return {
        "input_ids": padded(ids, pad),
        "attention_mask": padded(mask, 0),
        "labels": padded(rows["labels"], -100),
    }


def is_held_out(number: int, batches: Sequence[Batch]) -> bool:
    """Whether a batch is kept out of what matrices are fitted to."""
    return number % HELD_OUT == HELD_OUT - 1 or number == len(batches) - 1


def split(batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """(what matrices are fitted to, what is held out)."""
    parts: tuple[list[Batch], list[Batch]] = [], []
    for number, batch in enumerate(batches):
        parts[is_held_out(number, batches)].append(batch)
    return parts


def token_mask(model: PreTrainedModel, batch: Batch, *, decoder: bool) -> Tensor | None:
    """Which tokens of the decoder's (or only), or of the encoder's sequences are no padding; None: all."""
    if model.config.is_encoder_decoder and decoder:
        return batch["labels"] != -100 if "labels" in batch else None
    return batch.get("attention_mask")


def prediction_mask(model: PreTrainedModel, batch: Batch, says_next: bool) -> Tensor | None:
    """Which places of the (decoder's or only) outputs count; None: all.

    Neither padding nor what `labels` leave out with -100: of a model that says the next token, those places
    whose next label is left out.
    """
    mask, labels, ids = token_mask(model, batch, decoder=True), batch.get("labels"), batch.get("input_ids")
    if model.config.is_encoder_decoder or labels is None or ids is None or labels.shape != ids.shape:
        return mask
    kept = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask.bool()
    counted = (labels != -100) & kept
    if says_next:
        counted = nn.functional.pad(counted[:, 1:], (0, 1))
    return counted & kept


def token_rows(model: PreTrainedModel, batch: Batch, path: str, x: Tensor) -> Tensor:
    """What an FFN at that path reads or writes, (tokens, features) in float32, without padding."""
    rows = x.detach().reshape(-1, x.shape[-1]).float()
    mask = token_mask(model, batch, decoder=path.startswith("decoder"))
    if mask is None or mask.numel() != len(rows):
        return rows
    return rows[mask.reshape(-1).bool().to(rows.device)]


def used_tokens(batches: Sequence[Batch]) -> int | None:
    """Tokens that are not held out; None for inputs that are no tokens."""
    used = split(batches)[0]
    if any("input_ids" not in batch for batch in used):
        return None
    return sum(batch["input_ids"].shape.numel() for batch in used)
