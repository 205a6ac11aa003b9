"""What is held out of a text: some of every part of it, and nothing that experts are observed on."""

import pytest
import torch

from mpoe_convert.errors import DataError
from mpoe_convert.pruning import held_out
from mpoe_convert.pruning.held_out import hold_out

# Batches, examples of each, tokens that may be held out; the batches whose first example is.
CASES = [
    (16, 4, 10**6, range(16)),
    (16, 4, 20, range(0, 16, 4)),
    (2, 1, 10**6, [0]),
    (40, 1, 10**6, range(0, 40, 8)),
    (40, 1, 15, range(0, 40, 14)),
]


@pytest.mark.parametrize(("count", "rows", "limit", "expected"), CASES)
def test_every_example_is_seen_once_and_all_parts_of_the_text_are_held_out(
    count, rows, limit, expected, monkeypatch
):
    monkeypatch.setattr(held_out, "MAX_TOKENS", limit)
    ids = torch.arange(count * rows * 5).reshape(count, rows, 5)
    batches = [{"input_ids": batch, "labels": batch} for batch in ids]
    observed, held = hold_out(batches)
    both = torch.cat([batch["labels"] for batch in (*observed, *held)])
    assert both[:, 0].sort().values.tolist() == ids[..., 0].flatten().tolist()
    assert [batch["input_ids"].tolist() for batch in held] == [[ids[k, 0].tolist()] for k in expected]


def test_text_of_a_single_example_leaves_nothing_to_observe():
    batch = {"input_ids": torch.ones(1, 5, dtype=torch.long)}
    with pytest.raises(DataError, match="is one example, which is held out; expected at least 2: give more"):
        hold_out([batch])
