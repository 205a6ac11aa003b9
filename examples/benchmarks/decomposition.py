"""Time `mpoe_convert.decomposition.mpo.fit` against TensorLy's default decomposition, side by side.

    python examples/benchmarks/decomposition.py [--json FILE] [--quick] [--threads N] [--limit S]

Both get the same random normal float32 matrix and the same bonds, alternate in one process, and are
compared by the median: of the processor's time with one thread, of the clock's with more. Random matrices are
the worst case for the error: nothing in them can be compressed. TensorLy runs only once on the large matrix
and is stopped after the limit; the table says so. The script fails if our error is larger than TensorLy's.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path

import tensorly
import torch
from rich.console import Console
from rich.table import Table
from tensorly.decomposition import tensor_train_matrix

from mpoe_convert.decomposition.mpo import fit, relative_error
from mpoe_convert.decomposition.sites import Sites, choose
from mpoe_convert.runtime.modeling_mpoe import contract_chain

SIZES = [(768, 3072), (4096, 11008)]
FULL = 10**9
LAYOUTS = [("balanced", 5, 64), ("balanced", 5, FULL), ("one-sided", 3, 64)]
LARGE = 10_000_000  # from this many numbers on TensorLy takes a minute or more: one run
# Two exact results differ by rounding only; below this relative error neither is "worse".
ROUNDING = 5e-6


def tensorly_default(matrix: torch.Tensor, sites: Sites) -> list[torch.Tensor]:
    """Cores by tensor_train_matrix with its default SVD."""
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        tensor = matrix.reshape(*sites.in_dims, *sites.out_dims)
        return list(tensor_train_matrix(tensor, [1, *sites.bonds, 1], svd="truncated_svd"))


def ours(matrix: torch.Tensor, sites: Sites) -> list[torch.Tensor]:
    return list(fit(matrix, sites).cores)


RUNNERS = {"ours": ours, "tensorly": tensorly_default}


def measure(sites: Sites, order: list[str], threads: int, pipe: Connection) -> None:
    """In a process of its own, which can be stopped: send (who, seconds, relative error)."""
    torch.set_num_threads(threads)
    clock = time.thread_time if threads == 1 else time.perf_counter
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(sites.rows, sites.cols, generator=generator)
    for runner in RUNNERS.values():  # load the libraries before the clock starts
        runner(
            matrix[:64, :64].contiguous(),
            choose(64, 64, layout="balanced", num_sites=3, bond_dim=4),
        )
    error: dict[str, float] = {}
    for who in order:
        start = clock()
        cores = RUNNERS[who](matrix, sites)
        seconds = clock() - start
        if who not in error:
            error[who] = relative_error(matrix, contract_chain(cores))
        pipe.send((who, seconds, error[who]))
    pipe.close()


def run_case(
    size: tuple[int, int], layout: tuple[str, int, int], repeats: int, threads: int, limit: float
) -> dict:
    """Median times and errors of both; ``tensorly_s`` is None if it was stopped at the limit."""
    name, num_sites, bond_dim = layout
    sites = choose(*size, layout=name, num_sites=num_sites, bond_dim=bond_dim)
    large = sites.rows * sites.cols >= LARGE
    order = ["ours", "ours", "ours", "tensorly"] if large else ["ours", "tensorly"] * repeats
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    worker = context.Process(target=measure, args=(sites, order, threads, sender))
    worker.start()
    sender.close()
    seconds: dict[str, list[float]] = {"ours": [], "tensorly": []}
    errors: dict[str, float] = {}
    for _ in order:
        try:
            if not receiver.poll(limit):
                break
            who, elapsed, error = receiver.recv()
        except EOFError:  # the worker died, for example for want of memory
            break
        seconds[who].append(elapsed)
        errors[who] = error
    worker.terminate()
    worker.join()
    median = {who: statistics.median(runs) if runs else None for who, runs in seconds.items()}
    theirs, mine = median["tensorly"], median["ours"]
    return {
        "size": list(size),
        "layout": name,
        "num_sites": num_sites,
        "bonds": list(sites.bonds),
        "exact": sites.is_exact,
        "ours_s": mine,
        "tensorly_s": theirs,
        "ours_runs": len(seconds["ours"]),
        "tensorly_runs": len(seconds["tensorly"]),
        "speedup": theirs / mine if theirs and mine else None,
        "ours_error": errors.get("ours"),
        "tensorly_error": errors.get("tensorly"),
    }


def check(result: dict) -> None:
    """Our error is the same as TensorLy's or smaller, up to rounding."""
    if result["ours_error"] is None or result["tensorly_error"] is None:
        return
    bound = max(result["tensorly_error"] * (1 + 1e-4), ROUNDING)
    if result["ours_error"] > bound:
        raise SystemExit(f"error {result['ours_error']} is above TensorLy's: {result}")


def table_of(results: list[dict], limit: float) -> Table:
    table = Table("matrix", "layout", "bonds", "TensorLy s", "ours s", "ratio", "error", "ours")
    for result in results:
        runs = " (1 run)" if result["tensorly_runs"] == 1 else ""
        theirs = result["tensorly_s"]
        table.add_row(
            "x".join(map(str, result["size"])),
            f"{result['layout']}, {result['num_sites']}",
            ",".join(map(str, result["bonds"])) + (" full" if result["exact"] else ""),
            f"{theirs:.2f}{runs}" if theirs else f"stopped at {limit:.0f}",
            f"{result['ours_s']:.3f}" if result["ours_s"] else "failed",
            f"{result['speedup']:.1f}"
            if result["speedup"]
            else f"> {limit / result['ours_s']:.0f}"
            if result["ours_s"]
            else "",
            f"{result['tensorly_error']:.4g}" if theirs else "",
            f"{result['ours_error']:.4g}" if result["ours_s"] else "",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    parser.add_argument("--quick", action="store_true", help="the small matrix only, two repeats")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=float, default=300, help="seconds after which a run is stopped")
    options = parser.parse_args()
    console = Console(width=120)
    results = []
    for size in SIZES[:1] if options.quick else SIZES:
        for layout in LAYOUTS:
            repeats = 2 if options.quick else 5
            result = run_case(size, layout, repeats, options.threads, options.limit)
            results.append(result)
            console.print_json(json.dumps(result), indent=None)
            check(result)
    console.print(table_of(results, options.limit))
    if options.json:
        environment = {
            "torch": torch.__version__,
            "tensorly": tensorly.__version__,
            "processor": platform.machine(),
            "threads": options.threads,
            "limit_s": options.limit,
        }
        document = {"environment": environment, "results": results}
        options.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
