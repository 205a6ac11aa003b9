"""What rounding costs, of the source alone and on top of `--keep`, at equal bytes.

    MPOE_TEST_DATA=… python examples/benchmarks/rounding.py --json FILE [MODEL …] [--shares 0.6 …]

The source rounded alone is its FFN matrices (of a mixture, its experts'), in the groups of `--bits`; 3 and 2
bits lie in the same groups as 4. It has a zero point per group, as libraries store it, and so all levels
between the ends: it is closer than the format of `--bits`, which has none. Ours takes at most as many bytes:
`--keep` alone, or with its large cores rounded as `--bits` does, in memory. Numbers that are not rounded,
and scales, count 16 bits. The cost is the growth of held-out loss in nats per token, mean over texts that
calibration does not see. Results in the JSON file are not measured again. With --shares also ours at these
shares of the numbers, whole and with cores at 8 and 4 bits.

smollm2-135m is made by make_smollm2.py. `upcycled` is that of compression_mixtures.py: --upcycled FOLDER has
it, or gets it. Needs pip install "mpoe-convert[calibrate]".
"""

import argparse
import json
import math
import tempfile
import time
from pathlib import Path

import torch
from compression_mixtures import is_experts, losses, read_layer, windows, write_layer
from mixture_rivals import rounded_between
from mixture_sources import trained_from_scratch, upcycled
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from mpoe_convert import Recipe, convert, plan
from mpoe_convert.artifact.rounding import group_size, round_core
from mpoe_convert.planning.plan import Plan
from mpoe_convert.planning.rounding import large_cores, rounded_specs
from mpoe_convert.source.matrices import FLOAT_DTYPES
from mpoe_convert.source.safetensors_file import DTYPE2BYTES
from mpoe_convert.tables import Table

WINDOWS = 32  # of 256 tokens, per text
# Two experts that own next to nothing, so that all but the shared cores is small.
DENSE = {"experts": 2, "top_k": 1, "bond_dim": 2, "noise": 0.0}
# The bits of the source rounded alone, and those of our cores, at as many bytes.
CELLS = ((8, 16), (4, 16), (4, 8), (3, 16), (3, 8), (3, 4), (2, 16), (2, 8), (2, 4))
# Name -> (what `--keep` is given with, tokens of calibration, texts, cells).
MODELS = {
    "gpt2-mix-2m": (DENSE, 16384, ("stories", "plays", "wiki"), CELLS),
    "qwen3moe-mix": ({}, 16384, ("stories", "plays", "wiki", "code"), ((4, 8), (3, 4), (2, 4))),
    "upcycled": ({}, 16384, ("topics", "code", "phonemes", "captions"), ((3, 4), (2, 4), (4, 8), (8, 16))),
    "smollm2-135m": (DENSE, 4096, ("wiki",), ((8, 16), (4, 8), (3, 4), (2, 4))),
}


def source_bytes(planned: Plan, bits: int) -> int:
    """Of the matrices that are converted, with biases; at 16 bits nothing is rounded."""
    total = 0
    for matrix in planned.matrices:
        width, bias = matrix.rows, matrix.cols if matrix.source.bias else 0
        copies = matrix.dense_params // (matrix.rows * matrix.cols + bias)  # of a mixture, its experts
        scales = width // group_size(width, bits) * (2 + bits / 8) if bits < 16 else 0  # and zero points
        total += copies * (math.ceil(matrix.cols * (width * bits / 8 + scales)) + 2 * bias)
    return total


def stored_bytes(planned: Plan, bits: int) -> int:
    """Of everything in the converted FFNs."""
    specs = [rounded_specs(ffn, None if bits == 16 else bits) for ffn in planned.ffns]
    pairs = (spec for found in specs for spec in found.values())
    return sum(math.prod(s) * (2 if dtype in FLOAT_DTYPES else DTYPE2BYTES[dtype]) for s, dtype in pairs)


def nearest(weight: Tensor, bits: int) -> Tensor:
    """A weight (out, in), its groups along the inputs rounded."""
    return rounded_between(weight, bits, group_size(weight.shape[1], bits))


@torch.no_grad()
def round_source(model: torch.nn.Module, planned: Plan, bits: int) -> None:
    for module in filter(is_experts, model.modules()):
        layer = read_layer(module)
        found = {r: torch.stack([nearest(own.T, bits).T for own in stack]) for r, stack in layer.items()}
        write_layer(module, found)
    for source in (m.source for m in planned.matrices if not m.source.stacked):
        weight = model.get_parameter(source.weight)
        assert source.part is None
        weight.copy_(nearest(weight.T, bits).T if source.transposed else nearest(weight, bits))


@torch.no_grad()
def round_cores(model: torch.nn.Module, planned: Plan, bits: int) -> None:
    parameters = dict(model.named_parameters())
    for matrix in planned.matrices:
        for name, layers in large_cores(matrix).items():
            parameters[name].copy_(round_core(layers, parameters[name], bits)[1])


