"""Compare ways of making experts: the same data, steps, learning rates and seeds for all of them.

    python examples/compare_experts.py --out results                       # everything; hours on two cores
    python examples/compare_experts.py --out results --only dense,one-sided --rates 1e-3 --seeds 1

Every run (contender, rate, seed) leaves one JSON file in OUT/runs and is not repeated: interrupt it and start
it again. The rate of a contender is chosen on one half of the held-out text, the table is made on the other.

The model and the text are those of the folder named by MPOE_TEST_DATA (gpt2-mix-2m; words with phonemes,
captions by another model), with Python's own sources and language topics beside them; without it
examples/tiny-gpt2, on the latter alone. Needs pip install "mpoe-convert[train]" matplotlib.
"""

import argparse
import hashlib
import json
import math
import os
import pydoc_data.topics
import shutil
import statistics
import sysconfig
import time
from pathlib import Path

import torch
from datasets import disable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from mpoe_convert import Finetuning, Recipe, convert, evaluate, finetune, router_stats

BASE = {"experts": 8, "top_k": 2}
# Name -> (recipe of the conversion, None: the dense model itself; options of the fine-tuning).
CONTENDERS: dict[str, tuple[dict | None, dict]] = {
    "dense": (None, {}),
    "plain MoE": ({"kind": "dense"}, {}),
    **{f"one-sided {d}": ({"bond_dim": d}, {}) for d in (16, 32, 64)},
    **{f"two-sided {d}": ({"layout": "two-sided", "bond_dim": d}, {}) for d in (64, 256, 1024)},
    "balanced, full bonds": ({"layout": "balanced", "bond_dim": 4096}, {}),
    "low-rank 8": ({"kind": "low-rank", "bond_dim": 8}, {}),
    "one-sided 64, mask 0.75": ({"bond_dim": 64}, {"skip_centre": 0.75}),
    "one-sided 64, mask 0.5": ({"bond_dim": 64}, {"skip_centre": 0.5}),
    "one-sided 64, frozen centre": ({"bond_dim": 64}, {"freeze": ("centre",)}),
    **{f"one-sided 64, {n} experts": ({"bond_dim": 64, "experts": n}, {}) for n in (2, 4, 16)},
    "one-sided 64, noise 0.05": ({"bond_dim": 64, "noise": 0.05}, {}),
    "one-sided 64, one rate": ({"bond_dim": 64}, {"auxiliary_lr": 1.0}),
}
CHARACTERS = 400_000  # per domain


def domains() -> dict[str, str]:
    """Texts that the model was not trained on, by name."""
    topics = pydoc_data.topics.topics
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    found = {
        "topics": "\n\n".join(topics[name] for name in sorted(topics)),
        "code": "\n\n".join(path.read_text(encoding="utf-8") for path in sources[::4]),
    }
    if "MPOE_TEST_DATA" in os.environ:
        text = Path(os.environ["MPOE_TEST_DATA"]) / "text"
        found["phonemes"] = (text / "g2p" / "t5_train.tsv").read_text(encoding="utf-8")
        found["captions"] = (text / "capp" / "greedy_teacher_7840.txt").read_text(encoding="utf-8")
    return {name: text[:CHARACTERS] for name, text in found.items()}


