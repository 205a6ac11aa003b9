"""Check conversion and runtime on this machine's GPU, and time the runtime there. Under eight minutes.

    python tests/gpu/check.py [--device cuda] [--small] [--out FILE.json]

* Conversions on the device: their artifacts compute what those of the CPU compute, to rounding.
* The runtime's schedules agree with one another and with the same weights in float32, in float32, bfloat16,
  float16 and under autocast, as they are and compiled (on CUDA with mode "reduce-overhead": CUDA graphs).
* torch's `grouped_mm` is taken on CUDA.
* Prefill of 2,048 tokens, decoding of one, and a training step: against the dense base and a plain mixture by
  transformers, at the two shapes of examples/benchmarks/runtime.py, which measures them; peak memory on CUDA.

Prints a table in Markdown, and writes everything with --out. The exit status is 1 if a check fails; the rest
is run anyway. --small: tiny shapes, and compiled without generating code, to try the script without a GPU.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TESTS = Path(__file__).parents[1]
SMALL = {"gpt2": (32, 64, "gelu"), "llama": (64, 128, "silu")}
PREFILL, FEW = 2048, 32
# Relative: of float32 a rounding error of long sums (or TF32's, which is off by default); of 16 bits theirs.
TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-2, "float16": 5e-3}
CONVERTED = 1e-4
SCHEDULES = ("apply", "rebuild", "cached", "auto")


def load_benchmark():
    """examples/benchmarks/runtime.py as a module."""
    path = TESTS.parent / "examples/benchmarks/runtime.py"
    spec = importlib.util.spec_from_file_location("runtime_benchmark", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Check:
    """One result: `value` is at most `limit`, or there is an error."""

    name: str
    value: float | None
    limit: float | None
    seconds: float
    error: str = ""

    @property
    def is_ok(self) -> bool:
        if self.error:
            return False
        return self.value is None or self.limit is None or self.value <= self.limit

    def line(self) -> str:
        shown = self.error or ("" if self.value is None else f"{self.value:.2g} (at most {self.limit:g})")
        return f"{'ok  ' if self.is_ok else 'FAIL'} {self.name}: {shown} [{self.seconds:.1f} s]"


class Checks:
    """The checks of one run.

    Attributes:
        found: their results.
        timings: of the cases that were timed, see `compare` of the benchmark.
    """

    def __init__(self, device: torch.device, small: bool) -> None:
        self.device, self.small = device, small
        self.bench = load_benchmark()
        if small:
            self.bench.SHAPES.update(SMALL)
        self.found: list[Check] = []
        self.timings: list[dict] = []

    def check(self, name: str, limit: float | None, work: Callable[[], float | None]) -> None:
        """Run one check, whatever it raises, and print what it gives."""
        start, value, error = time.perf_counter(), None, ""
        try:
            value = work()
        except Exception as caught:
            traceback.print_exc()
            error = f"{type(caught).__name__}: {' '.join(str(caught).split())[:200]}"
        self.found.append(Check(name, value, limit, time.perf_counter() - start, error))
        print(self.found[-1].line(), flush=True)

    def run(self) -> None:
        for name, recipe in CONVERSIONS.items():
            self.check(f"conversion {name}", CONVERTED, lambda recipe=recipe: converted(recipe, self.device))
        for name, recipe in () if self.small else LARGE.items():
            work = lambda recipe=recipe: converted(recipe, self.device)  # noqa: E731
            self.check(f"conversion {name}", LARGE_CONVERTED, work)
        for shape in self.bench.SHAPES:
            self.check_schedules(shape)
        self.check_compiled()
        if self.device.type == "cuda":
            self.check("grouped_mm is taken", 0, self.grouped_is_missed)
        for shape in self.bench.SHAPES:
            for tokens, train in ((PREFILL, False), (1, False), (PREFILL, True)):
                what = "training step" if train else "prefill" if tokens > 1 else "decoding"
                for dtype in (torch.float32, torch.bfloat16):
                    name = f"{what} {shape} {str(dtype).removeprefix('torch.')}"
                    work = lambda s=shape, n=tokens, d=dtype, t=train: self.timed(s, n, d, t)  # noqa: E731
                    self.check(name, None, work)

    # -- schedules

    def check_schedules(self, shape: str) -> None:
        for mode in MODES:
            for schedule in SCHEDULES:
                name = f"{schedule} {shape} {mode.name}"
                work = lambda s=schedule, m=mode: self.differs(shape, s, m)  # noqa: E731
                self.check(name, mode.limit, work)

    def check_compiled(self) -> None:
        for mode in MODES:
            for schedule in ("apply", "rebuild"):
                work = lambda s=schedule, m=mode: self.differs("gpt2", s, m, compiled=True)  # noqa: E731
                self.check(f"{schedule} gpt2 {mode.name} compiled", mode.limit, work)

    def differs(self, shape: str, schedule: str, mode: Mode, compiled: bool = False) -> float:
        """Relative difference of a schedule's outputs from those of the same weights applied in float32."""
        torch.manual_seed(0)
        bench, hidden = self.bench, self.bench.SHAPES[shape][0]
        ffn = bench.make_ffn(shape).to(device=self.device, dtype=mode.weights)
        x = torch.randn(FEW, hidden, device=self.device, dtype=mode.weights)
        reference = bench.Scheduled(copy.deepcopy(ffn).float(), "apply", bench.MatrixCache("all"))
        module: nn.Module = bench.Scheduled(ffn, schedule, bench.MatrixCache("all"))
        if compiled:
            ffn.schedule = schedule
            module = self.compiled(ffn)
        with torch.no_grad():
            expected = reference(x.float())
            with mode.autocast(self.device):
                for _ in range(3):  # CUDA graphs are recorded in the second pass
                    found = module(x).clone()
        return distance(found, expected)

    def compiled(self, ffn: nn.Module) -> nn.Module:
        torch._dynamo.reset()
        if self.small:
            return torch.compile(ffn, backend="aot_eager")
        mode = "reduce-overhead" if self.device.type == "cuda" else None
        return torch.compile(ffn, mode=mode)

    def grouped_is_missed(self) -> float:
        """How many of three dtypes do without torch's `grouped_mm`."""
        missed = 0
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            ffn = self.bench.make_ffn("gpt2").to(device=self.device, dtype=dtype)
            x = torch.randn(FEW, self.bench.SHAPES["gpt2"][0], device=self.device, dtype=dtype)
            ffn.schedule = "apply"
            with mock.patch.object(F, "grouped_mm", wraps=F.grouped_mm) as taken, torch.no_grad():
                ffn(x)
            missed += not taken.called
        return missed

    # -- times

    def timed(self, shape: str, tokens: int, dtype: torch.dtype, train: bool) -> None:
        """Compare by the benchmark, which raises AssertionError if outputs differ."""
        tokens, budget = (min(tokens, FEW), 0.0) if self.small else (tokens, 4.0)
        skip = ["paper", "balanced", "eager"]
        found = self.bench.compare(shape, tokens, dtype, self.device, train, budget, skip)
        self.timings.append(found)

    def document(self) -> dict:
        return {
            "card": card_name(self.device),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "small": self.small,
            "checks": [asdict(each) | {"ok": each.is_ok} for each in self.found],
            "timings": self.timings,
        }


