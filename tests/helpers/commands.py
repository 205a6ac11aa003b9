"""The command as a process that stays, and what lies in a folder."""

import hashlib
from pathlib import Path


def tree(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


DRIVER = """
import json, sys
from click.testing import CliRunner
from mpoe_convert.cli import main
for line in sys.stdin:
    if line == "null\\n":  # forget the connections that are open
        import huggingface_hub
        huggingface_hub.close_session()
        continue
    done = CliRunner().invoke(main, json.loads(line), prog_name="mpoe-convert")
    trouble = repr(done.exception) if done.exception and not isinstance(done.exception, SystemExit) else ""
    print(json.dumps([done.exit_code, done.stdout, done.stderr + trouble]), flush=True)
"""
