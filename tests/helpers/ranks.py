"""Runs of the command by several processes, as torchrun starts them, without what importing torch takes.

One process imports everything once and forks for every process of every run.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from functools import partial
from pathlib import Path


def run_all(runs: list[dict], cwd: Path, environment: dict[str, str] | None = None) -> list[dict]:
    """Run one after the other; every run ends before the next begins.

    Args:
        runs: each with `args` of the command and the `count` of its processes; `nan`, `full` or `kill`, if
            there, is (rank, n): that process meets NaN or a full disk in its n-th weight file, or is killed.
            `calibrating`, if there, is (rank, "nan" or "kill"): what happens to that process in its first
            pass over the calibration text; `scoring` is the rank of a process that reads NaN as the model.
            Moments are in the folder "moments-" and the run's number.
        cwd: where they run.
        environment: of all of them; None: that of this process.

    Returns:
        For each {"codes": exit codes by rank, "stderr": of all together, "made": names of the weight files
        that were finished}.
    """
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(runs),
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**(environment or os.environ), "OMP_NUM_THREADS": "1"},
        timeout=300,
        check=True,
    )
    return json.loads(done.stdout)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def disturb(run: dict, rank: int) -> None:
    """Let a process meet what the run says."""
    from mpoe_convert.conversion import convert as conversion

    save, files = conversion.stream_shard, []

    def disturbed(specs, tensors, path):
        files.append(path)
        if run.get("nan") == [rank, len(files)]:
            tensors = list(tensors)
            tensors[0][1].fill_(float("nan"))
        if run.get("full") == [rank, len(files)]:
            raise OSError(28, "No space left on device")
        if run.get("kill") == [rank, len(files)]:
            os.kill(os.getpid(), signal.SIGKILL)
        save(specs, tensors, path)
        with open(f"made-{run['number']}", "a") as made:
            made.write(f"{path.name}\n")

    conversion.stream_shard = disturbed


def disturb_passes(event: str) -> None:
    """Let a pass of the dense model fail, or kill the process."""
    from mpoe_convert.compression import calibrate

    def disturbed(model, batch):
        if event == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        model.get_input_embeddings().weight.data.fill_(float("nan"))
        run_batch(model, batch)

    run_batch, calibrate.run_batch = calibrate.run_batch, disturbed


def disturb_scoring() -> None:
    """Let the model that is scored be damaged."""
    from mpoe_convert.training import evaluate

    def damaged(*args, **options):
        model = load(*args, **options)
        model.get_input_embeddings().weight.data.fill_(float("nan"))
        return model

    load, evaluate.load_alone = evaluate.load_alone, damaged


def child(run: dict, rank: int, port: int, output: int) -> None:
    import huggingface_hub

    import mpoe_convert.cli

    place = huggingface_hub.cached_assets_path
    huggingface_hub.cached_assets_path = partial(
        place, assets_dir=Path(f"moments-{run['number']}").absolute()
    )
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(run["count"]))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="test")
    disturb(run, rank)
    if run.get("calibrating", [None])[0] == rank:
        disturb_passes(run["calibrating"][1])
    if run.get("scoring") == rank:
        disturb_scoring()
    mpoe_convert.cli.main(run["args"], prog_name="mpoe-convert")


def forked(run: dict, rank: int, port: int, output: int) -> int:
    """The process that works as `rank`."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        child(run, rank, port, output)
    except SystemExit as exit:
        code = int(exit.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    import mpoe_convert.compression.mixtures
    import mpoe_convert.conversion.convert  # noqa: F401

    found = []
    for number, run in enumerate(json.load(sys.stdin)):
        path, port, run["number"] = Path(f"output-{number}"), free_port(), number
        output = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        pids = [forked(run, rank, port, output) for rank in range(run["count"])]
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        os.close(output)
        made = Path(f"made-{number}")
        names = made.read_text().split() if made.exists() else []
        found.append({"codes": codes, "stderr": path.read_text(), "made": names})
        path.unlink()
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
