"""The model card of an export."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..artifact.card_file import CARRIED


def write_export(
    path: Path,
    title: str,
    paragraphs: Iterable[str],
    code: str,
    front: dict,
    tags: Iterable[str],
    library: str,
) -> None:
    """Write the card of an export.

    Args:
        path: of the card.
        code: Python that loads the export.
        front: front matter of the artifact's card; its base, licence and language are carried over.
        library: the Hub's name of the library that loads the export.
    """
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(
        base_model=front.get("base_model"),
        library_name=library,
        tags=list(tags),
        **{key: front[key] for key in CARRIED if front.get(key) is not None},
    )
    body = "\n\n".join([f"# {title}", *paragraphs, f"## How to load it\n\n```python\n{code}\n```\n"])
    path.write_text(str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")), encoding="utf-8")
