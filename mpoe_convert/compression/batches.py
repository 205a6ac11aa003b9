"""Turn calibration text into batches of model inputs, and say which of their tokens count."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..artifact.auto_classes import has_tokenizer
from ..artifact.limits import block_length, check_token_ids, embedding_rows, positions
from ..artifact.loading import load_tokenizer
from ..errors import DataError, RecipeError, one_line
from ..options import called
from ..ranks import Ranks
from ..source import texts
from ..source.architecture import main_auto_class
from ..source.checkpoint import Checkpoint
from ..source.padding import pad_rows, padding_token
from ..source.text_options import TextSource

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Tokens per forward pass: enough that reading a block's weights takes a small part of the time.
TOKENS_PER_BATCH = 4096
# One batch in `HELD_OUT` is left out of the moments; it measures the result.
HELD_OUT = 16
# One to fit to, and one that is held out.
SMALLEST_BLOCKS = 2
# An example that is not made of tokens, such as an image, counts as so many.
TOKENS_PER_IMAGE = 256

NOTHING_COUNTS = (
    "all labels in the calibration batches {} are -100, so nothing can be scored; pass at least one other "
    "label"
)

Batch = Mapping[str, Tensor]


def make_batches(recipe: TextSource, checkpoint: Checkpoint, token: str | None = None) -> list[Batch]:
    """Batches of model inputs from calibration text; all tensors are (examples, tokens) in int64.

    Data with a target column become pairs. Encoder-decoders read text and target on separate sides; causal
    models read them concatenated, and only the target's tokens are scored. All other texts become blocks of
    tokens, which encoder-decoders read on both sides.

    Args:
        token: Hub token for private data.

    Raises:
        DataError: the data cannot be read, have fewer tokens than `calibration_tokens`, or tokens that the
            model does not embed.
        RecipeError: the model does not read text.
    """
    _check_reads_text(checkpoint)
    if not has_tokenizer(checkpoint.folder):
        raise DataError(
            f"'{checkpoint.source}' has no tokenizer, which calibration texts need; put the files of its "
            "tokenizer there, or calibrate on batches of your own, as convert(..., calibration=batches)"
        )
    tokenizer = load_tokenizer(str(checkpoint.folder), trust_remote_code=checkpoint.code is not None)
    batches = list(_batches_of_text(recipe, checkpoint, tokenizer, token))
    check_batches(batches, checkpoint, tokenizer)
    return batches


def check_batches(
    batches: Sequence[Batch], checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Raises DataError if one is no batch of inputs, or holds token ids that the model does not embed."""
    for batch in batches:
        tensors = list(batch.values()) if isinstance(batch, Mapping) else []
        if not tensors or not all(torch.is_tensor(tensor) and tensor.ndim for tensor in tensors):
            raise DataError(
                f"calibration holds {one_line(repr(batch), 60)}; expected batches of the model's inputs, as "
                "[{'input_ids': tensor}, ...] (texts go into Recipe(calibrate=...))"
            )
    names = ("input_ids", "decoder_input_ids")
    ids = [batch[name] for batch in batches for name in names if name in batch]
    if largest := max((int(each.max()) for each in ids if each.numel()), default=0):
        check_token_ids(checkpoint.architecture.base, checkpoint.source, largest, tokenizer)


def _batches_of_text(
    recipe: TextSource, checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase, token: str | None
) -> Sequence[Batch]:
    length = block_length(positions(checkpoint.architecture.make_config()))
    encode = _pairing(checkpoint) if recipe.target_column != recipe.text_column else None
    rows = _read(recipe, "seq2seq" if encode else "causal", token)
    if encode and recipe.target_column in rows.column_names:
        pad = padding_token(tokenizer, embedding_rows(checkpoint.architecture.base))
        columns = texts.Columns(text=recipe.text_column, target=recipe.target_column)
        return _pair_batches(encode(rows, tokenizer, columns, length), recipe.calibration_tokens, pad)
    wanted = recipe.calibration_tokens // length
    if wanted < SMALLEST_BLOCKS:
        raise RecipeError(
            f"{called('calibration_tokens')} is {recipe.calibration_tokens}; expected at least "
            f"{SMALLEST_BLOCKS * length}: {SMALLEST_BLOCKS} blocks of {length}, of which one is held out"
        )
    blocks = texts.language_blocks(rows, tokenizer, recipe.text_column, length)
    if len(blocks) < wanted:
        raise DataError(
            f"the calibration text has {len(blocks) * length:,} tokens in blocks of {length}; expected the "
            f"{wanted * length:,} of {called('calibration_tokens')}: give more text or ask for fewer"
        )
    chosen = blocks.select(evenly_spread(len(blocks), wanted))
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
    if cls and main != "input_ids":
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


def _pairing(checkpoint: Checkpoint) -> Callable[..., Dataset] | None:
    """The function that encodes rows of text and target; None for models that generate no text."""
    if _writes_text(checkpoint) and checkpoint.config.get("is_encoder_decoder"):
        return texts.pairs
    return texts.answers if is_causal(checkpoint) else None


def is_causal(checkpoint: Checkpoint) -> bool:
    """True if the logits at position t predict token t + 1."""
    if checkpoint.config.get("is_encoder_decoder"):
        return False
    cls = checkpoint.architecture.model_class
    causal = main_auto_class(checkpoint.config, checkpoint.config.get("model_type", ""))
    return causal == "AutoModelForCausalLM" or (cls is not None and cls.can_generate())


