"""What compressing a mixture costs: forms of sharing between experts, and fewer neurons.

    MPOE_TEST_DATA=... python examples/benchmarks/compression_mixtures.py --json FILE [--source FOLDER]

Every way stores the same share of the experts' numbers; each layer's matrices get the same share. The fitted
matrices replace those of the stock model. The cost is the growth of held-out loss in nats per token, per
domain. Calibrated on text that the evaluation does not see. Results in the JSON file are not measured again.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from mpoe_convert.compression.expert_moments import ExpertMoments, collect, is_experts
from mpoe_convert.compression.stream import keep_no_cache
from mpoe_convert.decomposition.neurons import kept_neurons, leverage, refitted_down, widths_by_score
from mpoe_convert.decomposition.stack_fit import choose_form, fit_stack
from mpoe_convert.decomposition.stack_metric import Stack, side_spectra
from mpoe_convert.decomposition.stacks import FORMS, ranks_within

SHARES = (0.8, 0.6, 0.4, 0.2)
LENGTH, WINDOWS = 256, 80
CALIBRATION_WINDOWS = 160
Layer = dict[str, Tensor]  # role -> (E, in, out)


def texts(root: Path) -> dict[str, tuple[str, str]]:
    """domain -> (calibration text, evaluation text)."""
    code = sorted(Path(os.__file__).parent.glob("*.py"))
    parts = [code[1::2], code[::20]]
    sources = ["\n".join(f.read_text(encoding="utf-8", errors="ignore") for f in part) for part in parts]
    mix = root / "text/mix"
    pairs = {
        "stories": ("train_tinystories.txt", "heldout_tinystories_heldout.txt"),
        "plays": ("train_shakespeare.txt", "heldout_shakespeare_last10_.txt"),
        "wiki": ("train_wikitext2valid.txt", "heldout_wikitext2_test_300k_chars_.txt"),
    }
    found = {"code": (sources[0], sources[1])}
    for name, files in pairs.items():
        ours, theirs = ((mix / file).read_text(encoding="utf-8") for file in files)
        found[name] = (ours, theirs)
    return found


def windows(tokenizer, text: str, count: int) -> Tensor:
    """(count, LENGTH) token ids, spread over the text."""
    ids = tokenizer(text[: 4000 * count], verbose=False)["input_ids"]
    whole = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).reshape(-1, LENGTH)
    return whole[torch.linspace(0, len(whole) - 1, min(count, len(whole))).long()]


@torch.no_grad()
def losses(model, domains: dict[str, Tensor]) -> dict[str, float]:
    """Nats per token."""
    found = {}
    for name, ids in domains.items():
        parts = [float(model(input_ids=part, labels=part).loss) for part in ids.split(16)]
        sizes = [len(part) for part in ids.split(16)]
        found[name] = sum(p * s for p, s in zip(parts, sizes, strict=True)) / sum(sizes)
    return found


def read_layer(module) -> Layer:
    gate, up = module.gate_up_proj.detach().mT.chunk(2, dim=-1)
    return {"gate": gate, "up": up, "down": module.down_proj.detach().mT}


@torch.no_grad()
def write_layer(module, layer: Layer) -> None:
    module.gate_up_proj.copy_(torch.cat([layer["gate"], layer["up"]], -1).mT)
    module.down_proj.copy_(layer["down"].mT)


def metric_of(moments: ExpertMoments, role: str):
    return moments.metric("inner" if role == "down" else "inputs")


def with_form(form: str) -> Callable[[Layer, ExpertMoments, float], tuple[Layer, dict]]:
    """Every matrix in this form, or in the best one."""

    def compress(layer: Layer, moments: ExpertMoments, share: float) -> tuple[Layer, dict]:
        found, told = {}, {}
        for role, stack in layer.items():
            numbers, metric = int(share * stack.numel()), metric_of(moments, role)
            if form == "chosen":
                fit = choose_form(stack, numbers, metric)
            else:
                spectra = side_spectra(Stack(stack, metric)) if form == "both" else None
                fit = fit_stack(stack, form, ranks_within(form, *stack.shape, numbers, spectra), metric)
            found[role] = torch.stack([fit.matrix(e) for e in range(len(stack))])
            told[role] = {"form": fit.form, "ranks": fit.ranks, "error": fit.error}
        return found, told

    return compress


def fewer_neurons(layer: Layer, moments: ExpertMoments, share: float) -> tuple[Layer, dict]:
    """Neurons dropped by ridge leverage over the experts of a layer, `down` refitted."""
    metric = moments.metric("inner")
    scores = [leverage(metric[e] / metric[e].diagonal().mean()) for e in range(len(metric))]
    widths = widths_by_score(scores, int(share * sum(map(len, scores))))
    found = {role: torch.zeros_like(stack) for role, stack in layer.items()}
    for expert, (part, width) in enumerate(zip(scores, widths, strict=True)):
        kept = kept_neurons(part, width)
        for role in ("gate", "up"):
            found[role][expert][:, kept] = layer[role][expert][:, kept]
        found["down"][expert][kept] = refitted_down(layer["down"][expert], metric[expert], kept)
    return found, {"widths": widths}


WAYS = {form: with_form(form) for form in FORMS if form != "whole"} | {"chosen": with_form("chosen")}
WAYS["neurons"] = fewer_neurons


def measure(arguments: argparse.Namespace) -> dict:
    root = Path(os.environ["MPOE_TEST_DATA"])
    folder = arguments.source or root / "checkpoints/qwen3moe-mix"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    model.eval()
    keep_no_cache(model)
    domains = texts(root)
    evaluation = {name: windows(tokenizer, pair[1], WINDOWS) for name, pair in domains.items()}
    share = CALIBRATION_WINDOWS // len(domains)
    calibration = torch.cat([windows(tokenizer, pair[0], share) for pair in domains.values()])
    order = torch.randperm(len(calibration), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": part} for part in calibration[order].split(10)]
    moments: dict[str, ExpertMoments] = {}
    start = time.perf_counter()
    collect(model, batches, moments.__setitem__)
    results = json.loads(arguments.json.read_text()) if arguments.json.is_file() else {}
    results["calibration_seconds"] = time.perf_counter() - start
    modules = {path: m for path, m in model.named_modules() if is_experts(m)}
    layers = {path: read_layer(module) for path, module in modules.items()}
    layers = {path: {r: t.clone() for r, t in layer.items()} for path, layer in layers.items()}
    results.setdefault("source", losses(model, evaluation))
    for way in arguments.ways or WAYS:
        for kept in arguments.shares:
            key = f"{way} {kept:g}"
            if key in results:
                continue
            start, told = time.perf_counter(), {}
            for path, module in modules.items():
                layer, told[path] = WAYS[way](layers[path], moments[path], kept)
                write_layer(module, layer)
            seconds = time.perf_counter() - start
            after = losses(model, evaluation)
            growth = {name: after[name] - results["source"][name] for name in after}
            results[key] = {"growth": growth, "seconds": seconds, "matrices": told}
            arguments.json.write_text(json.dumps(results, indent=1) + "\n")
            print(key, f"{statistics.mean(growth.values()):.4f}", f"{seconds:.1f} s", flush=True)
    return results


def print_table(results: dict, shares: list[float]) -> None:
    table = Table("way", *[f"{share:.0%}" for share in shares])
    for way in WAYS:
        cells = [results.get(f"{way} {share:g}") for share in shares]
        if any(cells):
            table.add_row(way, *[f"{statistics.mean(c['growth'].values()):.4f}" if c else "" for c in cells])
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--source", type=Path)
    parser.add_argument("--ways", nargs="*")
    parser.add_argument("--shares", nargs="*", type=float, default=list(SHARES))
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    print_table(measure(arguments), arguments.shares)


if __name__ == "__main__":
    main()
