"""Examples of different lengths as one batch. Padding is told by length, never by a token's number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What stands behind a shorter row; 0 in all other columns.
FILL = {"labels": -100}


def pad_rows(rows: Sequence[Mapping], pad: int) -> dict[str, Tensor]:
    """Examples as one batch, padded on the right to the longest.

    Args:
        rows: the examples, all with the same names; each value is a number or a list of numbers.
        pad: stands behind shorter `input_ids`; `labels` are continued with -100, all else with 0.

    Returns:
        By name (examples,) of numbers and (examples, longest) of lists, in int64; of `input_ids` with an
        `attention_mask`, which is 0 where padding was added and nowhere else.
    """
    values = {name: [row[name] for row in rows] for name in rows[0]}
    if "input_ids" in values:
        values["attention_mask"] = [[1] * len(ids) for ids in values["input_ids"]]
    return {name: _stack(each, FILL | {"input_ids": pad}, name) for name, each in values.items()}


def _stack(values: Sequence, fill: Mapping[str, int], name: str) -> Tensor:
    if not isinstance(values[0], Sequence):
        return torch.tensor(values)
    rows = [torch.tensor(value, dtype=torch.int64) for value in values]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill.get(name, 0))


def padding_token(tokenizer: PreTrainedTokenizerBase, below: int | None = None) -> int:
    """The id that stands where a batch is padded: of the padding token, else of the end of text, else 0.

    Args:
        tokenizer: names the tokens.
        below: ids from here on are not taken. A mask tells the padding, so that any id will do.
    """
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((i for i in known if isinstance(i, int) and (below is None or i < below)), 0)