def _read(recipe: TextSource, task: str, token: str | None) -> Dataset:
    """Rows with the task's columns; with the text column alone if the data have no targets."""
    from datasets import Dataset, concatenate_datasets

    columns = texts.Columns(text=recipe.text_column, target=recipe.target_column)
    sources = [source for source in recipe.calibrate if source != texts.BUILTIN]
    parts = []
    if len(sources) < len(recipe.calibrate):
        topics = pydoc_data.topics.topics
        parts.append(Dataset.from_dict({columns.text: [topics[name] for name in sorted(topics)]}))
    if sources:
        task = "causal" if parts else task
        rows = texts.read(sources, columns, task, recipe.calibration_split, token, targets_needed=False)
        parts.append(rows)
    return concatenate_datasets(parts)


def evenly_spread(count: int, wanted: int) -> list[int]:
    """`wanted` indices below `count` at even distances."""
    return [k * count // wanted for k in range(wanted)]


def _per_batch(count: int, length: int) -> int:
    """Examples per batch: at most `TOKENS_PER_BATCH` tokens, and at least `HELD_OUT` batches."""
    return max(min(TOKENS_PER_BATCH // length, count // HELD_OUT), 1)


def _pair_batches(encoded: Dataset, num_tokens: int, pad: int) -> Sequence[Batch]:
    """Batches of encoded pairs that are about equally long, with so many tokens to read in all."""
    sizes = [len(ids) for ids in encoded["input_ids"]]
    wanted = min(num_tokens * len(sizes) // max(sum(sizes), 1) + 1, len(sizes))
    if sum(sizes) < num_tokens:
        raise DataError(
            f"the calibration pairs have {sum(sizes):,} tokens that the model reads; expected the "
            f"{num_tokens:,} of {called('calibration_tokens')}: give more text or ask for fewer"
        )
    # Pairs of similar lengths stand together: little padding.
    chosen = sorted(evenly_spread(len(sizes), wanted), key=lambda i: (sizes[i], i))
    per_batch = _per_batch(wanted, max(sizes[i] for i in chosen))
    order = [chosen[start : start + per_batch] for start in range(0, len(chosen), per_batch)]
    return [pad_rows(encoded.select(part).to_list(), pad) for part in order]


def is_held_out(number: int, batches: Sequence[Batch]) -> bool:
    """True if no matrix is fitted to batch `number`."""
    return number % HELD_OUT == HELD_OUT - 1 or number == len(batches) - 1


def split(batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """(the batches that matrices are fitted to, the held-out batches)."""
    parts: tuple[list[Batch], list[Batch]] = [], []
    for number, batch in enumerate(batches):
        parts[is_held_out(number, batches)].append(batch)
    return parts


def share_of(batches: Sequence[Batch], ranks: Ranks) -> list[int]:
    """Numbers of the batches that this process runs: a share of those to fit to and of those held out.

    At least one, so that every process meets every FFN; where there are more processes than batches, what
    those behind the last one run counts elsewhere.
    """
    numbers = sorted(range(len(batches)), key=lambda number: is_held_out(number, batches))
    return sorted(numbers[ranks.rank :: ranks.count]) or [0]


def num_examples(batch: Batch) -> int:
    """Rows of a batch."""
    return len(batch["input_ids"] if "input_ids" in batch else next(iter(batch.values())))


def is_divisible(batch: Batch) -> bool:
    """Whether all tensors have one entry per example; images as a list of patches (Qwen2-VL) have not."""
    return all(len(tensor) == num_examples(batch) for tensor in batch.values())


def num_tokens(batches: Sequence[Batch]) -> int | None:
    """Tokens in the batches, padding included; None if some batch holds no tokens (images)."""
    if any("input_ids" not in batch for batch in batches):
        return None
    return sum(batch["input_ids"].numel() for batch in batches)


def token_mask(model: PreTrainedModel, batch: Batch, *, decoder: bool) -> Tensor | None:
    """(examples, tokens) mask of the tokens that are no padding; None: no token is padding.

    Args:
        decoder: of the decoder's (or the only) sequence; else of the encoder's.
    """
    if model.config.is_encoder_decoder and decoder:
        return batch["labels"] != -100 if "labels" in batch else None
    return batch.get("attention_mask")


def prediction_mask(model: PreTrainedModel, batch: Batch, is_causal: bool) -> Tensor | None:
    """(examples, tokens) mask of the positions whose outputs are scored; None: all of them.

    Padding is not scored, nor is a position whose label is -100 (of a causal model: whose next label is).
    """
    mask, labels, ids = token_mask(model, batch, decoder=True), batch.get("labels"), batch.get("input_ids")
    if model.config.is_encoder_decoder or labels is None or ids is None or labels.shape != ids.shape:
        return mask
    kept = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask.bool()
    scored = (labels != -100) & kept
    if is_causal:
        scored = nn.functional.pad(scored[:, 1:], (0, 1))
    return scored & kept


def token_rows(model: PreTrainedModel, batch: Batch, path: str, x: Tensor) -> Tensor:
    """Activations of the FFN at `path` as (tokens, features) in float32, without padding."""
    rows = x.detach().reshape(-1, x.shape[-1]).float()
    counted = counted_tokens(model, batch, path, len(rows))
    return rows if counted is None else rows[counted.to(rows.device)]


def counted_tokens(model: PreTrainedModel, batch: Batch, path: str, number: int) -> Tensor | None:
    """Which of an FFN's tokens are no padding: (number,) of bool; None: all, or it is not known."""
    mask = token_mask(model, batch, decoder=path.startswith("decoder"))
    if mask is None or mask.numel() != number:
        return None
    return mask.reshape(-1).bool()
