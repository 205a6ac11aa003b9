"""How long calibration and a fit in a metric take, beside the operations that they consist of.

    python examples/benchmarks/compression_speed.py

* A 4096 x 11008 matrix at 60 %: whitened, factored and written, against one Cholesky decomposition of its
  moment and one randomized SVD (torch.svd_lowrank) of that rank.
* Calibration (metric outputs) of a model of GPT-2's layer shapes, against plain forward passes of the same
  batches through the model in memory. Without what both do: loading.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModel, GPT2Config, GPT2LMHeadModel, logging

from mpoe_convert import Recipe
from mpoe_convert.compression.calibrate import calibrate
from mpoe_convert.compression.dense_run import DenseRun
from mpoe_convert.compression.stream import run_batch
from mpoe_convert.decomposition.low_rank import Metric, factor
from mpoe_convert.planning.planner import plan_checkpoint
from mpoe_convert.planning.resolve import resolve_recipe
from mpoe_convert.source.checkpoint import open_checkpoint

ROUNDS = 3


def seconds(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def fit(folder: Path) -> dict:
    rows, cols = 4096, 11008
    rank = int(0.6 * rows * cols / (rows + cols))
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(rows, cols, generator=generator)
    inputs = torch.randn(2 * rows, rows, generator=generator) * torch.logspace(0, -2, rows)
    moment = inputs.mT @ inputs / len(inputs)
    ridge = 1e-6 * torch.eye(rows)

    def ours() -> None:
        first, second = factor(matrix, rank, Metric(moment))
        save_file({"first": first, "second": second}, folder / "fitted.safetensors")

    def needed() -> None:
        torch.linalg.cholesky((moment + ridge).double())
        torch.svd_lowrank(matrix, rank, niter=2)

    return alternate(ours, needed) | {"what": f"fit of {rows} x {cols} at rank {rank}"}


def calibration(folder: Path) -> dict:
    config = GPT2Config(n_layer=4, vocab_size=1000, n_positions=512)
    GPT2LMHeadModel(config).save_pretrained(folder / "model")
    checkpoint = open_checkpoint(str(folder / "model"))
    planned = plan_checkpoint(
        resolve_recipe(Recipe(str(folder / "model"), bond_dim=8), checkpoint), checkpoint
    )
    generator, cpu = torch.Generator().manual_seed(0), torch.device("cpu")
    model = AutoModel.from_pretrained(folder / "model").eval()

    def batches() -> list[dict]:  # never twice the same: nothing comes from the cache
        return [{"input_ids": torch.randint(1000, (8, 512), generator=generator)} for _ in range(4)]

    def load() -> None:
        with DenseRun(planned, checkpoint, (), cpu).streamed():
            pass

    def passes() -> None:
        with torch.no_grad():
            for batch in batches():
                run_batch(model, batch)

    found = alternate(lambda: calibrate(DenseRun(planned, checkpoint, tuple(batches()), cpu)), passes)
    loading = statistics.median(seconds(load) for _ in range(ROUNDS))
    found["ours"] -= loading
    return found | {"ratio": found["ours"] / found["needed"], "what": "calibration on 16,384 tokens"}


def alternate(ours, needed) -> dict:
    pairs = [(seconds(ours), seconds(needed)) for _ in range(ROUNDS)]
    ours, needed = (statistics.median(times) for times in zip(*pairs, strict=True))
    return {"ours": ours, "needed": needed, "ratio": ours / needed}


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        for measured in (calibration, fit):
            print(json.dumps(measured(Path(folder))), flush=True)


if __name__ == "__main__":
    main()
