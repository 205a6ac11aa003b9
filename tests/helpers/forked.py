"""Real processes of the command without the seconds that importing torch takes.

One server process imports everything once and forks for every run: each run has its own signals,
limits, user and umask, and ends as the command ends.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

SERVER = """
import json, os, resource, signal, sys, time
import mpoe_convert.cli.progress, mpoe_convert.conversion.convert, mpoe_convert.decomposition.mpo
import mpoe_convert.runtime.modeling_mpoe, mpoe_convert.experts.mpo
from mpoe_convert.source.architecture import heads
heads("gpt2")

def child(request):
    os.setsid()
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGPIPE"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    for number, stream in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(request[stream], os.O_WRONLY | os.O_CREAT, 0o666), number)
    os.chdir(request["cwd"])
    os.umask(request["umask"])
    if request["file_bytes"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_bytes"],) * 2)
    if request["uid"] is not None:
        os.setgroups([])
        os.setgid(request["uid"])
        os.setuid(request["uid"])
    if request["matrix_seconds"]:
        from mpoe_convert.conversion import convert as conversion
        build = conversion.build_matrix
        def slow(*args):
            time.sleep(request["matrix_seconds"])
            return build(*args)
        conversion.build_matrix = slow
    mpoe_convert.cli.main(request["args"], prog_name="mpoe-convert")

for line in sys.stdin:
    request = json.loads(line)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            child(request)
        except SystemExit as exit:
            code = exit.code or 0
        except BaseException:
            import traceback
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@dataclass
class Run:
    """A started run; `wait` ends it. `code` is negative if a signal ended it unhandled."""

    pid: int
    server: Server
    outputs: tuple[Path, Path]
    code: int | None = None

    def wait(self) -> Run:
        self.code = int(self.server.process.stdout.readline())
        return self

    @property
    def stdout(self) -> str:
        return self.outputs[0].read_text()

    @property
    def stderr(self) -> str:
        return self.outputs[1].read_text()


class Server:
    """`with Server(folder) as server: server.run(["gpt2", "-o", "out"], cwd)`; one run at a time."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.count = 0

    def __enter__(self) -> Server:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def start(
        self,
        args: list[str],
        cwd: Path,
        *,
        umask: int = 0o022,
        uid: int | None = None,
        file_bytes: int = 0,
        matrix_seconds: float = 0.0,
    ) -> Run:
        """Start `mpoe-convert ARGS`; every matrix waits `matrix_seconds` before it is made."""
        self.count += 1
        outputs = tuple(self.folder / f"{stream}-{self.count}" for stream in ("stdout", "stderr"))
        request = {
            "args": [str(arg) for arg in args],
            "cwd": str(cwd),
            "umask": umask,
            "uid": uid,
            "file_bytes": file_bytes,
            "matrix_seconds": matrix_seconds,
            "stdout": str(outputs[0]),
            "stderr": str(outputs[1]),
        }
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return Run(int(self.process.stdout.readline()), self, outputs)

    def run(self, args: list[str], cwd: Path, **options) -> Run:
        return self.start(args, cwd, **options).wait()
