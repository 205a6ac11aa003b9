"""Time one mixture of MPO experts against what it replaces, side by side.

    python examples/benchmarks/runtime.py [--shape gpt2|llama] [--tokens 1,32,2048,8192] [--train]
                                          [--json FILE]
    python examples/benchmarks/runtime.py --split 32 [--tokens 1,2048]
    python examples/benchmarks/runtime.py --sources [--tokens 1,2048] [--keep 0.6]
    python examples/benchmarks/runtime.py --varying [--shape gpt2|llama] [--tokens 1,2048] [--train]
    python examples/benchmarks/runtime.py --schedules [--shape gpt2|llama] [--tokens 1,8,32,128,512,2048]

Contenders, alternating in one process, compared by the ratio of medians; 8 experts, top-2:

    apply, rebuild, cached, auto    this project's schedules, layout blocks, bond 64
    one-sided                       that layout, bond 64, by the schedule that `auto` chooses
    dense                           the base model's FFN (one expert's work: the floor)
    eager, batched_mm, grouped_mm   a plain mixture of dense experts by transformers' own experts code,
                                    holding the same experts as matrices, behind the same router
    paper                           MPOE's scheme: every expert's matrices rebuilt from five cores each time

Shapes: gpt2 is 768 x 3072 with GELU, llama 2048 x 8192 gated with SiLU. The script fails if the outputs
of contenders that hold the same experts differ.

--split: a dense FFN of 2048 x 8192 with ReLU against its neurons, divided among so many experts, of which a
token takes a fifth.

--sources: the experts of a mixture as source, 32 of 1024 x 512 with SiLU, 4 per token, in every form that
stores `--keep` of their numbers, against transformers' own module that holds the same experts whole.

--varying: rules top-p and top-any against top-k, by the same experts at the same mean number per token.

--schedules: every way to run the same experts, against the one that the runtime chooses by what it assumes of
the machine: blocks, one-sided chains, low-rank and core-space experts of both shapes (bond 64), and forms of
`--sources`. The ways are the schedules, and `apply` with copied cores, sorted rows, or expert by expert.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from mpoe_convert.decomposition.sites import choose
from mpoe_convert.decomposition.stacks import FORMS, ranks_within, stack_terms
from mpoe_convert.runtime import modeling_mpoe
from mpoe_convert.runtime.modeling_mpoe import (
    Choices,
    Experts,
    FeedForward,
    MatrixCache,
    Router,
    contract_chain,
)

EXPERTS, TOP_K, BOND = 8, 2, 64
SHAPES = {"gpt2": (768, 3072, "gelu"), "llama": (2048, 8192, "silu")}
SOURCE = (32, 1024, 512, 4)  # experts, hidden, inner, chosen per token
THIN = ("low-rank", "core-space")  # kinds that add thin products to the dense matrix
PLAIN = ("eager", "batched_mm", "grouped_mm")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}


def projection(rows: int, cols: int, layout: str, sites: int, bond: int) -> dict:
    if layout in THIN:
        whole = {"in_dims": [rows], "out_dims": [cols], "bonds": [], "shared": [True]}
        form = {"low-rank": "none", "core-space": "both"}[layout]
        ranks = (bond,) if form == "none" else (bond, bond)
        return {"terms": [whole, *stack_terms(form, ranks, rows, cols)], "bias": None}
    found = choose(rows, cols, layout=layout, num_sites=sites, bond_dim=bond)
    term = {
        "in_dims": list(found.in_dims),
        "out_dims": list(found.out_dims),
        "bonds": list(found.bonds),
        "shared": [k == found.centre for k in range(found.num_sites)],
        "untied": list(found.untied) or None,
    }
    return {"terms": [term], "bias": None}


def make_ffn(shape: str, layout: str = "blocks", sites: int = 3, bond: int = BOND) -> FeedForward:
    """Random experts that differ, of the scale of trained ones."""
    hidden, inner, activation = SHAPES[shape]
    form = {
        "up": projection(hidden, inner, layout, sites, bond),
        "down": projection(inner, hidden, layout, sites, bond),
    }
    if activation == "silu":
        form["gate"] = form["up"]
    ffn = FeedForward(form, EXPERTS, TOP_K)
    ffn.act = nn.SiLU() if activation == "silu" else nn.GELU()
    ffn.router.reset_parameters(1.0)
    for role in form:
        getattr(ffn, role).reset_parameters(0.02)
    return ffn


def matrices(ffn: FeedForward, role: str) -> torch.Tensor:
    """(E, in, out)."""
    (chain,) = getattr(ffn, role).terms
    cores = [getattr(chain, name) for name in chain.core_names]
    with torch.no_grad():
        return torch.stack([chain.matrix(cores, expert) for expert in range(EXPERTS)])


class PlainMoE(nn.Module):
    """The same experts as matrices, run by transformers."""

    def __init__(self, ffn: FeedForward, implementation: str):
        super().__init__()
        self.router = ffn.router
        up, down = matrices(ffn, "up").mT, matrices(ffn, "down").mT
        _, inner, hidden = up.shape
        config = SimpleNamespace(
            num_local_experts=EXPERTS,
            n_routed_experts=EXPERTS,
            hidden_size=hidden,
            intermediate_size=inner,
            moe_intermediate_size=inner,
            moe_latent_size=None,
            hidden_act="silu",
            mlp_hidden_act="gelu",
            _experts_implementation=implementation,
        )
        if ffn.gate is not None:
            self.experts = MixtralExperts(config)
            self.experts.gate_up_proj.data = torch.cat([matrices(ffn, "gate").mT, up], dim=1).contiguous()
        else:
            self.experts = NemotronHExperts(config)
            self.experts.up_proj.data = up.contiguous()
        self.experts.down_proj.data = down.contiguous()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        choices = self.router(x).choices
        experts, weights = (each.unflatten(0, (-1, TOP_K)) for each in (choices.experts, choices.weights))
        return self.experts(x, experts, weights.to(x.dtype))


class Dense(nn.Module):
    """The base FFN, one expert's worth of work."""

    def __init__(self, ffn: FeedForward):
        super().__init__()
        self.act = ffn.act
        for role in ("gate", "up", "down"):
            if getattr(ffn, role) is not None:
                setattr(self, role, nn.Parameter(matrices(ffn, role)[0].clone()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = x @ self.up
        inner = self.act(x @ self.gate) * inner if hasattr(self, "gate") else self.act(inner)
        return inner @ self.down


class Paper(nn.Module):
    """MPOE as published: every expert's matrices from all its cores in every pass, then dense experts."""

    def __init__(self, ffn: FeedForward):
        super().__init__()
        self.ffn = ffn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        built = {}
        for role in ("gate", "up", "down"):
            if getattr(self.ffn, role) is not None:
                (chain,) = getattr(self.ffn, role).terms
                cores = [getattr(chain, name) for name in chain.core_names]
                built[role] = [contract(chain, cores, expert) for expert in range(EXPERTS)]
        choices = self.ffn.router(x).choices
        output = torch.zeros_like(x)
        for expert in range(EXPERTS):
            (own,) = torch.where(choices.experts == expert)
            tokens = choices.tokens[own]
            rows = x[tokens]
            inner = rows @ built["up"][expert]
            gate = self.ffn.act(rows @ built["gate"][expert]) * inner if "gate" in built else None
            inner = self.ffn.act(inner) if gate is None else gate
            rows = inner @ built["down"][expert]
            output.index_add_(0, tokens, rows * choices.weights[own, None].to(rows.dtype))
        return output


def contract(chain, cores, expert: int) -> torch.Tensor:
    own = [core if shared else core[expert] for core, shared in zip(cores, chain.shared, strict=True)]
    shaped = [core.reshape(shape) for core, shape in zip(own, chain.shapes, strict=True)]
    return contract_chain(shaped, chain.copies)


class Scheduled(nn.Module):
    def __init__(self, ffn: FeedForward, schedule: str, cache: MatrixCache):
        super().__init__()
        self.ffn, self.schedule, self.cache = ffn, schedule, cache

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.ffn.schedule = self.schedule
        self.ffn.cache = self.cache if self.schedule == "cached" else None
        return self.ffn(x)


def contenders(shape: str, dtype, device, train: bool, with_paper: bool) -> tuple[dict, dict]:
    """Name -> module, and name -> the group whose outputs must agree."""
    ffn = make_ffn(shape).to(dtype=dtype, device=device)
    cache = MatrixCache("all")
    schedules = ("apply", "rebuild", "auto") if train else ("apply", "rebuild", "cached", "auto")
    found = {name: Scheduled(ffn, name, cache) for name in schedules}
    plain = PlainMoE(ffn, "eager")
    for name in PLAIN:
        module = PlainMoE.__new__(PlainMoE)
        nn.Module.__init__(module)
        module.router, module.experts = plain.router, SharedExperts(plain.experts, name)
        found[name] = module
    groups = dict.fromkeys(found, "ours")
    found["dense"], groups["dense"] = Dense(ffn), "dense"
    tied = make_ffn(shape, "one-sided").to(dtype=dtype, device=device)
    found["one-sided"], groups["one-sided"] = Scheduled(tied, "auto", cache), "one-sided"
    if with_paper:
        balanced = make_ffn(shape, "balanced", 5, 10**9).to(dtype=dtype, device=device)
        found["paper"], groups["paper"] = Paper(balanced), "paper"
        found["balanced"] = Scheduled(balanced, "auto", cache)
        groups["balanced"] = "paper"
    return found, groups


class SharedExperts(nn.Module):
    """One set of expert weights under several implementations."""

    def __init__(self, experts: nn.Module, implementation: str):
        super().__init__()
        self.experts, self.implementation = experts, implementation

    def forward(self, *args):
        self.experts.config._experts_implementation = self.implementation
        return self.experts(*args)


def one_pass(module: nn.Module, x: torch.Tensor, train: bool) -> torch.Tensor:
    if not train:
        with torch.no_grad():
            return module(x)
    for parameter in module.parameters():
        parameter.grad = None
    x = x.detach().requires_grad_()
    y = module(x)
    y.square().mean().backward()
    return y.detach()


def timed(module: nn.Module, x: torch.Tensor, train: bool) -> tuple[float, torch.Tensor]:
    """Seconds of a pass, and its result; of one thread the processor's, which other work hardly changes."""
    is_alone = x.device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if is_alone else time.perf_counter
    if x.is_cuda:
        torch.cuda.synchronize()
    start = clock()
    y = one_pass(module, x, train)
    if x.is_cuda:
        torch.cuda.synchronize()
    return clock() - start, y


def compare(shape: str, tokens: int, dtype, device, train: bool, budget: float, skip: list[str]) -> dict:
    """Medians in seconds; alternating rounds until the budget is used, at least three."""
    torch.manual_seed(0)
    found, groups = contenders(shape, dtype, device, train, with_paper=not train)
    if tokens * TOP_K > 512:
        del found["batched_mm"]  # copies a whole expert for every row: tens of gigabytes
    found = {name: module for name, module in found.items() if name not in skip}
    hidden = SHAPES[shape][0]
    x = torch.randn(tokens, hidden, device=device, dtype=dtype)
    before = torch.cuda.memory_allocated() if x.is_cuda else 0
    first: dict[str, torch.Tensor] = {}
    peaks: dict[str, int] = {}
    for name, module in found.items():
        if x.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        _, y = timed(module, x, train)
        if x.is_cuda:
            peaks[name] = torch.cuda.max_memory_allocated() - before
        other = first.setdefault(groups[name], y)
        error = ((y - other).float().norm() / other.float().norm()).item()
        assert error < TOLERANCE[dtype], f"{name} differs by {error:.2g}"
    seconds: dict[str, list[float]] = {name: [] for name in found}
    start, rounds = time.perf_counter(), 0
    while rounds < 3 or (time.perf_counter() - start < budget and rounds < 200):
        for name, module in found.items():
            seconds[name].append(timed(module, x, train)[0])
        rounds += 1
    median = {name: statistics.median(times) for name, times in seconds.items()}
    plain = min(median[name] for name in PLAIN if name in median)
    return {
        "shape": shape,
        "tokens": tokens,
        "train": train,
        "dtype": str(dtype).removeprefix("torch."),
        "rounds": rounds,
        "seconds": median,
        "peak_bytes": peaks,  # beside all weights and the inputs; CUDA alone tells
        # What has to be stored; gradients take as many numbers again in training, AdamW twice as many.
        "parameters": {name: sum(p.numel() for p in module.parameters()) for name, module in found.items()},
        "auto_over_fastest_plain": median["auto"] / plain,
        "one_sided_over_fastest_plain": median["one-sided"] / plain,
        "auto_over_dense": median["auto"] / median["dense"],
        "paper_over_auto": median["paper"] / median["auto"] if "paper" in median else None,
    }


def compare_split(experts: int, tokens: int, budget: float) -> dict:
    """A dense FFN with ReLU against its neurons, divided among experts of which a fifth is chosen."""
    torch.manual_seed(0)
    hidden, inner, top_k = 2048, 8192, experts // 5
    own = inner // experts
    shapes = {"up": (hidden, own), "down": (own, hidden)}
    terms = {
        role: {"in_dims": [rows], "out_dims": [cols], "bonds": [], "shared": [False]}
        for role, (rows, cols) in shapes.items()
    }
    form = {role: {"terms": [term], "bias": None} for role, term in terms.items()}
    ffn = FeedForward(form, experts, top_k, parts=experts)
    ffn.act = nn.ReLU()
    ffn.router.reset_parameters(1.0)
    layers = nn.Linear(hidden, inner, bias=False), ffn.act, nn.Linear(inner, hidden, bias=False)
    dense = nn.Sequential(*layers)
    with torch.no_grad():
        first = dense[0].weight.T.unflatten(1, (experts, own)).transpose(0, 1)  # (E, hidden, own)
        ffn.up.terms[0].aux_0.copy_(first)
        ffn.down.terms[0].aux_0.copy_(dense[2].weight.T.unflatten(0, (experts, own)))
        x = torch.randn(tokens, hidden)
        ffn.router.top_k = experts
        error = ((ffn(x) - dense(x)).norm() / dense(x).norm()).item()
    assert error < TOLERANCE[torch.float32], f"all parts differ from the dense FFN by {error:.2g}"
    ffn.router.top_k = top_k
    median, rounds = medians({"dense": dense, "split": ffn}, x, False, budget)
    return {
        "experts": experts,
        "chosen": top_k,
        "tokens": tokens,
        "rounds": rounds,
        "seconds": median,
        "dense_over_split": median["dense"] / median["split"],
    }


def source_experts(form: str, keep: float) -> Experts:
    """Random experts of a mixture as source, whose projections have this form."""
    experts, hidden, inner, top_k = SOURCE
    spec = {}
    for role, size in {"gate": (hidden, inner), "up": (hidden, inner), "down": (inner, hidden)}.items():
        ranks = ranks_within(form, experts, *size, int(keep * experts * hidden * inner))
        assert ranks is not None, f"{form} stores more than {keep} of the numbers"
        spec[role] = {"terms": stack_terms(form, ranks, *size), "bias": None}
    made = Experts(spec, experts, top_k)
    made.act = nn.SiLU()
    for role in spec:
        getattr(made, role).reset_parameters(0.02)
    return made.eval()


def stock_experts(ours: Experts) -> MixtralExperts:
    """The same experts as transformers has them."""
    experts, hidden, inner, _ = SOURCE
    config = SimpleNamespace(
        num_local_experts=experts,
        hidden_size=hidden,
        intermediate_size=inner,
        hidden_act="silu",
        _experts_implementation="eager",
    )
    stock = MixtralExperts(config)
    with torch.no_grad():
        whole = {
            role: torch.stack(
                [
                    sum(chain.matrix(chain_cores(chain), e) for chain in getattr(ours, role).terms).mT
                    for e in range(experts)
                ]
            )
            for role in ("gate", "up", "down")
        }
        stock.gate_up_proj.copy_(torch.cat([whole["gate"], whole["up"]], dim=1))
        stock.down_proj.copy_(whole["down"])
    return stock.eval()


def chain_cores(chain: nn.Module) -> list[torch.Tensor]:
    return [getattr(chain, name) for name in chain.core_names]


class Chosen(nn.Module):
    """Experts with choices that are made."""

    def __init__(self, experts: nn.Module, chosen: torch.Tensor, weights: torch.Tensor):
        super().__init__()
        self.experts, self.chosen, self.weights = experts, chosen, weights

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts(x, self.chosen, self.weights)


def compare_sources(tokens: int, keep: float, budget: float) -> list[dict]:
    """Every form that stores so much, whole where 1 is kept, against the stock module's implementations."""
    experts, hidden, inner, top_k = SOURCE
    results = []
    for form in FORMS if keep == 1 else [form for form in FORMS if form != "whole"]:
        torch.manual_seed(0)
        x = torch.randn(tokens, hidden)
        chosen = torch.rand(tokens, experts).topk(top_k).indices
        weights = torch.rand(tokens, top_k).softmax(-1)
        ours = source_experts(form, keep)
        stock = stock_experts(ours)
        contenders: dict[str, nn.Module] = {"ours": ours}
        contenders |= {name: SharedExperts(stock, name) for name in ("eager", "grouped_mm")}
        found = {name: Chosen(module, chosen, weights) for name, module in contenders.items()}
        first = one_pass(found["ours"], x, False)
        for name, module in found.items():
            error = ((one_pass(module, x, False) - first).norm() / first.norm()).item()
            assert error < TOLERANCE[torch.float32], f"{name} differs by {error:.2g}"
        median, rounds = medians(found, x, False, budget)
        results.append(
            {
                "form": form,
                "tokens": tokens,
                "rounds": rounds,
                "stored": sum(p.numel() for p in ours.parameters())
                / sum(p.numel() for p in stock.parameters()),
                "seconds": median,
                "ours_over": {name: median["ours"] / median[name] for name in ("eager", "grouped_mm")},
            }
        )
        print(json.dumps(results[-1]), flush=True)
    return results


def medians(
    modules: dict[str, nn.Module], x: torch.Tensor, train: bool, budget: float
) -> tuple[dict[str, float], int]:
    """Median seconds of modules that take turns, and of how many rounds; one more round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in modules}
    start, rounds = time.perf_counter(), 0
    while rounds < 6 or (time.perf_counter() - start < budget and rounds < 400):
        for name, module in modules.items():
            elapsed = timed(module, x, train)[0]
            if rounds:
                seconds[name].append(elapsed)
        rounds += 1
    return {name: statistics.median(times) for name, times in seconds.items()}, rounds - 1


# Ways to run experts: the schedule, and what of `modeling_mpoe` makes `apply` take that way.
NEVER, ALWAYS = 0, 1 << 60
WAYS: dict[str, tuple[str, dict[str, int]]] = {
    "copied": ("apply", {"_FEW_COPIED_BY_CPU": ALWAYS}),
    "sorted": ("apply", {"_FEW_COPIED_BY_CPU": NEVER, "_MANY_ROWS": ALWAYS}),
    "by expert": ("apply", {"_FEW_COPIED_BY_CPU": NEVER, "_MANY_ROWS": 0}),
    "rebuild": ("rebuild", {}),
}
MOST_COPIED = 1 << 27  # numbers of cores that are copied: half a gigabyte


class Way(nn.Module):
    """Experts with choices that are made, run in one way; None: as the runtime chooses."""

    def __init__(self, experts: Experts | FeedForward, choices: Choices, way: str | None):
        super().__init__()
        self.experts, self.choices = experts, choices
        self.schedule, self.constants = WAYS[way] if way else ("auto", {})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.experts.schedule = self.schedule
        with mock.patch.multiple(modeling_mpoe, **self.constants) if self.constants else nullcontext():
            return self.experts._mix(x, self.choices)

    def way(self, x: torch.Tensor) -> str:
        """The one that it takes."""
        with mock.patch.object(self.experts, "_experts", wraps=self.experts._experts) as called:
            self(x)
        (_, picks, *others), by_name = called.call_args
        if "rebuild" in (*others, by_name.get("schedule")):
            return "rebuild"
        if isinstance(picks.experts, int):
            return "by expert"
        return "copied" if picks.sizes is None else "sorted"


def scheduled_experts(shapes: list[str], keep: float) -> Iterator[tuple[str, Experts | FeedForward]]:
    """What `--schedules` times, one after the other; the shape "sources": experts of a mixture."""
    for shape in shapes:
        if shape == "sources":
            yield from ((f"source, {form}", source_experts(form, keep)) for form in FORMS if form != "whole")
        else:
            layouts = ("blocks", "one-sided", *THIN)
            yield from ((f"{shape}, {layout}", make_ffn(shape, layout)) for layout in layouts)


def compare_schedules(name: str, experts: Experts | FeedForward, tokens: int, budget: float) -> dict:
    """The ways to run experts without gradients; none that copies more than half a gigabyte."""
    torch.manual_seed(0)
    hidden, count = experts.up._chains[0].in_features, experts.num_experts
    x, chosen = torch.randn(tokens, hidden), torch.rand(tokens, count).topk(experts.top_k)
    places = torch.arange(tokens).repeat_interleave(experts.top_k)
    weights = chosen.values.softmax(-1).flatten()
    choices = Choices(places, chosen.indices.flatten(), weights, experts.top_k)
    found: dict[str, nn.Module] = {way: Way(experts, choices, way) for way in WAYS}
    if tokens * experts.top_k * experts.own_params > MOST_COPIED:
        del found["copied"]
    with torch.no_grad():
        picked = Way(experts, choices, None).way(x)
        first = found[picked](x)
        for way, module in found.items():
            assert module.way(x) in (way, picked), f"{way} of {name} did not run"
            error = ((module(x) - first).norm() / first.norm()).item()
            assert error < TOLERANCE[torch.float32], f"{way} differs by {error:.2g}"
    median, rounds = medians(found, x, False, budget)
    best = min(median, key=median.__getitem__)
    return {
        "experts": name,
        "tokens": tokens,
        "rounds": rounds,
        "seconds": median,
        "picked": picked,
        "best": best,
        "picked_over_best": median[picked] / median[best],
    }


class Routed(nn.Module):
    """A mixture under a router of its own."""

    def __init__(self, ffn: FeedForward, rule: str):
        super().__init__()
        self.ffn = ffn
        hidden = ffn.router.weight.shape[1]
        self.router = Router(hidden, EXPERTS, TOP_K if rule == "top-k" else EXPERTS, rule)
        self.router.reset_parameters(hidden**-0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.ffn.router = self.router
        return self.ffn(x)

    def tune(self, x: torch.Tensor) -> float:
        """Set the threshold so that tokens get `TOP_K` choices in the mean, hardly more; return the mean."""
        low, high = -1.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if self.mean_at(middle, x) < TOP_K else (low, middle)
        return self.mean_at(high, x)

    def mean_at(self, threshold: float, x: torch.Tensor) -> float:
        """The mean number of choices at this threshold, which is set."""
        self.router.threshold = threshold
        if self.router.threshold_bias is not None:
            self.router.threshold_bias.data.fill_(-threshold)
        return len(self.router(x).choices.experts) / len(x)


def compare_varying(shape: str, tokens: int, train: bool, budget: float) -> dict:
    """Rules whose number of experts varies against top-k, at the same mean."""
    torch.manual_seed(0)
    ffn = make_ffn(shape)
    x = torch.randn(tokens, SHAPES[shape][0])
    found = {rule: Routed(ffn, rule).train(train) for rule in ("top-k", "top-p", "top-any")}
    means = {rule: module.tune(x) for rule, module in found.items()}
    median, rounds = medians(found, x, train, budget)
    return {
        "shape": shape,
        "tokens": tokens,
        "train": train,
        "rounds": rounds,
        "experts_per_token": means,
        "seconds": median,
        "over_top_k": {rule: median[rule] / median["top-k"] for rule in found},
    }


def table_of(results: list[dict]) -> Table:
    names = list(dict.fromkeys(name for result in results for name in result["seconds"]))
    ratios = ("auto/plain", "one-sided/plain", "paper/auto")
    table = Table("case", *names, *ratios, title="milliseconds, medians")
    for result in results:
        case = f"{result['shape']} {result['tokens']} {'train' if result['train'] else ''}"
        times = [result["seconds"].get(name) for name in names]
        paper = result["paper_over_auto"]
        table.add_row(
            case.strip(),
            *("" if t is None else f"{1e3 * t:.3g}" for t in times),
            f"{result['auto_over_fastest_plain']:.2f}",
            f"{result['one_sided_over_fastest_plain']:.2f}",
            "" if paper is None else f"{paper:.1f}",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=(*SHAPES, "sources"), action="append", help="default: all")
    parser.add_argument("--tokens", default="1,32,2048,8192")
    parser.add_argument("--train", action="store_true", help="time forward and backward")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget", type=float, default=10, help="seconds per case after three rounds")
    parser.add_argument("--skip", default="", help="contenders to leave out, such as eager,rebuild")
    parser.add_argument("--split", type=int, help="experts of kind split, against the dense FFN")
    parser.add_argument(
        "--sources", action="store_true", help="experts of a mixture, against the stock module"
    )
    parser.add_argument("--keep", type=float, default=0.6, help="with --sources: the share that is stored")
    parser.add_argument("--varying", action="store_true", help="rules whose number of experts varies")
    parser.add_argument(
        "--schedules", action="store_true", help="every way to run experts, and the chosen one"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.split:
        for tokens in map(int, options.tokens.split(",")):
            print(json.dumps(compare_split(options.split, tokens, options.budget)))
        return
    if options.sources:
        for tokens in map(int, options.tokens.split(",")):
            compare_sources(tokens, options.keep, options.budget)
        return
    if options.varying:
        for shape in options.shape or SHAPES:
            for tokens in map(int, options.tokens.split(",")):
                print(json.dumps(compare_varying(shape, tokens, options.train, options.budget)), flush=True)
        return
    if options.schedules:
        for name, experts in scheduled_experts(options.shape or [*SHAPES, "sources"], options.keep):
            for tokens in map(int, options.tokens.split(",")):
                print(json.dumps(compare_schedules(name, experts, tokens, options.budget)), flush=True)
        return
    results = []
    for shape in options.shape or SHAPES:
        for tokens in map(int, options.tokens.split(",")):
            dtype = getattr(torch, options.dtype)
            skip = options.skip.split(",")
            result = compare(shape, tokens, dtype, options.device, options.train, options.budget, skip)
            results.append(result)
            print(json.dumps(result), flush=True)
    console = Console(width=150)
    console.print(table_of(results))
    for result in {result["shape"]: result for result in results}.values():
        parameters = {name: f"{number:,}" for name, number in result["parameters"].items()}
        console.print(f"{result['shape']} parameters: {parameters}")
    if options.json:
        threads = torch.get_num_threads()
        document = {"torch": torch.__version__, "threads": threads, "device": options.device}
        options.json.write_text(json.dumps(document | {"results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
