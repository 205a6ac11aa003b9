"""The command as a process that stays, and what lies in a folder."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


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


@contextmanager
def driven(
    folder: Path, environment: dict[str, str], **options: Any
) -> Iterator[tuple[Callable[..., list], subprocess.Popen]]:
    """(ask, process): the command in one process there; `ask(*args)` is [exit code, stdout, stderr].

    `options`: of Popen.
    """
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER],
        cwd=folder,
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        **options,
    ) as process:

        def ask(*args: object) -> list:
            process.stdin.write(json.dumps([str(arg) for arg in args]) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield ask, process
        process.stdin.close()
