"""README.md and the guides in examples: their blocks, their links, and a place where blocks run.

A block marked bash or python is run as it stands; a block without a language is not. Commands of a block are
processes of their own, forked from one that has imported torch and transformers already.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").is_file())
README = ROOT / "README.md"
GUIDES = sorted((ROOT / "examples").glob("*.md"))
RESULTS = [ROOT / "examples" / folder / "README.md" for folder in ("benchmarks", "results")]
OTHERS = [*RESULTS, ROOT / "examples/results/compression.md", ROOT / ".github/CONTRIBUTING.md"]

# Imports everything once; then every request (arguments, folder and environment, with the three standard
# streams of the one who asks) becomes a fork that runs `mpoe-convert`, `python -c CODE` or `python FILE`.
SERVER = """
import json, os, runpy, socket, sys, traceback, types
from importlib.metadata import entry_points
sys.path.append(sys.argv[2])
from beforehand import prepare
sys.path.pop()
prepare()
[command] = entry_points(group="console_scripts", name="mpoe-convert")
main = command.load()

def execute(program, args):
    if program == "mpoe-convert":
        sys.argv = [program, *args]
        main()
    elif args[0] == "-c":
        sys.argv = ["-c", *args[2:]]
        sys.path.insert(0, "")
        sys.modules["__main__"] = module = types.ModuleType("__main__")
        exec(compile(args[1], "<block>", "exec"), module.__dict__)
    else:
        sys.argv = args
        sys.path.insert(0, os.path.dirname(args[0]))
        runpy.run_path(args[0], run_name="__main__")

def child(request, streams):
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    code = 1
    try:
        execute(request["program"], request["args"])
        code = 0
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

parent = os.getppid()
with socket.socket(fileno=int(sys.argv[1])) as server:
    server.settimeout(1)
    while os.getppid() == parent:  # ends with the tests, however they end
        try:
            connection, _ = server.accept()
        except TimeoutError:
            continue
        text, streams, _, _ = socket.recv_fds(connection, 1 << 16, 3)
        while part := connection.recv(1 << 16):
            text += part
        if os.fork() == 0:  # waits for the run, so that both ends of a pipe can run
            pid = os.fork()
            if pid == 0:
                child(json.loads(text), streams)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            connection.sendall(str(code).encode())
            os._exit(0)
        for stream in streams:
            os.close(stream)
        connection.close()
"""
# What `mpoe-convert` and `python` are on the path of a block.
CLIENT = """#!{python} -IS
import json, os, socket, sys
request = {{"program": os.path.basename(sys.argv[0]), "args": sys.argv[1:], "cwd": os.getcwd()}}
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect({address!r})
    text = json.dumps(request | {{"env": dict(os.environ)}}).encode()
    socket.send_fds(connection, [text[:1]], [0, 1, 2])
    connection.sendall(text[1:])
    connection.shutdown(socket.SHUT_WR)
    sys.exit(abs(int(connection.recv(16) or 1)))
"""


@dataclass(frozen=True)
class Block:
    """A fenced block; neighbours of the same language are one: a session."""

    language: str
    code: str


def blocks(path: Path) -> list[Block]:
    """The blocks of a document that are run, in order."""
    found = re.findall(r"^```(bash|python)\n(.*?)^```$", path.read_text(encoding="utf-8"), re.M | re.S)
    return [
        Block(language, "".join(code for _, code in group))
        for language, group in groupby(found, key=lambda block: block[0])
    ]


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def links(path: Path) -> list[str]:
    """The targets of a document's links and pictures."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    return re.findall(r"\]\(([^)\s]+)\)", text)


class Workshop:
    """A server for blocks: `with Workshop() as workshop: workshop.run(block, folder)`."""

    def __enter__(self) -> Workshop:
        self.folder = Path(tempfile.mkdtemp(prefix="mpoe-"))  # the address of a socket has to be short
        address = str(self.folder / "socket")
        server = socket.socket(socket.AF_UNIX)
        server.bind(address)
        server.listen()
        for name in ("mpoe-convert", "python"):
            path = self.folder / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(CLIENT.format(python=sys.executable, address=address))
            path.chmod(0o755)
        self.environment = os.environ | {"PATH": f"{path.parent}{os.pathsep}{os.environ['PATH']}"}
        with server:
            number = server.fileno()
            # -P: imports nothing from here but what the last argument holds
            command = [sys.executable, "-P", "-c", SERVER, str(number), str(Path(__file__).parent)]
            self.process = subprocess.Popen(command, pass_fds=[number])
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.terminate()
        self.process.wait()
        shutil.rmtree(self.folder)

    def run(self, block: Block, folder: Path) -> None:
        """Run a block in a folder. Raises AssertionError: it failed."""
        if block.language == "python":
            command = ["python", "-c", block.code]
        else:
            command = ["bash", "-euo", "pipefail", "-c", block.code]
        done = subprocess.run(command, cwd=folder, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{block.code}\n{done.stdout}\n{done.stderr[-2000:]}"