def write_texts(folder: Path) -> dict[str, dict[str, str]]:
    """{domain: {part: path}}: nine tenths to train on, a twentieth each to choose by and to report."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, text in domains().items():
        cuts = [0, int(0.9 * len(text)), int(0.95 * len(text)), len(text)]
        found[name] = {}
        for part, start, end in zip(("train", "choose", "report"), cuts[:-1], cuts[1:], strict=True):
            path = folder / f"{name}-{part}.txt"
            path.write_text(text[start:end], encoding="utf-8")
            found[name][part] = str(path)
    return found


def run(name: str, rate: float, seed: int, options, texts: dict, work: Path) -> dict:
    """Convert, fine-tune, measure; what one JSON file holds."""
    recipe, tuning = CONTENDERS[name]
    start = source = options.model
    if recipe is not None:
        start = str(work / "converted")
        convert(Recipe(source, **BASE | {"seed": seed} | recipe), start, overwrite=True)
    settings = {"skip_centre": 0.0} if recipe is not None else {}
    began = time.perf_counter()
    finetune(
        Finetuning(
            model=start,
            data=tuple(parts["train"] for parts in texts.values()),
            length=options.length,
            batch_size=options.batch_size,
            steps=options.steps,
            learning_rate=rate,
            seed=seed,
            save_every=10**9,
            log_every=options.steps,
            **settings | tuning,
        ),
        work / "tuned",
    )
    seconds = (time.perf_counter() - began) / options.steps
    tuned = str(work / "tuned")
    losses = {
        part: {domain: math.log(score(tuned, paths[part], options.length)) for domain, paths in texts.items()}
        for part in ("choose", "report")
    }
    result = {"contender": name, "rate": rate, "seed": seed, "steps": options.steps, "losses": losses}
    return result | {"seconds_per_step": seconds} | look(tuned, texts, options.length)


def score(model: str, path: str, length: int) -> float:
    return evaluate(model, path, length=length, stride=length).metrics["perplexity"].value


def look(folder: str, texts: dict, length: int) -> dict:
    """Sizes (of GPT-2's FFNs), and what the routers do on held-out text."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    ffn = [p for name, p in model.named_parameters() if ".mlp." in name and "router" not in name]
    found = {"ffn_params": sum(p.numel() for p in ffn), "params": model.num_parameters()}
    if not hasattr(model.config, "mpoe"):
        return found
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad(), router_stats(model, similarity_tokens=256) as stats:
        for paths in texts.values():
            ids = tokenizer(Path(paths["report"]).read_text(encoding="utf-8")[:20_000])["input_ids"]
            model(torch.tensor(ids[: len(ids) // length * length]).reshape(-1, length))
    layers = list(stats.values())
    experts = len(layers[0].load)
    entropies = [float(torch.special.entr(s.load).sum() / torch.tensor(experts).log()) for s in layers]
    others = ~torch.eye(experts, dtype=torch.bool)
    return found | {
        "load_entropy": statistics.mean(entropies),
        "lowest_load_entropy": min(entropies),
        "similarity": statistics.mean(float(s.similarity[others].mean()) for s in layers),
    }


def table(results: list[dict]) -> tuple[str, list[dict]]:
    """(Markdown, one row per contender at its best rate)."""
    rows = []
    for name in dict.fromkeys(result["contender"] for result in results):
        own = [result for result in results if result["contender"] == name]
        by_rate = {rate: [r for r in own if r["rate"] == rate] for rate in {r["rate"] for r in own}}
        best = min(by_rate, key=lambda rate: statistics.mean(map(mean_loss("choose"), by_rate[rate])))
        losses = list(map(mean_loss("report"), by_rate[best]))
        spread = statistics.stdev(losses) if len(losses) > 1 else float("nan")
        last = by_rate[best][-1]
        rows.append({"name": name, "rate": best, "loss": statistics.mean(losses), "spread": spread} | last)
    lines = [
        "| contender | rate | seeds | loss, nats | spread | FFN parameters | s / step | load entropy | "
        "similarity |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in sorted(rows, key=lambda row: row["loss"]):
        seeds = sum(r["contender"] == row["name"] and r["rate"] == row["rate"] for r in results)
        looks = [f"{row[key]:.3f}" if key in row else "" for key in ("load_entropy", "similarity")]
        lines.append(
            f"| {row['name']} | {row['rate']:g} | {seeds} | {row['loss']:.4f} | {row['spread']:.4f} | "
            f"{row['ffn_params']:,} | {row['seconds_per_step']:.2f} | {' | '.join(looks)} |"
        )
    return "\n".join(lines) + "\n", rows


def mean_loss(part: str):
    return lambda result: statistics.mean(result["losses"][part].values())


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6))
    axes.margins(x=0.2)  # room for the names
    for row in rows:
        axes.errorbar(row["ffn_params"], row["loss"], yerr=row["spread"], marker="o", capsize=3)
        axes.annotate(
            row["name"], (row["ffn_params"], row["loss"]), xytext=(6, 4), textcoords="offset points"
        )
    axes.set(xscale="log", xlabel="FFN parameters stored", ylabel="held-out loss, nats per token")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    data = os.environ.get("MPOE_TEST_DATA")
    here = Path(__file__).parent
    model = Path(data) / "checkpoints" / "gpt2-mix-2m" if data else here / "tiny-gpt2"
    parser.add_argument("--model", default=str(model))
    parser.add_argument("--out", type=Path, default=Path("compare-experts"))
    parser.add_argument("--only", help="contenders by the beginning of their names, separated by commas")
    parser.add_argument("--rates", default="5e-4,1e-3,2e-3")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=8)
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    texts = write_texts(options.out / "texts")
    wanted = options.only.split(",") if options.only else [""]
    names = [name for name in CONTENDERS if any(name.startswith(start) for start in wanted)]
    runs = options.out / "runs"
    runs.mkdir(exist_ok=True)
    grid = [(n, float(r), s) for s in range(options.seeds) for r in options.rates.split(",") for n in names]
    paths = []
    for number, (name, rate, seed) in enumerate(grid, 1):
        settings = [name, BASE, CONTENDERS[name], rate, seed, Path(options.model).name, sorted(texts)]
        settings += [options.steps, options.length, options.batch_size]
        path = runs / f"{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]}.json"
        if not path.exists():
            work = options.out / "work"
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            result = run(name, rate, seed, options, texts, work)
            path.write_text(json.dumps(result, indent=1) + "\n")
            shutil.rmtree(work)
        paths.append(path)
        print(f"{number}/{len(grid)} {name}, rate {rate:g}, seed {seed}", flush=True)
    text, rows = table([json.loads(path.read_text()) for path in paths])
    (options.out / "table.md").write_text(text)
    for suffix in ("png", "svg"):
        plot(rows, options.out / f"loss-by-size.{suffix}")
    print(text)


if __name__ == "__main__":
    main()
