"""What a model can read: how many positions, and which token ids."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

from ..errors import DataError, FamilyError, TrainingError
from ..options import called
from ..source.architecture import Architecture, knows
from .layout import base_config

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

MAX_BLOCK = 512  # tokens of a block of text, by default
# Fields of configs that say how many tokens a model has positions for.
NUM_POSITIONS = (
    *("max_position_embeddings", "n_positions", "max_seq_len"),
    *("max_encoder_position_embeddings", "max_decoder_position_embeddings"),
)
# Fields of configs that hold the config of a part that reads text.
TEXT_PARTS = ("text_config", "text_encoder", "encoder", "decoder")
# What modules that embed positions are called.
TABLES = ("position_embeddings", "embed_positions")


def positions(config: PretrainedConfig) -> int | None:
    """How many tokens of a text have a position; None if the config names no number.

    Some embeddings of positions (RoBERTa's, for example) count from the padding token's id, so that many of
    their rows are never used. Which do is seen on the model, built on the meta device.

    Args:
        config: of a dense model or of an artifact.
    """
    values = config.to_dict()
    values = (
        base_config(values) if values.get("mpoe") else {k: v for k, v in values.items() if k != "auto_map"}
    )
    numbers = list(_named_numbers(config))
    if numbers and knows(values["model_type"]):
        try:
            model = Architecture(values).base
        except FamilyError:  # loading will report the error
            return min(numbers)
        numbers += [len(table.weight) - table.padding_idx - 1 for table in _tables_from_padding(model)]
    return min(numbers, default=None)


def _named_numbers(config: PretrainedConfig) -> Iterator[int]:
    """The numbers in fields that the config's class has; T5's files name one that the model does not read."""
    from transformers import PretrainedConfig

    parts = (config, *(getattr(config, name, None) for name in TEXT_PARTS))
    for part in parts:
        if isinstance(part, PretrainedConfig):
            fields = {*inspect.signature(type(part)).parameters, *part.attribute_map}
            for name in NUM_POSITIONS:
                if name not in fields and not hasattr(type(part), name):  # custom code may compute it
                    continue
                if isinstance(number := getattr(part, name, None), int) and number > 0:
                    yield number


def _tables_from_padding(model: PreTrainedModel) -> Iterator[Any]:
    """The embeddings of positions that begin behind the row of the padding token."""
    for name, module in model.named_modules():
        is_table = name.rpartition(".")[2] in TABLES and hasattr(module, "weight")
        if is_table and getattr(module, "padding_idx", None) is not None:
            yield module


def counts_from_padding(model: PreTrainedModel) -> bool:
    """Whether the model's positions begin behind its padding token's id."""
    return any(True for _ in _tables_from_padding(model))


def block_length(limit: int | None) -> int:
    """Tokens per block of text by default: as many as the model has positions, at most `MAX_BLOCK`."""
    return min(MAX_BLOCK, limit or MAX_BLOCK)


def check_length(length: int, limits: Mapping[str, int | None]) -> None:
    """Whether all models have positions for so many tokens; `limits` says by name how many each has.

    Raises:
        TrainingError: one has fewer.
    """
    for name, limit in limits.items():
        if limit and length > limit:
            raise TrainingError(f"{called('length')} is {length}; '{name}' takes at most {limit} tokens")


def embedding_rows(model: PreTrainedModel) -> int | None:
    """How many token ids a model embeds; None if it embeds no tokens."""
    try:
        return len(cast("Tensor", model.get_input_embeddings().weight))
    except (AttributeError, NotImplementedError):
        return None


def check_token_ids(
    model: PreTrainedModel, name: str, largest: int, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Whether a model embeds all token ids that it is to read; one that embeds no tokens is passed.

    Args:
        model: the model.
        name: of the model, for the message.
        largest: the largest id.
        tokenizer: where the ids are from, for the message.

    Raises:
        DataError: it does not.
    """
    rows = embedding_rows(model)
    if rows is not None and largest >= rows:
        raise DataError(
            f"token {largest}{_described(tokenizer, largest)} is to be read, and {name} embeds {rows} tokens "
            f"(0 to {rows - 1}); expected the model's own tokenizer, or an embedding that was resized when "
            f"tokens were added: model.resize_token_embeddings({largest + 1})"
        )


def _described(tokenizer: PreTrainedTokenizerBase | None, token: int) -> str:
    """What a tokenizer says of a token id, for messages."""
    if tokenizer is None:
        return ""
    text = tokenizer.convert_ids_to_tokens(token)
    return f" ({text!r} of the tokenizer, whose largest is {max(tokenizer.get_vocab().values())})"