@dataclass(frozen=True)
class Mode:
    """A dtype of weights and inputs, and the dtype of autocast; None: none."""

    weights: torch.dtype
    computed: torch.dtype | None = None

    @property
    def name(self) -> str:
        shown = str(self.computed or self.weights).removeprefix("torch.")
        return f"autocast {shown}" if self.computed else shown

    @property
    def limit(self) -> float:
        return TOLERANCE[str(self.computed or self.weights).removeprefix("torch.")]

    def autocast(self, device: torch.device):
        return nullcontext() if self.computed is None else torch.autocast(device.type, dtype=self.computed)


MODES = (
    Mode(torch.float32),
    Mode(torch.bfloat16),
    Mode(torch.float16),
    Mode(torch.float32, torch.bfloat16),
    Mode(torch.float32, torch.float16),
)


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


# ---------------------------------------------------------------------------------------------------
# Conversions

SMALL_FORM = {"experts": 2, "bond_dim": 4, "noise": 0.0}
BUDGET = SMALL_FORM | {"keep": 0.9}
CALIBRATED = {"calibrated": True}
CONVERSIONS = {
    "blocks": SMALL_FORM,
    "balanced, truncated": SMALL_FORM | {"layout": "balanced"},
    "low-rank": {"kind": "low-rank", "experts": 2, "bond_dim": 4},
    "budget": BUDGET,
    "budget, loss": BUDGET | CALIBRATED | {"metric": "loss"},
    "budget, corrected": BUDGET | CALIBRATED | {"metric": "outputs", "correct": True},
    "mixture": {"model": "mixtral", "keep": 0.7},
    "mixture, calibrated": CALIBRATED | {"model": "mixtral", "keep": 0.7},
}
# FFNs of 768 x 3072. Where a budget cuts, singular values are close, and rounding chooses among them.
LARGE = {
    "blocks, GPT-2": {"model": "gpt2", "experts": 8, "bond_dim": 64, "noise": 0.0},
    "budget, GPT-2": {"model": "gpt2", "experts": 8, "bond_dim": 8, "noise": 0.0, "keep": 0.6},
}
LARGE_CONVERTED = 1e-3


