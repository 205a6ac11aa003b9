"""The model card as a file: front matter, sections, and how it is adapted to a repository."""

from __future__ import annotations

from pathlib import Path

from . import snippets

CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag", "datasets")
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
    if not text.startswith("---"):
        return {}
    try:
        values = yaml.safe_load(text.split("---", 2)[1])
    except (yaml.YAMLError, IndexError):
        return {}
    return values if isinstance(values, dict) else {}


def source_license(folder: Path) -> str | None:
    """The licence that the source's card names."""
    return source_front_matter(folder).get("license")


def for_repository(text: str, repo_id: str) -> str:
    """The card as it is to stand on the Hub: its snippets load that repository, its results bear its name."""
    from huggingface_hub import ModelCard

    text = snippets.with_model_id(text, repo_id)
    if "\nmodel-index:" not in text:
        return text
    card = ModelCard(text)
    setattr(card.data, "model_name", repo_id.partition("/")[2])  # noqa: B010  (its base class has no such field)
    return str(card)


def set_section(path: Path, title: str, text: str) -> None:
    """Put a section of that title into a card, before the limits; one that is there already is replaced."""
    remove_section(path, title)
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    place = next((i for i, line in enumerate(lines) if line in ("## Limits", "## Citation")), len(lines))
    lines[place:place] = [f"## {title}", "", *text.splitlines(), ""]
    path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def remove_section(path: Path, title: str) -> None:
    """Take a section out of a card, if both are there."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    if f"## {title}" in lines:
        start = lines.index(f"## {title}")
        end = next((i for i in range(start + 1, len(lines)) if lines[i].startswith("## ")), len(lines))
        path.write_text("\n".join(lines[:start] + lines[end:]).rstrip() + "\n", encoding="utf-8")
