"""Compare ways of leaving experts out of a fine-tuned artifact, or of merging them, without training.

    python examples/benchmarks/fewer_experts.py --out FOLDER

A Llama of 260,000 parameters is converted to 8 experts, 2 per token, and fine-tuned for 400 steps on four
domains, once per kind; artifacts that lie in FOLDER are taken as they are. Experts are observed on one half
of the held-out text. The table has the growth of the loss on the other half, in nats per token: the mean over
the domains.

    random          five draws, their mean
    load            the largest sum of combine weights stays (prune --by load)
    output          the largest sum of weighted differences from the mean expert stays (prune --by output)
    norms           the same of the outputs themselves
    REAP            their mean over the tokens that an expert gets, not the sum
    alike           clusters of experts with like outputs; the one that is chosen most often stays
    alike, merged   the same clusters; weights and routers' rows are averaged by the numbers of choices
    HC-SMoE         clusters by the mean outputs, merged in the same way

Needs MPOE_TEST_DATA, as compare_experts.py, and pip install "mpoe-convert[train]".
"""

import argparse
import copy
import itertools
from pathlib import Path

import torch
from compare_experts import Stories
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from mpoe_convert import Finetuning, Recipe, convert, finetune

KINDS = {
    "dense": {"kind": "dense"},
    "low-rank": {"kind": "low-rank", "bond_dim": 5},
    "blocks": {"layout": "blocks", "bond_dim": 16},
}
EXPERTS, LENGTH, WINDOWS, LEFT = 8, 128, 24, (6, 4, 2)


def tuned(kind: str, task: Stories, folder: Path) -> Path:
    """The folder of a fine-tuned artifact, made if it is not there."""
    start, out = folder / f"{kind}-start", folder / f"{kind}-tuned"
    if not out.exists():
        if not start.exists():
            convert(Recipe(str(task.model), experts=EXPERTS, top_k=2, seed=0, **KINDS[kind]), start)
        data = tuple(task.paths["train"])
        settings = {"steps": 400, "learning_rate": 4e-3, "save_every": 10**9, "log_every": 100}
        finetune(Finetuning(model=str(start), data=data, **settings, **task.options), str(out))
    return out