def fitting(recipe: Recipe, whole: Plan, target: int, bits: int) -> Recipe:
    """The largest share, in steps of 0.5 %, whose plan takes no more than so many bytes."""
    keep = min(1.0, math.floor(200 * target / source_bytes(whole, bits)) / 200)
    while stored_bytes(plan(recipe.replace(keep=keep)), bits) > target:
        keep = round(keep - 0.005, 3)
    return recipe.replace(keep=keep)


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()


class Measured:
    """The rows of one model, those that the file has and new ones."""

    def __init__(self, name: str, folder: Path | None, results: dict, file: Path | None):
        options, tokens, wanted, self.cells = MODELS[name]
        self.file = file
        scratch, texts = upcycled(folder) if folder else trained_from_scratch()
        self.source = folder or scratch.with_name(name)
        self.results, self.rows = results, results.setdefault(name, {})
        tokenizer = AutoTokenizer.from_pretrained(self.source)
        found = {domain: pair for domain, pair in texts.items() if domain in wanted}
        self.held_out = {domain: windows(tokenizer, text, WINDOWS) for domain, (_, text) in found.items()}
        self.options = options | {"calibration_tokens": tokens}
        self.calibration = {domain: text[: 8 * tokens] for domain, (text, _) in found.items()}
        self.whole = plan(Recipe(str(self.source), **options))
        self.options |= {"correct": True} if options is DENSE else {}

    def note(self, key: str, model: torch.nn.Module, num_bytes: int, **told: float) -> None:
        loss = losses(model, self.held_out)
        row = {"bytes": num_bytes, "share": num_bytes / source_bytes(self.whole, 16), "loss": loss} | told
        before = self.rows.get("source", row)["loss"]
        row["growth"] = sum(loss[domain] - before[domain] for domain in loss) / len(loss)
        self.rows[key] = row
        print(key, f"{row['share']:.1%} of the bytes", f"{row['growth']:.4f}", flush=True)
        if self.file:
            self.file.write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")

    def measure(self, shares: list[float]) -> None:
        for bits in (16, *sorted({bits for bits, _ in self.cells}, reverse=True)):
            key = "source" if bits == 16 else f"source, {bits} bits"
            if key not in self.rows:
                model = load(self.source)
                if bits < 16:
                    round_source(model, self.whole, bits)
                self.note(key, model, source_bytes(self.whole, bits))
        with tempfile.TemporaryDirectory() as folder:
            texts_of = []
            for domain, text in self.calibration.items():
                texts_of.append(str(Path(folder) / f"{domain}.txt"))
                Path(texts_of[-1]).write_text(text, encoding="utf-8")
            recipe = Recipe(str(self.source), keep=1, **self.options, calibrate=tuple(texts_of))
            for share in shares:
                keys = {f"ours, {bits} bits, {share:.1%} of the numbers": bits for bits in (16, 8, 4)}
                if keys.keys() - self.rows.keys():
                    self.compress(keys, recipe.replace(keep=share), Path(folder) / f"{share:g}")
            for theirs, bits in self.cells:
                key = f"ours, {bits} bits, at the source's {theirs} bits"
                if key not in self.rows:
                    chosen = fitting(recipe, self.whole, source_bytes(self.whole, theirs), bits)
                    self.compress({key: bits}, chosen, Path(folder) / f"{theirs}-{bits}")

    def compress(self, keys: dict[str, int], recipe: Recipe, out: Path) -> None:
        """Measure one conversion, with its cores at the bits that the keys of the results have."""
        start = time.perf_counter()
        planned = convert(recipe, out).plan
        seconds = time.perf_counter() - start
        assert recipe.keep is not None
        for key, bits in keys.items():
            model = load(out)
            if bits < 16:
                round_cores(model, planned, bits)
            self.note(key, model, stored_bytes(planned, bits), keep=recipe.keep, seconds=round(seconds, 1))


def table(results: dict) -> Table:
    """One row per model and number of bits of the source rounded alone."""
    shown = []
    for name, rows in results.items():
        for theirs in (bits for bits in (8, 4, 3, 2) if f"source, {bits} bits" in rows):
            alone = rows[f"source, {theirs} bits"]
            row = {"model": name, "bytes": f"{alone['share']:.1%}"}
            row["source rounded"] = f"{theirs} bits: {alone['growth']:z.4f}"
            for bits in (16, 8, 4):
                found = rows.get(f"ours, {bits} bits, at the source's {theirs} bits")
                text = f"{found['keep']:.1%}: {found['growth']:z.4f}" if found else None
                row["keep, 16 bits" if bits == 16 else f"keep, cores at {bits} bits"] = text
            shown.append(row)
    return Table("Growth of held-out loss, nats per token", tuple(shown), left=("model",))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", default=list(MODELS), help=", ".join(MODELS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--shares", nargs="*", type=float, default=[])
    parser.add_argument("--upcycled", type=Path, default=Path("upcycled"))
    arguments = parser.parse_args()
    known = arguments.json is not None and arguments.json.is_file()
    results = json.loads(arguments.json.read_text(encoding="utf-8")) if known else {}
    for name in arguments.models:
        folder = arguments.upcycled if name == "upcycled" else None
        Measured(name, folder, results, arguments.json).measure(arguments.shares)
    print(table(results).markdown())


if __name__ == "__main__":
    main()
