"""What compressing a mixture costs: ours beside published ways, at the same share of the experts' numbers.

    MPOE_TEST_DATA=... python examples/benchmarks/compression_mixtures.py --json FILE [--upcycled FOLDER]

The source is qwen3moe-mix. With --upcycled it is a Mixtral, made of copies of a dense model that are trained
on several domains; FOLDER is where it lies, or where it is written first.

The fitted matrices replace those of the stock model. The cost is the growth of held-out loss in nats per
token, per domain; beside it, how many greedy continuations end in a loop. Calibrated on text that the
evaluation does not see. Results in the JSON file are not measured again. A plot is written beside it.
With `--calibration 1` the calibration windows are of the next stretch of their text; a JSON file is of one.

* `auto`: the form and ranks of every matrix by expected loss, under one budget; `energy`: by relative errors;
  `uniform`: the best form for every matrix, each with the same share; both with one rank for all experts.
* `one rank`: as `auto`, with one rank for all experts of a matrix.
* `none` (SVD-LLM), `input`, `output` (MoLAE, bases on one side), `both` (Tucker-2, TD-MoE), `base`: one form
  for all, each matrix with the same share.
* `d2` (D2-MoE), `neurons` (ridge leverage and refit), `reap` (`--experts`), `hc-smoe` (whole experts: the
  largest number within the share); `reap, auto`, `reap, one rank`: an eighth of the experts left
  out, the rest as `auto`, or as `one rank`.
* `mobe`, `slbf`: trained on the weights alone, for 500 steps where the papers take 8,000 and more; only if
  `--ways` names them, as `half down`: as `auto`, with half the expected loss for down matrices.
* `rounded N`: the source's experts rounded to N bits in groups of 64, at its own share of 16-bit numbers;
  `one rank, N bits`: its cores rounded alike, at that share. Groups of rows that are no multiple of 64 are
  shorter, and their scales are not counted: `rounding.py` has all bytes, and ranks of experts' own.

Needs pip install "mpoe-convert[calibrate]" matplotlib.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace

import torch
from fewer_neurons import kept_neurons, leverage, refitted_down, widths_by_score
from mixture_rivals import (
    base_and_differences,
    clusters,
    loop_rate,
    mean_outputs,
    merged,
    mobe_start,
    rounded,
    slbf_start,
    trained_bases,
    without,
)
from mixture_sources import Texts, trained_from_scratch, upcycled
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from mpoe_convert.compression.batches import split
from mpoe_convert.compression.expert_gradients import expert_sensitivities
from mpoe_convert.compression.expert_moments import ExpertMoments, collect, is_experts
from mpoe_convert.compression.kept_experts import kept_experts
from mpoe_convert.compression.stack_budget import StackCandidate, shared_out, uniform
from mpoe_convert.compression.stream import keep_no_cache
from mpoe_convert.decomposition.stack_choices import StackChoices, stack_choices
from mpoe_convert.decomposition.stack_fit import StackFit, fit_stack
from mpoe_convert.decomposition.stack_metric import Stack, expand, side_spectra
from mpoe_convert.decomposition.stacks import FORMS, ranks_within
from mpoe_convert.ranks import ALONE
from mpoe_convert.source.mixtures import sources_of

SHARES = (0.8, 0.6, 0.4, 0.2)
BITS = (8, 4, 3)
GROUP = 64
LENGTH, WINDOWS = 256, 80
CALIBRATION_WINDOWS = 160
PROMPTS, PROMPT_LENGTH = 16, 32  # per domain
TRAINING_STEPS = 500
Layer = dict[str, Tensor]  # role -> (E, in, out)
Layers = dict[str, Layer]  # path -> layer


def windows(tokenizer, text: str, count: int, stretch: int = 0) -> Tensor:
    """(count, LENGTH) token ids, spread over a stretch of the text."""
    size = 4000 * count
    ids = tokenizer(text[size * stretch : size * (stretch + 1)], verbose=False)["input_ids"]
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
def write_layer(module, layer: Layer, experts: slice | list[int] = slice(None)) -> None:
    module.gate_up_proj[experts] = torch.cat([layer["gate"], layer["up"]], -1).mT
    module.down_proj[experts] = layer["down"].mT


@dataclass
class Source:
    """A stock mixture, and what calibration found."""

    model: torch.nn.Module
    batches: list[dict]
    modules: dict = field(init=False)
    layers: Layers = field(init=False)
    moments: dict[str, ExpertMoments] = field(init=False)
    candidates: dict[tuple[float, bool], dict] = field(default_factory=dict)
    kept: dict[str, list[int]] = field(default_factory=dict)  # by path; the experts that `layers` are of

    def __post_init__(self) -> None:
        self.modules = {path: m for path, m in self.model.named_modules() if is_experts(m)}
        layers = {path: read_layer(module) for path, module in self.modules.items()}
        self.layers = {path: {r: t.clone() for r, t in layer.items()} for path, layer in layers.items()}
        self.moments = {}
        collect(self.model, self.batches, self.moments.__setitem__)
        self.nats = self._sensitivities()

    def of(self, kept: dict[str, list[int]]) -> "Source":
        """With these experts alone."""
        found = copy(self)
        found.kept, found.candidates = kept, {}
        found.layers = {
            path: {role: stack[kept[path]] for role, stack in layer.items()}
            for path, layer in self.layers.items()
        }
        found.moments = {path: moments.of(kept[path]) for path, moments in self.moments.items()}
        return found

    def metric(self, path: str, role: str):
        return self.moments[path].metric("inner" if role == "down" else "inputs")

    def matrices(self) -> Iterator[tuple[str, str, Tensor]]:
        for path, layer in self.layers.items():
            for role, stack in layer.items():
                yield path, role, stack

    def _sensitivities(self) -> dict[str, dict[str, Tensor]]:
        """Of the fitted batches, as a conversion takes them."""
        ffns = []
        for path, module in self.modules.items():
            roles = sources_of(module, path)
            matrices = [SimpleNamespace(role=role) for role in roles]
            ffns.append(SimpleNamespace(ffn=SimpleNamespace(path=path, projections=roles), matrices=matrices))
        plan = SimpleNamespace(ffns=ffns, family=None)
        run = SimpleNamespace(plan=plan, fitted_to=split(self.batches)[0], is_causal=True, ranks=ALONE)
        return expert_sensitivities(run, self.model, self.modules, lambda *_: None)

    def choices(self, kept: float, uneven: bool) -> dict[tuple[str, str], StackChoices]:
        """What every matrix can become. `uneven`: experts may have ranks of their own."""
        if (kept, uneven) not in self.candidates:
            self.candidates[kept, uneven] = {
                (path, role): stack_choices(
                    stack, int(kept * stack.numel()), self.metric(path, role), uneven=uneven
                )
                for path, role, stack in self.matrices()
            }
        return self.candidates[kept, uneven]

    @cached_property
    def calls(self) -> dict[str, list[Tensor]]:
        """By path: inputs, experts and combine weights of all tokens that matrices are fitted to."""
        seen = {path: [] for path in self.modules}
        handles = [
            module.register_forward_pre_hook(partial(_note, seen[path]), with_kwargs=True)
            for path, module in self.modules.items()
        ]
        with torch.no_grad():
            for batch in split(self.batches)[0]:
                self.model(**batch)
        for handle in handles:
            handle.remove()
        return {path: [torch.cat(parts) for parts in zip(*each, strict=True)] for path, each in seen.items()}

    @cached_property
    def squared_gradients(self) -> Layers:
        """By path and role, sums over the batches of the squared gradients of the weights."""
        found = {
            path: {role: torch.zeros_like(t) for role, t in layer.items()}
            for path, layer in self.layers.items()
        }
        for module in self.modules.values():
            module.requires_grad_(True)
        for batch in split(self.batches)[0]:
            self.model.zero_grad()
            self.model(**batch, labels=batch["input_ids"]).loss.backward()
            for path, module in self.modules.items():
                gate, up = module.gate_up_proj.grad.mT.chunk(2, dim=-1)
                for role, gradient in (("gate", gate), ("up", up), ("down", module.down_proj.grad.mT)):
                    found[path][role] += gradient.square()
        self.model.zero_grad()
        self.model.requires_grad_(False)
        return found


def _note(seen: list, module, args: tuple, kwargs: dict) -> None:
    seen.append([each.detach() for each in (*args, *kwargs.values())])


# A way writes the compressed matrices; it yields what there is to tell, and undoes all else at its end.
Way = Callable[[Source, float], Iterator[dict]]


def fitted(source: Source, chosen: Callable[[str, str, Tensor], StackFit], bits: int = 16) -> dict:
    """Write every matrix as its fit says, with cores rounded."""
    told = {}
    for path, module in source.modules.items():
        layer, told[path] = {}, {}
        for role, stack in source.layers[path].items():
            fit = chosen(path, role, stack)
            cores = fit.cores
            if bits < 16:
                cores = [[rounded(core, bits, GROUP) for core in term] for term in cores]
            layer[role] = torch.stack([expand(cores, e) for e in range(len(stack))])
            told[path][role] = {"form": fit.form, "ranks": fit.ranks, "error": fit.error}
        write_layer(module, layer, source.kept.get(path, slice(None)))
    return told


def one_form(form: str) -> Way:
    """Every matrix in this form, with the same share of each."""

    def compress(source: Source, share: float) -> Iterator[dict]:
        def fit(path: str, role: str, stack: Tensor) -> StackFit:
            numbers, metric = int(share * stack.numel()), source.metric(path, role)
            spectra = side_spectra(Stack(stack, metric)) if form == "both" else None
            return fit_stack(stack, form, ranks_within(form, *stack.shape, numbers, spectra), metric)

        yield fitted(source, fit)

    return compress


def ours(allocation: str, bits: int = 16, uneven: bool = True, down: float = 1.0) -> Way:
    """The forms and ranks of every matrix as a conversion chooses them, `down` times its expected loss."""

    def compress(source: Source, share: float) -> Iterator[dict]:
        candidates = []
        for (path, role), found in source.choices(share, uneven and bits == 16).items():
            unit = float(source.nats[path][role]) if allocation == "loss" else 1 / found.energy
            unit *= down if role == "down" else 1
            whole = source.layers[path][role].numel()
            candidates.append(StackCandidate(f"{path} {role}", whole, found.choices, unit))
        chosen = (uniform if allocation == "uniform" else shared_out)(candidates, share)

        def fit(path: str, role: str, stack: Tensor) -> StackFit:
            choice = chosen[f"{path} {role}"]
            return fit_stack(stack, choice.form, choice.ranks, source.metric(path, role))

        told = fitted(source, fit, bits)
        for path, role, stack in source.matrices():
            told[path][role]["kept"] = round(chosen[f"{path} {role}"].numbers / stack.numel(), 3)
        yield told

    return compress


def d2(source: Source, share: float) -> Iterator[dict]:
    """D2-MoE: a Fisher-weighted base and whitened differences."""
    fisher = source.squared_gradients
    for path, module in source.modules.items():
        layer = {}
        for role, stack in source.layers[path].items():
            (rank,) = ranks_within("base", *stack.shape, int(share * stack.numel())) or (0,)
            metric = list(source.metric(path, role))
            layer[role] = base_and_differences(stack, fisher[path][role], metric, rank)[1]
        write_layer(module, layer)
    yield {}


def fewer_neurons(source: Source, share: float) -> Iterator[dict]:
    """Neurons dropped by ridge leverage over the experts of a layer, `down` refitted."""
    told = {}
    for path, module in source.modules.items():
        layer, metric = source.layers[path], source.metric(path, "down")
        scores = [leverage(moment / moment.diagonal().mean()) for moment in metric]
        told[path] = widths_by_score(scores, int(share * sum(map(len, scores))))
        found = {role: torch.zeros_like(stack) for role, stack in layer.items()}
        for expert, (part, width) in enumerate(zip(scores, told[path], strict=True)):
            kept = kept_neurons(part, width)
            for role in ("gate", "up"):
                found[role][expert][:, kept] = layer[role][expert][:, kept]
            found["down"][expert][kept] = refitted_down(layer["down"][expert], metric[expert], kept)
        write_layer(module, found)
    yield {"widths": told}


def reap(source: Source, share: float) -> Iterator[dict]:
    """The experts that matter least are never chosen."""
    handles, told = [], {}
    for path, module in source.modules.items():
        count = len(module.down_proj)
        kept = kept_experts(source.moments[path].scores, int(share * count))
        told[path] = [expert for expert in range(count) if expert not in kept]
        router = source.model.get_submodule(path.rpartition(".")[0]).gate
        handles.append(router.register_forward_hook(without(told[path], router.top_k)))
    yield {"dropped": told}
    for handle in handles:
        handle.remove()


def fewer_and_smaller(way: str) -> Way:
    """An eighth of the experts left out, and the others as small as the share asks for."""

    def compress(source: Source, share: float) -> Iterator[dict]:
        whole = 7 / 8
        for told in reap(source, whole):
            kept = {
                path: [e for e in range(len(module.down_proj)) if e not in told["dropped"][path]]
                for path, module in source.modules.items()
            }
            yield from WAYS[way](source.of(kept), share / whole)

    return compress


def hc_smoe(source: Source, share: float) -> Iterator[dict]:
    """Experts with like outputs become one."""
    told = {}
    for path, calls in source.calls.items():
        module, layer = source.modules[path], source.layers[path]
        count = int(share * len(module.down_proj))
        with torch.no_grad():
            told[path] = clusters(mean_outputs(module, calls[0]), count)
        tokens = source.moments[path].tokens
        write_layer(module, {role: merged(stack, told[path], tokens) for role, stack in layer.items()})
    yield {"groups": told}


def trained(start: Callable, rate: float, slower: float, decay: float) -> Way:
    """Mixtures of bases, trained on weights; bases on the longer side, as both papers have them."""

    def compress(source: Source, share: float) -> Iterator[dict]:
        told = {}
        for path, module in source.modules.items():
            layer, told[path] = {}, {}
            for role, stack in source.layers[path].items():
                rows, cols = stack.shape[1:]  # inputs are the longer side of square gates
                turned = stack.mT if rows > cols or (rows == cols and role != "down") else stack
                begun = start(turned, int(share * stack.numel()))
                made, told[path][role] = trained_bases(turned, begun, TRAINING_STEPS, rate, slower, decay)
                layer[role] = made if turned is stack else made.mT
            write_layer(module, layer)
        yield told

    return compress


def rounding(bits: int) -> Way:
    """The source rounded alone; the groups lie along the inputs."""

    def compress(source: Source, share: float) -> Iterator[dict]:
        for path, module in source.modules.items():
            layer = source.layers[path]
            write_layer(module, {role: rounded(t.mT, bits, GROUP).mT for role, t in layer.items()})
        yield {}

    return compress


WAYS: dict[str, Way] = {"auto": ours("loss")}
WAYS |= {name: ours(name, uneven=False) for name in ("energy", "uniform")}
WAYS |= {form: one_form(form) for form in FORMS if form != "whole"}
WAYS |= {"d2": d2, "neurons": fewer_neurons, "reap": reap, "hc-smoe": hc_smoe}
WAYS["one rank"] = ours("loss", uneven=False)
WAYS |= {f"reap, {way}": fewer_and_smaller(way) for way in ("auto", "one rank")}
ONLY_NAMED = {
    "half down": ours("loss", down=0.5),
    "mobe": trained(mobe_start, rate=0.07, slower=1.0, decay=0.0),
    "slbf": trained(slbf_start, rate=0.1, slower=0.3, decay=0.02),
}
WAYS |= ONLY_NAMED


def bytes_of(bits: int) -> float:
    """Share of 16-bit numbers that rounding in groups with a 16-bit scale takes."""
    return (bits + 16 / GROUP) / 16


def at_equal_bytes() -> Iterator[tuple[str, float, float, Way]]:
    """(name, share of the bytes, share of the numbers, way)"""
    for bits in BITS:
        share = bytes_of(bits)
        yield f"rounded {bits}", share, 1.0, rounding(bits)
        yield "one rank", share, share, WAYS["one rank"]
        for fewer in (8, 4):
            if bits < fewer:
                yield f"one rank, {fewer} bits", share, share / bytes_of(fewer), ours("loss", fewer)


def jobs(arguments: argparse.Namespace) -> Iterator[tuple[str, float, Way]]:
    """(key in the results, share of the numbers, way)"""
    for kept in arguments.shares:
        for way in arguments.ways or [way for way in WAYS if way not in ONLY_NAMED]:
            yield f"{way} {kept:g}", kept, WAYS[way]
    if not arguments.ways:
        for name, share, kept, way in at_equal_bytes():
            yield f"{name}, {share:.3f} of the bytes", kept, way


def opened(
    folder: Path, domains: Texts, stretch: int
) -> tuple[torch.nn.Module, dict[str, Tensor], list[dict]]:
    """The model, windows of every domain to evaluate on, and batches of all to calibrate with."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
    model.eval()
    keep_no_cache(model)
    evaluation = {name: windows(tokenizer, pair[1], WINDOWS) for name, pair in domains.items()}
    share = CALIBRATION_WINDOWS // len(domains)
    calibration = torch.cat([windows(tokenizer, pair[0], share, stretch) for pair in domains.values()])
    order = torch.randperm(len(calibration), generator=torch.Generator().manual_seed(0))
    return model, evaluation, [{"input_ids": part} for part in calibration[order].split(10)]


