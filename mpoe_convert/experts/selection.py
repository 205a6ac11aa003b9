"""Selections: how many experts a token goes to, as `--select` names it and `config.mpoe` holds it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The names of the rules in `modeling_mpoe.RULES`.
TOP_K, TOP_P, TOP_ANY, EXPERT_CHOICE = SELECTIONS = ("top-k", "top-p", "top-any", "expert-choice")
# Of which `--top-k` is the most that a token goes to, and all experts if it is not given.
LIMITED = (TOP_P, TOP_ANY)
# Of top-p, as in XMoE's runs (arXiv 2403.18926).
THRESHOLD = 0.9


def of_block(block: Mapping[str, Any]) -> str:
    """The selection that a `config.mpoe` names."""
    return block.get("rule", TOP_K)


def in_short(select: str, top_k: int, threshold: float | None) -> str:
    """For a line about a model: "top 2", or "top-p 0.9, at most 8 per token"."""
    if select == TOP_K:
        return f"top {top_k}"
    if select == EXPERT_CHOICE:
        return f"{select}, {top_k} per token in the mean"
    name = select if threshold is None else f"{select} {threshold:g}"
    return f"{name}, at most {top_k} per token"


def in_words(select: str, top_k: int, threshold: float | None) -> str:
    """The end of a sentence about experts: "of which 2 are chosen per token"."""
    if select == TOP_P:
        return (
            f"of which a token goes to as many as it takes for their probabilities to reach {threshold:g} "
            f"(XMoE), at most {top_k}"
        )
    if select == TOP_ANY:
        return f"of which a token goes to all whose learned thresholds it passes (DynMoE), at most {top_k}"
    if select == EXPERT_CHOICE:
        return (
            "each of which takes its best tokens of a sequence (expert choice routing), so that a token goes "
            f"to {top_k} in the mean"
        )
    return f"of which {top_k} are chosen per token"