def windows(paths: dict[str, Path], tokenizer) -> list[torch.Tensor]:
    """Of each domain as many windows, evenly spread: (windows, length)."""
    found = []
    for path in paths.values():
        ids = tokenizer(path.read_text(encoding="utf-8"), verbose=False)["input_ids"]
        cut = torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).reshape(-1, LENGTH)
        found.append(cut[:: max(len(cut) // WINDOWS, 1)][:WINDOWS])
    return found


@torch.no_grad()
def loss(model, batches) -> float:
    return sum(float(model(input_ids=batch, labels=batch).loss) for batch in batches) / len(batches)


@torch.no_grad()
def observe(model, batches) -> dict[str, dict[str, torch.Tensor]]:
    """Of every mixture, sums over tokens of what its experts do."""
    found = {}

    def watch(path, ffn):
        zeros = dict.fromkeys(("choices", "weights", "norms", "differences"))
        sums = found[path] = {name: torch.zeros(EXPERTS) for name in zeros}
        sums["outputs"], sums["products"] = torch.tensor(0.0), torch.zeros(EXPERTS, EXPERTS)

        def add(router, args, routing):
            tokens, experts, weights = routing.choices[:3]
            outputs = ffn.run_all_experts(args[0])  # (E, T, H)
            apart = outputs - outputs.mean(0)
            norms = {"norms": outputs.norm(dim=-1), "differences": apart.norm(dim=-1)}
            sums["choices"] += torch.bincount(experts, minlength=EXPERTS)
            sums["weights"].index_add_(0, experts, weights)
            for name, values in norms.items():
                sums[name].index_add_(0, experts, values[experts, tokens] * weights)
            sums["outputs"] = sums["outputs"] + outputs.sum(1)
            sums["products"] += torch.einsum("eth,fth->ef", apart, apart)

        return ffn.router.register_forward_hook(add)

    handles = [watch(path, ffn) for path, ffn in model.mixtures()]
    for batch in batches:
        model(input_ids=batch)
    for handle in handles:
        handle.remove()
    return found


def highest(scores: torch.Tensor, count: int) -> list[list[int]]:
    """Experts that stay, each alone."""
    return [[expert] for expert in sorted(scores.argsort(descending=True)[:count].tolist())]


def alike(sums: dict, count: int) -> list[list[int]]:
    """Clusters by Ward's method: squared differences from a cluster's mean, weighted by choices, stay low."""
    own, weights = sums["products"].diagonal(), sums["choices"] + 1
    distances = own.unsqueeze(0) + own.unsqueeze(1) - 2 * sums["products"]

    def lost(cluster):
        part = weights[cluster]
        return float(part @ distances[cluster][:, cluster] @ part / part.sum())

    return clusters(count, lambda one, other: lost(one + other) - lost(one) - lost(other))


def hc_smoe(sums: dict, count: int) -> list[list[int]]:
    """Clusters by average linkage of the mean outputs (arXiv 2410.08589)."""
    distances = torch.cdist(sums["outputs"], sums["outputs"])
    return clusters(count, lambda one, other: float(distances[one][:, other].mean()))


def clusters(count: int, cost) -> list[list[int]]:
    found = [[expert] for expert in range(EXPERTS)]
    while len(found) > count:
        one, other = min(itertools.combinations(found, 2), key=lambda pair: cost(*pair))
        found = [each for each in found if each is not one and each is not other] + [one + other]
    return found


def smaller(model, groups: dict[str, list[list[int]]], sums: dict, merge: bool):
    """The model with one expert per group: the mean of the group's, or the one that is chosen most often."""
    config = copy.deepcopy(model.config)
    config.mpoe["num_experts"] = len(next(iter(groups.values())))
    made, state = type(model)(config).eval(), dict(model.state_dict())
    for path, own in groups.items():
        weights = sums[path]["choices"] + 1
        for name, tensor in model.state_dict().items():
            if f".{path}." in name and (".aux_" in name or name.endswith("router.weight")):
                picked = [tensor[max(group, key=lambda e: float(weights[e]))] for group in own]
                shares = [weights[group] / weights[group].sum() for group in own]
                if merge:
                    pairs = zip(own, shares, strict=True)
                    picked = [torch.einsum("e,e...->...", share, tensor[group]) for group, share in pairs]
                state[name] = torch.stack(picked)
    made.load_state_dict(state)
    return made


def ways(sums: dict, count: int) -> dict[str, tuple[list[dict], bool]]:
    """Name -> groups of every mixture, of one draw or more; and whether they are merged."""

    def by(function) -> list[dict]:
        return [{path: function(own) for path, own in sums.items()}]

    generator = torch.Generator().manual_seed(0)
    draws = [by(lambda own: highest(torch.rand(EXPERTS, generator=generator), count))[0] for _ in range(5)]
    return {
        "random": (draws, False),
        "load": (by(lambda own: highest(own["weights"], count)), False),
        "output": (by(lambda own: highest(own["differences"], count)), False),
        "norms": (by(lambda own: highest(own["norms"], count)), False),
        "REAP": (by(lambda own: highest(own["norms"] / own["choices"].clamp(min=1), count)), False),
        "alike": (by(lambda own: alike(own, count)), False),
        "alike, merged": (by(lambda own: alike(own, count)), True),
        "HC-SMoE": (by(lambda own: hc_smoe(own, count)), True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("fewer-experts"))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[*KINDS])
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    task = Stories()
    (options.out / "data").mkdir(parents=True, exist_ok=True)
    task.write(options.out / "data")
    rows: dict[str, list[str]] = {}
    for kind in options.kinds:
        folder = tuned(kind, task, options.out)
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        seen, held_out = (windows(task.paths[part], tokenizer) for part in ("choose", "report"))
        sums, whole = observe(model, seen), loss(model, held_out)
        print(f"{kind}: {whole:.4f} nats per token with all experts", flush=True)
        for count in LEFT:
            for name, (draws, merge) in ways(sums, count).items():
                losses = [loss(smaller(model, groups, sums, merge), held_out) for groups in draws]
                rows.setdefault(name, []).append(f"{sum(losses) / len(losses) - whole:.4f}")
    heads = [f"{kind}, {count}" for kind in options.kinds for count in LEFT]
    print(f"| | {' | '.join(heads)} |\n|---|{'---:|' * len(heads)}")
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
