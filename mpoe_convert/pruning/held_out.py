"""Examples of the text that experts are not observed on: they measure what leaving some out costs."""

from __future__ import annotations

from collections.abc import Sequence

from ..compression.batches import Batch, num_examples, num_tokens
from ..compression.divergence import MAX_TOKENS
from ..errors import DataError
from ..options import called

# Of batches with one example each, one in so many is held out.
_ONE_IN = 8


def hold_out(batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """(batches to observe experts on, examples that are held out), both spread over the whole text.

    The first example of a batch is held out: of every batch, or of every so many that there are `MAX_TOKENS`.

    Raises:
        DataError: nothing is left to observe experts on.
    """
    firsts = [{name: tensor[:1] for name, tensor in batch.items()} for batch in batches]
    every = max(-(-(num_tokens(firsts) or 0) // MAX_TOKENS), 1)
    observed: list[Batch] = []
    held_out: list[Batch] = []
    for number, (batch, first) in enumerate(zip(batches, firsts, strict=True)):
        is_single = num_examples(batch) == 1
        if number % (max(every, _ONE_IN) if is_single else every):
            observed.append(batch)
            continue
        held_out.append(first)
        if not is_single:
            observed.append({name: tensor[1:] for name, tensor in batch.items()})
    if not observed:
        raise DataError(
            "the calibration text is one example, which is held out; expected at least 2: give more text, or "
            f"raise {called('calibration_tokens')}"
        )
    return observed, held_out
