"""What is held out of a text: some of every part of it, and nothing that experts are observed on."""

import pytest
import torch

from mpoe_convert.pruning import held_out
from mpoe_convert.pruning.held_out import hold_out


@pytest.mark.parametrize(
    ("count", "rows", "limit"), [(16, 4, 10**6), (16, 4, 20), (2, 1, 10**6), (40, 1, 10**6)]
)
def test_every_example_is_seen_once_and_all_parts_of_the_text_are_held_out(count, rows, limit, monkeypatch):
    monkeypatch.setattr(held_out, "MAX_TOKENS", limit)
    ids = torch.arange(count * rows * 5).reshape(count, rows, 5)
    batches = [{"input_ids": batch, "labels": batch} for batch in ids]
    observed, held = hold_out(batches)
    both = torch.cat([batch["labels"] for batch in (*observed, *held)])
    assert both[:, 0].sort().values.tolist() == ids[..., 0].flatten().tolist()
    places = [int(batch["input_ids"][0, 0]) / ids.numel() for batch in held]
    gaps = [b - a for a, b in zip(places, [*places[1:], 1], strict=True)]
    assert places[0] == 0 and max(gaps) - min(gaps) < 1e-9 or rows == 1
    assert sum(batch["input_ids"].numel() for batch in held) <= max(limit, 5)
    assert 0 < len(held) <= len(both) / 2
