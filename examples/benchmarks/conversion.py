"""Time and memory of whole conversions on synthetic checkpoints.

    python examples/benchmarks/conversion.py [--json FILE] [--repeats N] [--only gpt2|llama|llama-8]

* gpt2: the shapes of GPT-2 (124 M parameters, float32). Time of a whole conversion against reading the
  same tensors and writing as many bytes with safetensors, alternating; ratios of medians, of the clock and of
  the processor's seconds in all threads. By default, of kind low-rank, and of one-sided chains.
* llama: the same of a Llama of 1.24 billion parameters in bfloat16. Peak resident memory of a fresh process
  that converts it, over that of one that only imported torch and what the conversion imports. llama-8: the
  same of one of 0.55 billion, with half of its layers and a smaller vocabulary; where it is asked for.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from mpoe_convert import Recipe, convert

SHARD_BYTES = 500_000_000


def write_checkpoint(folder: Path, config, model_class, dtype) -> Path:
    """Random tensors of a model's shapes, written shard by shard; the model itself stays on meta."""
    folder.mkdir(parents=True)
    with torch.device("meta"):
        model = model_class(config)
    tied = set(getattr(model, "_tied_weights_keys", None) or {})
    generator = torch.Generator().manual_seed(0)
    shard, size, weight_map, files = {}, 0, {}, []

    def flush():
        nonlocal shard, size
        files.append(f"model-{len(files) + 1:05d}.safetensors")
        save_file(shard, folder / files[-1], metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, files[-1]))
        shard, size = {}, 0

    for name, parameter in model.named_parameters():
        if name in tied:
            continue
        shard[name] = (0.02 * torch.randn(parameter.shape, generator=generator)).to(dtype)
        size += shard[name].nbytes
        if size > SHARD_BYTES:
            flush()
    if shard:
        flush()
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.architectures = [model_class.__name__]
    config.save_pretrained(folder)
    return folder


def read_and_write(source: Path, target: Path, extra_bytes: int) -> None:
    """The least any converter has to do: read every tensor, write as many bytes as the artifact has."""
    target.mkdir()
    for path in sorted(source.glob("*.safetensors")):
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        save_file(tensors, target / path.name)
    save_file({"extra": torch.zeros(extra_bytes, dtype=torch.uint8)}, target / "extra.safetensors")


def timed(function) -> tuple[float, float]:
    """Seconds, and those of the processor in all threads of this process."""
    start, processor = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - start, time.process_time() - processor


def medians(found: list[tuple[float, float]]) -> tuple[float, float]:
    seconds, processor = map(statistics.median, zip(*found, strict=True))
    return seconds, processor


def benchmark_time(source: Path, folder: Path, repeats: int, most_error: float, **options) -> dict:
    """Seconds of conversions without the interpreter's start and imports, and of copies of as many bytes."""
    recipe = Recipe(str(source), experts=8, bond_dim=64, **options)
    report = convert(recipe, folder / "out")
    shutil.rmtree(folder / "out")
    errors = [matrix.relative_error for matrix in report.matrices]
    assert max(errors) < most_error, max(errors)
    extra = max(report.plan.totals.stored_bytes - report.plan.totals.dense_bytes, 0)
    ours, copies = [], []
    for _ in range(repeats):  # both find the same: the pages that removing the other's files set free
        copies.append(timed(lambda: read_and_write(source, folder / "copy", extra)))
        shutil.rmtree(folder / "copy")
        ours.append(timed(lambda: convert(recipe, folder / "out")))
        shutil.rmtree(folder / "out")
    (seconds, processor), (copying, copying_processor) = medians(ours), medians(copies)
    return {
        "matrices": len(report.matrices),
        "largest_relative_error": max(errors),
        "convert_seconds": seconds,
        "read_and_write_seconds": copying,
        "ratio": seconds / copying,
        "convert_processor_seconds": processor,
        "read_and_write_processor_seconds": copying_processor,
        "processor_ratio": processor / copying_processor,
        "repeats": repeats,
    }


LLAMA: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "tie_word_embeddings": True,
}
LLAMAS = {"llama": {}, "llama-8": {"num_hidden_layers": 8, "vocab_size": 32_000}}
# The interpreter's own share: everything that a conversion imports.
IMPORTS = "import torch, mpoe_convert.conversion.convert, mpoe_convert.runtime.modeling_mpoe"
# Not getrusage: a child's ru_maxrss starts at its parent's.
PEAK = "print('peak', next(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"


def peak_bytes(code: str) -> int:
    """Peak resident memory of a fresh process that runs the code (Linux)."""
    done = subprocess.run(
        [sys.executable, "-c", f"{IMPORTS}\n{code}\n{PEAK}"], capture_output=True, text=True, check=True
    )
    return int(done.stdout.split()[-2]) * 1024


def benchmark_memory(source: Path, folder: Path) -> dict:
    recipe = f"from mpoe_convert import Recipe; recipe = Recipe({str(source)!r}, experts=8, bond_dim=64)"
    peak = peak_bytes(f"{recipe}\nmpoe_convert.convert(recipe, {str(folder / 'out')!r})")
    report = json.loads((folder / "out/conversion_report.json").read_text())
    assert report["max_relative_error"] < 5e-3, report["max_relative_error"]  # bfloat16 cores
    base = peak_bytes("")
    code = f"{recipe}\nfrom mpoe_convert import plan; print(plan(recipe).peak_bytes)"
    planned = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {
        "parameters": report["totals"]["dense_params"],
        "artifact_bytes": report["totals"]["stored_bytes"],
        "base_bytes": base,
        "peak_over_base_bytes": peak - base,
        "planned_peak_bytes": int(planned.stdout.split()[-1]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=("gpt2", *LLAMAS))
    options = parser.parse_args()
    results = {"threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as folder:
        where, repeats = Path(folder), options.repeats
        if options.only in (None, "gpt2"):
            gpt2 = write_checkpoint(where / "gpt2", GPT2Config(), GPT2LMHeadModel, torch.float32)
            results["gpt2"] = benchmark_time(gpt2, where, repeats, 1e-6)
            results["gpt2, low-rank"] = benchmark_time(gpt2, where, repeats, 1e-6, kind="low-rank")
            results["gpt2, one-sided"] = benchmark_time(gpt2, where, repeats, 1e-6, layout="one-sided")
        if options.only != "gpt2":
            name = options.only or "llama"
            config = LlamaConfig(**LLAMA | LLAMAS[name])
            llama = write_checkpoint(where / name, config, LlamaForCausalLM, torch.bfloat16)
            results[name] = benchmark_time(llama, where, repeats, 5e-3) | benchmark_memory(llama, where)
    table = Table("benchmark", "quantity", "value")
    for name, numbers in results.items():
        for key, value in numbers.items() if isinstance(numbers, dict) else (("", numbers),):
            table.add_row(name, key, f"{value:,.4g}" if isinstance(value, float) else f"{value:,}")
    Console(width=100).print(table)
    text = json.dumps(results, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
