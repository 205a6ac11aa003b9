"""Whether the code that an artifact brings along is this release's, which is run without asking."""

from __future__ import annotations

import json
from pathlib import Path

from ..runtime import GENERATE_PATH, MODELING_PATH
from ..source.custom_code import references
from ..source.hub import GENERATE_FILE
from .layout import MODELING_FILE


def has_our_code(name: str, revision: str | None, token: str | None) -> bool:
    """Whether this release's `modeling_mpoe.py` is all the code that loading would run. Runs no code.

    Args:
        name: folder or Hub id.
        revision: of a Hub id.
        token: Hub token.
    """
    from transformers.utils.hub import cached_file

    def read(file: str) -> bytes:
        path = cached_file(
            name, file, revision=revision, token=token, _raise_exceptions_for_missing_entries=False
        )
        return Path(path).read_bytes() if path else b""

    try:
        configs = [json.loads(read(file) or "{}") for file in ("config.json", "tokenizer_config.json")]
        maps = [config.get("auto_map") for config in configs]
        base = (configs[0].get("mpoe") or {}).get("base_auto_map")
        if {*references([*maps, base])} != {("", Path(MODELING_FILE).stem)}:
            return False
        if (custom := read(GENERATE_FILE)) and custom != GENERATE_PATH.read_bytes():
            return False
        return read(MODELING_FILE) == MODELING_PATH.read_bytes()
    except (OSError, ValueError, AttributeError):  # loading will report the error
        return False
