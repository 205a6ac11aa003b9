"""What a token loses that passes some of the parts of every FFN (--kind split), before any training.

    MPOE_TEST_DATA=... python examples/benchmarks/split_cost.py [--smollm2 FOLDER] [--json FILE]

The dense model runs, and hooks set the hidden neurons of the parts that are not chosen to zero. Divisions and
routers are those of mpoe_convert/decomposition/partition.py; they see 8,192 tokens of calibration text. The
growth of the loss is measured on other text, 16,384 tokens, in nats per token. FOLDER is made by
make_smollm2.py.
"""

import argparse
import json
import os
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, logging

from mpoe_convert.decomposition.partition import centroids, clusters, contributions, fitted_rows

DATA = Path(os.environ.get("MPOE_TEST_DATA", ""))
CALIBRATION, SCORED, LENGTH = 8192, 16_384, 128
# Division and router; None: no router, the parts that add most to each token's output.
WAYS = (
    ("source's order", "centroids"),
    ("at random", "centroids"),
    ("by weights", "centroids"),
    ("by weights", "fitted"),
    ("by activity", "centroids"),
    ("by activity", "fitted"),
    ("by activity", None),
)


class FFN:
    """One FFN of a stock model.

    Attributes:
        module: whose input the router reads.
        first: (inner, in), gate or the first matrix; a row per neuron.
        down: (inner, out).
    """

    def __init__(self, module: torch.nn.Module):
        self.module, parts = module, dict(module.named_children())
        if "c_fc" in parts:  # Conv1D: (in, out)
            self.first, self.last = parts["c_fc"].weight.mT, parts["c_proj"]
            self.down = self.last.weight
        else:
            self.first = parts["gate_proj" if "gate_proj" in parts else "wi"].weight
            self.last = parts["down_proj" if "down_proj" in parts else "wo"]
            self.down = self.last.weight.mT

    @contextmanager
    def hooked(self, read_input, change_inner):
        """Run with a function of the FFN's input, and one that returns the hidden neurons' new values."""
        hooks = [
            self.module.register_forward_pre_hook(lambda _, given: read_input(given[0])),
            self.last.register_forward_pre_hook(lambda _, given: (change_inner(given[0]), *given[1:])),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class Source:
    """A model, its FFNs, and batches to calibrate and to measure on."""

    def __init__(self, folder: Path, texts: tuple[str, str]):
        self.name = folder.name
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        auto = AutoModelForSeq2SeqLM if config["model_type"] == "t5" else AutoModelForCausalLM
        self.model = auto.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        places = ("MLP", "DenseActDense")
        self.ffns = [FFN(m) for m in self.model.modules() if type(m).__name__.endswith(places)]
        take = self.pairs if auto is AutoModelForSeq2SeqLM else self.windows
        self.calibration, self.scored = take(texts[0], CALIBRATION), take(texts[1], SCORED)

    def windows(self, pattern: str, tokens: int) -> list[dict]:
        """Windows of texts, equally many of each."""
        files = sorted((DATA / "text").glob(pattern))
        found = []
        for file in files:
            text = file.read_text(encoding="utf-8")[: 8 * tokens]
            ids = self.tokenizer(text)["input_ids"][: tokens // len(files)]
            found += torch.tensor(ids[: len(ids) // LENGTH * LENGTH]).reshape(-1, LENGTH).split(8)
        return [{"input_ids": ids, "labels": ids} for ids in found]

    def pairs(self, pattern: str, tokens: int) -> list[dict]:
        """Words and their phonemes; the tokens are those of the words and of the phonemes."""
        lines = next((DATA / "text").glob(pattern)).read_text(encoding="utf-8").splitlines()
        found = []
        while sum(each["labels"].numel() + each["input_ids"].numel() for each in found) < tokens:
            words, phonemes = zip(*(lines.pop(0).split("\t") for _ in range(64)), strict=True)
            made = self.tokenizer(list(words), text_target=list(phonemes), padding=True, return_tensors="pt")
            labels = made["labels"].masked_fill(made["labels"] == self.tokenizer.pad_token_id, -100)
            found.append(dict(made) | {"labels": labels})
        return found

    @torch.no_grad()
    def loss(self) -> float:
        """Nats per token."""
        total = count = 0
        for batch in self.scored:
            here = int((batch["labels"] != -100).sum())
            total, count = total + here * float(self.model(**batch).loss), count + here
        return total / count

    @torch.no_grad()
    def activations(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Of every FFN on the calibration text: inputs (tokens, in), hidden neurons (tokens, inner)."""
        seen = [([], []) for _ in self.ffns]
        for ffn, (inputs, inner) in zip(self.ffns, seen, strict=True):
            keep = ffn.hooked(
                lambda x, to=inputs: to.append(x.flatten(0, -2)),
                lambda h, to=inner: to.append(h.flatten(0, -2)) or h,
            )
            with keep:
                for batch in self.calibration:
                    self.model(**batch)
        return [(torch.cat(inputs), torch.cat(inner)) for inputs, inner in seen]


def divided(ffn: FFN, inner: torch.Tensor, division: str, parts: int) -> torch.Tensor:
    """(parts, n) numbers of neurons."""
    count = ffn.first.shape[0]
    if division == "source's order":
        return torch.arange(count).reshape(parts, -1)
    if division == "at random":
        return torch.randperm(count, generator=torch.Generator().manual_seed(0)).reshape(parts, -1)
    sizes = (inner.abs() * ffn.down.norm(dim=1)).mT
    return clusters(F.normalize(ffn.first if division == "by weights" else sizes, dim=1), parts)


def router(ffn: FFN, seen, parts: torch.Tensor, kind: str | None) -> torch.Tensor | None:
    """(parts, in) rows."""
    inputs, inner = seen
    if kind == "fitted":
        return fitted_rows(inputs, contributions(inner, ffn.down, parts))
    return centroids(ffn.first, parts) if kind else None


class Chosen:
    """The parts that the tokens in a batch pass."""

    def __init__(self, ffn: FFN, parts: torch.Tensor, rows: torch.Tensor | None, top_k: int):
        self.ffn, self.parts, self.rows, self.top_k = ffn, parts, rows, top_k

    def read(self, x: torch.Tensor) -> None:
        self.logits = None if self.rows is None else x @ self.rows.mT

    def mask(self, inner: torch.Tensor) -> torch.Tensor:
        logits = self.logits
        if logits is None:
            logits = contributions(inner.flatten(0, -2), self.ffn.down, self.parts)
            logits = logits.unflatten(0, inner.shape[:-1])
        chosen = torch.zeros_like(logits).scatter(-1, logits.topk(self.top_k).indices, 1.0)
        kept = torch.empty_like(inner)
        kept[..., self.parts.flatten()] = chosen.repeat_interleave(self.parts.shape[1], -1)
        return inner * kept


def cost(source: Source, choices: list[Chosen], before: float) -> float:
    """Growth of the loss."""
    running = [each.ffn.hooked(each.read, each.mask) for each in choices]
    for each in running:
        each.__enter__()
    after = source.loss()
    for each in running:
        each.__exit__(None, None, None)
    return after - before


@torch.no_grad()
def costs(source: Source, parts: int, top_k: int) -> dict[str, float]:
    """{way: growth of the loss}."""
    before, seen = source.loss(), source.activations()
    found = {}
    for division, kind in WAYS:
        of_all = []
        for ffn, each in zip(source.ffns, seen, strict=True):
            own = divided(ffn, each[1], division, parts)
            of_all.append(Chosen(ffn, own, router(ffn, each, own, kind), top_k))
        found[f"{division}, {kind or 'the best choice'}"] = cost(source, of_all, before)
    return found


def sources(smollm2: Path | None):
    """Models with (calibration text, other text) and the (parts, chosen parts) to try."""
    models = DATA / "checkpoints"
    mix = ("mix/train_*.txt", "mix/heldout_*.txt")
    yield models / "t5-g2p-en-us", ("g2p/t5_train.tsv", "g2p/t5_test.tsv"), ((16, 8), (16, 4))
    yield models / "gpt2-mix-2m", mix, ((16, 8), (16, 4))
    stories = ("tinystories/tinystories_train_head_944k.txt", "mix/heldout_tinystories_heldout.txt")
    yield models / "llama-stories260k", stories, ((4, 3),)
    if smollm2 is not None:
        yield smollm2, ("wikitext-2/wiki.valid.txt", "wikitext-2/wiki.test.txt"), ((32, 16),)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smollm2", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logging.set_verbosity_error()
    results = {}
    for folder, texts, tried in sources(options.smollm2):
        source = Source(folder, texts)
        for parts, top_k in tried:
            found = costs(source, parts, top_k)
            results[f"{source.name}, {top_k} of {parts}"] = found
            print(f"{source.name}, {top_k} of {parts} parts", flush=True)
            for way, growth in found.items():
                print(f"    {way:32} {growth:7.3f}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
