"""Fit one layer of a large mixture: time and memory, with given moments.

    python examples/benchmarks/layer_fit.py [--experts 128] [--hidden 2048] [--inner 768] [--keep 0.6]
                                            [--threads 2] [--role gate --role up --role down] [--json FILE]

The shape is Qwen3-30B-A3B's by default; weights are random and bfloat16. Of every projection a form is chosen
(`stack_choices`), fitted (`fit_stack`), and its errors are measured, as a conversion with `--keep` does. The
moments are those of random tokens of falling scale, 400 for every expert, made before and not timed.

Memory is what the process takes at most, until a projection is done, beyond what it took once everything was
imported: that of `up` and `down` includes those before. `--role down` alone measures one. Linux only.
"""

import argparse
import json
import resource
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from mpoe_convert.compression.expert_moments import BORROWED, Borrowing
from mpoe_convert.decomposition.stack_choices import stack_choices
from mpoe_convert.decomposition.stack_fit import fit_stack
from mpoe_convert.decomposition.symmetric import add_gram, packed_length

GIB = 2**30
TOKENS = 400  # that each expert saw
TOP_K = 8  # experts that see each token, as in Qwen3-30B-A3B


def peak() -> float:
    """GiB, the most that this process has taken so far; Linux gives KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def random_moments(experts: int, features: int) -> Borrowing:
    sums = torch.zeros(experts, packed_length(features))
    scales = torch.linspace(3, 0.1, features)
    for packed in sums:
        add_gram(packed, torch.randn(TOKENS, features) * scales)
    tokens = torch.full((experts,), TOKENS)
    return Borrowing(sums, tokens, TOKENS * experts // TOP_K, BORROWED)


def random_matrices(experts: int, rows: int, cols: int) -> torch.Tensor:
    matrices = torch.empty(experts, rows, cols, dtype=torch.bfloat16)
    for matrix in matrices:
        matrix.copy_(torch.randn(rows, cols))
    return matrices


def timed(function, *arguments):
    """The function's result, the seconds that it took, and those of the processor."""
    wall, used = time.perf_counter(), time.process_time()
    found = function(*arguments)
    return found, time.perf_counter() - wall, time.process_time() - used


def measure(matrices: torch.Tensor, moments: Borrowing, keep: float) -> dict:
    numbers = int(keep * matrices.numel())
    found, choosing, used = timed(stack_choices, matrices, numbers, moments)
    best = min((c for c in found.choices if c.numbers <= numbers), key=lambda choice: choice.lost)

    def fit() -> float:
        return fit_stack(matrices, best.form, best.ranks, moments).error

    error, fitting, used_then = timed(fit)
    return {
        "form": best.form,
        "ranks": best.ranks,
        "expected_relative_squared_error": best.lost / found.energy,
        "relative_squared_error": error,
        "choosing_seconds": choosing,
        "fitting_seconds": fitting,
        "processor_seconds": used + used_then,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=768)
    parser.add_argument("--keep", type=float, default=0.6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--role", choices=("gate", "up", "down"), action="append", help="default: all")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    sizes = {"gate": (options.hidden, options.inner), "up": (options.hidden, options.inner)}
    sizes["down"] = (options.inner, options.hidden)
    start, moments, roles = peak(), {}, {}
    for role in options.role or sizes:
        rows, cols = sizes[role]
        moments = {rows: moments.get(rows) or random_moments(options.experts, rows)}
        matrices = random_matrices(options.experts, rows, cols)
        roles[role] = measure(matrices, moments[rows], options.keep) | {"peak_gib": peak() - start}
        print(json.dumps({role: roles[role]}), flush=True)
    layer = 3 * options.experts * options.hidden * options.inner * 2 / GIB
    columns = "form", "ranks", "choosing s", "fitting s", "processor s", "relative squared error", "peak GiB"
    table = Table("", *columns)
    for role, found in roles.items():
        names = ("choosing_seconds", "fitting_seconds", "processor_seconds")
        times = [f"{found[name]:.1f}" for name in names]
        ranks = ", ".join(map(str, found["ranks"]))
        table.add_row(
            role,
            found["form"],
            ranks,
            *times,
            f"{found['relative_squared_error']:.4f}",
            f"{found['peak_gib']:.2f}",
        )
    Console(width=110).print(table, f"one layer in bfloat16: {layer:.2f} GiB")
    if options.json:
        document = {"torch": torch.__version__, "threads": options.threads, "layer_gib": layer}
        options.json.write_text(json.dumps(document | {"roles": roles}, indent=2) + "\n")


if __name__ == "__main__":
    main()
