"""The model card as a file: its front matter, its sections, and its form for a repository."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ..errors import CheckpointError, one_line
from . import snippets

if TYPE_CHECKING:
    from huggingface_hub import ModelCard, ModelCardData

# YAML between two lines of dashes; dashes inside a value end nothing.
_FRONT_MATTER = re.compile(r"\ufeff?\s*---[\r\n]+(.*?)[\r\n]+---\s*?(?:[\r\n]|$)", re.DOTALL)
CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag", "datasets")
# The section with the results of `evaluate`.
EVALUATION = "Evaluation"
UNTRAINED = (
    "The router is untrained: this is a starting point for fine-tuning, not a better model than its base."
)


def source_front_matter(folder: Path) -> dict:
    """The YAML front matter of the source's README.md; empty if there is none that can be read."""
    import yaml

    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    if not (found := _FRONT_MATTER.match(text)):
        return {}
    try:
        values = yaml.safe_load(found[1])
    except yaml.YAMLError:
        return {}
    return values if isinstance(values, dict) else {}


def source_license(folder: Path) -> str | None:
    """The licence that the source's card names."""
    return source_front_matter(folder).get("license")


def for_repository(text: str, repo_id: str) -> str:
    """The card for the Hub: its snippets load `repo_id`, and its results carry the repository's name."""
    from huggingface_hub import ModelCard

    text = snippets.with_model_id(text, repo_id)
    if "\nmodel-index:" not in text:
        return text
    card = ModelCard(text)
    setattr(card.data, "model_name", repo_id.partition("/")[2])  # noqa: B010  (its base class has no such field)
    return str(card)


def set_section(path: Path, title: str, text: str) -> None:
    """Write a section of a card, before its limits; an old section of that title is replaced.

    Args:
        path: the card; made if it does not exist.
        title: of the section.
        text: Markdown below the title.
    """
    remove_section(path, title)
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    place = next((i for i, line in enumerate(lines) if line in ("## Limits", "## Citation")), len(lines))
    lines[place:place] = [f"## {title}", "", *text.splitlines(), ""]
    path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def remove_section(path: Path, title: str) -> None:
    """Remove a section from a card, if both exist."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    if f"## {title}" in lines:
        start = lines.index(f"## {title}")
        end = next((i for i in range(start + 1, len(lines)) if lines[i].startswith("## ")), len(lines))
        path.write_text("\n".join(lines[:start] + lines[end:]).rstrip() + "\n", encoding="utf-8")


def open_card(path: Path) -> ModelCard:
    """Raises CheckpointError if it is no card, or its front matter cannot be read."""
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    try:
        return ModelCard(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, YAMLError) as error:
        raise CheckpointError(
            f"'{path}' is no model card with front matter ({one_line(error)}): repair it"
        ) from None


def forget_evaluations(path: Path) -> None:
    """Remove all results from a card, for a model whose weights are others since."""
    if not path.is_file():
        return
    remove_section(path, EVALUATION)
    try:
        made = open_card(path)
    except CheckpointError:  # a damaged card has no results that could be read
        return
    data = cast("ModelCardData", made.data)
    if data.eval_results:
        data.eval_results = data.model_name = None
        made.save(path)