def measure(arguments: argparse.Namespace) -> dict:
    folder, domains = upcycled(arguments.upcycled) if arguments.upcycled else trained_from_scratch()
    model, evaluation, batches = opened(folder, domains, arguments.calibration)
    prompts = torch.cat(
        [ids[:: len(ids) // PROMPTS][:PROMPTS, :PROMPT_LENGTH] for ids in evaluation.values()]
    )
    results = json.loads(arguments.json.read_text()) if arguments.json.is_file() else {}
    results.setdefault("source", losses(model, evaluation))
    results.setdefault("source loops", loop_rate(model, prompts))
    start = time.perf_counter()
    source = Source(model, batches)
    results.setdefault("calibration_seconds", time.perf_counter() - start)
    for key, kept, way in jobs(arguments):
        if key in results:
            continue
        for path, module in source.modules.items():
            write_layer(module, source.layers[path])
        start = time.perf_counter()
        for told in way(source, kept):
            seconds = time.perf_counter() - start
            after = losses(model, evaluation)
            growth = {name: after[name] - results["source"][name] for name in after}
            found = {"growth": growth, "loops": loop_rate(model, prompts), "seconds": seconds}
            results[key] = found | {"matrices": told}
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
        print(
            key, f"{mean_growth(results[key]):.4f}", f"{found['loops']:.0%}", f"{seconds:.1f} s", flush=True
        )
    return results


def mean_growth(result: dict) -> float:
    return statistics.mean(result["growth"].values())


def print_tables(results: dict, shares: list[float]) -> None:
    for title, cell in (
        ("Growth of held-out loss, nats per token", lambda found: f"{mean_growth(found):.4f}"),
        (
            f"Greedy text that loops; the source's: {results['source loops']:.0%}",
            lambda f: f"{f['loops']:.0%}",
        ),
    ):
        table = Table("way", *[f"{share:.0%}" for share in shares], title=title)
        for way in WAYS:
            cells = [results.get(f"{way} {share:g}") for share in shares]
            if any(cells):
                table.add_row(way, *[cell(found) if found else "" for found in cells])
        Console().print(table)
    table = Table("share of the bytes", "way", "growth", "loops", title="At equal bytes")
    for name, share, _, _ in at_equal_bytes():
        if found := results.get(f"{name}, {share:.3f} of the bytes"):
            table.add_row(f"{share:.1%}", name, f"{mean_growth(found):.4f}", f"{found['loops']:.0%}")
    Console().print(table)


def plot(results: dict, shares: list[float], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 5), layout="constrained")
    colors = dict(zip(WAYS, pyplot.get_cmap("tab20").colors, strict=False))
    for way in WAYS:
        points = [(share, results.get(f"{way} {share:g}")) for share in shares]
        points = [(share, mean_growth(found)) for share, found in points if found]
        if not points:
            continue
        xs, ys = zip(*points, strict=True)
        style = (
            {"linewidth": 2.5, "color": "black"} if way == "auto" else {"linewidth": 1, "color": colors[way]}
        )
        axes.plot(xs, ys, marker="o", markersize=3, label=way, **style)
    for bits in BITS:
        found = results.get(f"rounded {bits}, {bytes_of(bits):.3f} of the bytes")
        if found and mean_growth(found) > 0:
            axes.plot(bytes_of(bits), mean_growth(found), marker="x", color="black", linestyle="")
            axes.annotate(
                f"{bits} bits",
                (bytes_of(bits), mean_growth(found)),
                xytext=(5, -12),  # below: lines fall from left to right
                textcoords="offset points",
            )
    axes.set(yscale="log", xlabel="share of the experts' numbers (x: of their bytes)")
    axes.set_ylabel("growth of held-out loss, nats per token")
    figure.legend(loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--upcycled", type=Path)
    parser.add_argument("--ways", nargs="*", choices=WAYS)
    parser.add_argument("--shares", nargs="*", type=float, default=list(SHARES))
    parser.add_argument("--calibration", type=int, default=0, help="which stretch of the text")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    results = measure(arguments)
    print_tables(results, arguments.shares)
    if not arguments.ways:
        plot(results, arguments.shares, arguments.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
