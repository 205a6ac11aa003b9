"""What leaving experts out did, in the model card."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from ..artifact.card_file import forget_evaluations, remove_section, set_section
from .report import Smaller

SECTION = "Fewer experts"
# Sections that measure the weights with all experts.
_MEASURED_BEFORE = ("Parameters", "Compression", "Rounding", "Reconstruction error", "Training")
_NOTE = "> **Note:** What follows was written when there were"
_sub = partial(re.sub, flags=re.MULTILINE)


def describe(path: Path, smaller: Smaller) -> None:
    """Write into a card how many experts are left, what it cost, and that older numbers are of all of them.

    Args:
        path: the card; made if it does not exist.
        smaller: what was done.
    """
    remove_section(path, "Pictures")
    forget_evaluations(path)
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        path.write_text(_of_earlier_weights(text, smaller), encoding="utf-8")
    set_section(path, SECTION, f"{smaller.in_words()}\n\n{smaller.table().markdown()}")


def _of_earlier_weights(text: str, smaller: Smaller) -> str:
    """The card with the new number in its title, and the old one where it measures the weights before."""
    before = f"{smaller.experts_before} experts"
    note = f"{_NOTE} {before} per mixture; {smaller.experts} are left, see [{SECTION}](#fewer-experts)."
    text = _sub(rf"^## ({'|'.join(_MEASURED_BEFORE)})(, when converted)?$", rf"## \1\2, with {before}", text)
    text = _sub(rf"^{re.escape(_NOTE)}.*\n\n", "", text)
    text = _sub(r"^(# .* as a mixture of )\d+( experts)$", rf"\g<1>{smaller.experts}\2", text)
    return _sub(r"^(# .*)$", rf"\1\n\n{note}", text, count=1)