def converted(recipe: dict, device: torch.device) -> float:
    """Relative difference between the logits of artifacts made on the device and on the CPU."""
    from transformers import AutoModelForCausalLM

    from mpoe_convert import Recipe, convert

    options = dict(recipe)
    model, calibrated = options.pop("model", "llama"), options.pop("calibrated", False)
    ids = [ids_like(seed) for seed in range(6)]
    logits = []
    with TemporaryDirectory() as folder:
        source = save_source(model, Path(folder) / "source")
        for where in ("cpu", str(device)):
            made = Path(folder) / where.replace(":", "-")
            batches = [{"input_ids": each} for each in ids] if calibrated else None
            convert(Recipe(str(source), device=where, **options), made, overwrite=True, calibration=batches)
            loaded = AutoModelForCausalLM.from_pretrained(made, trust_remote_code=True).eval()
            with torch.no_grad():
                logits.append(loaded(torch.cat(ids)).logits)
    return distance(logits[1], logits[0])


def save_source(model: str, folder: Path) -> Path:
    """A small checkpoint, made by the helpers of the tests; or one layer of GPT-2's shapes."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sys.path.insert(0, str(TESTS))
    try:
        from helpers.stock_mixtures import make_model
        from helpers.tiny import save_tiny
    finally:
        sys.path.pop(0)
    if model == "llama":
        return save_tiny("llama", "AutoModelForCausalLM", folder)
    if model == "gpt2":
        torch.manual_seed(0)
        GPT2LMHeadModel(GPT2Config(n_layer=1, vocab_size=64, n_positions=64)).save_pretrained(folder)
        return folder
    make_model(model).save_pretrained(folder)
    return folder


def ids_like(seed: int) -> Tensor:
    return torch.randint(3, 40, (4, 24), generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------
# Output


def card_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def markdown(document: dict) -> Iterator[str]:
    """The table of the times: milliseconds, medians, and MiB."""
    yield f"{document['card']}, torch {document['torch']}: milliseconds, medians; peak memory in MiB"
    yield ""
    yield "| case | dense | plain mixture | ours (auto) | ours/plain | ours/dense | peak plain | peak ours |"
    yield "|---|---|---|---|---|---|---|---|"
    for case in document["timings"]:
        seconds, peaks = case["seconds"], case["peak_bytes"]
        what = "training step" if case["train"] else "forward"
        plain = min((name for name in ("batched_mm", "grouped_mm") if name in seconds), key=seconds.get)
        times = [f"{1e3 * seconds['dense']:.3g}", f"{1e3 * seconds[plain]:.3g} ({plain})"]
        ratios = [f"{case[key]:.2f}" for key in ("auto_over_fastest_plain", "auto_over_dense")]
        memory = [f"{peaks[name] / 2**20:.0f}" if name in peaks else "" for name in (plain, "auto")]
        name = f"{case['shape']}, {case['dtype']}, {what}, {counted_tokens(case['tokens'])}"
        cells = [name, *times, f"{1e3 * seconds['auto']:.3g}", *ratios, *memory]
        yield f"| {' | '.join(cells)} |"


def counted_tokens(tokens: int) -> str:
    return "1 token" if tokens == 1 else f"{tokens:,} tokens"


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument("--out", type=Path, help="a JSON file for all results")
    options = parser.parse_args(args)
    checks = Checks(torch.device(options.device), options.small)
    checks.run()
    document = checks.document()
    print("\n".join(["", *markdown(document)]))
    failed = [each.name for each in checks.found if not each.is_ok]
    print(f"\n{len(checks.found) - len(failed)} of {len(checks.found)} checks passed", *failed, sep="\n")
    if options.out:
        options.out.write_text(json.dumps(document, indent=2) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
