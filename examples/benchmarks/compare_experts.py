"""Compare ways of making experts: the same data, steps, learning rates and seeds for all of them.

    python examples/benchmarks/compare_experts.py TASK --out examples/results
    python examples/benchmarks/compare_experts.py text --out out --only "dense;one-sided*" --seeds 1
    python examples/benchmarks/compare_experts.py stories --out out --only systems --rates 4e-3 --seeds 1

TASK is one of

    text            language modelling on four new domains; hours on two cores
    stories         the same by a smaller model, for ten times as many steps
    phonemes        spelling to phonemes, words exactly right
    phonemes-bart   the same by a BART
    source          which source a line of text comes from
    smollm2         two domains by SmolLM2-135M, and a task of lm-evaluation-harness; hours on two cores

Every kind of expert is tried at every learning rate with the first seed; the rate that does best on one half
of the held-out data is used with the other seeds, and the other half makes the table. Variations on one-sided
MPO experts take the rate that those chose; the table says how many pairs of rate and factor on what experts
own were tried. Every run leaves one JSON file in OUT/TASK/runs and is not
repeated: interrupt it and start it again. `--only systems` takes a contender for each system of the field,
whose name stands in the table, and writes systems.* in place of table.md and by-size.*.

Models and data are those of the folder named by MPOE_TEST_DATA (gpt2-mix-2m, llama-stories260k,
t5-g2p-en-us and bart-misaki-g2p-us; words with phonemes, outputs of another model, three sources of English),
with Python's own sources and language topics beside them. Without it, text and source use examples/tiny-gpt2
and the latter alone. smollm2 takes the folder smollm2 that make_smollm2.py makes.
Needs pip install "mpoe-convert[train]" matplotlib, and lm-eval for smollm2.
"""

import argparse
import csv
import difflib
import hashlib
import itertools
import json
import math
import os
import pydoc_data.topics
import random
import re
import shutil
import statistics
import sysconfig
import tempfile
from collections.abc import Collection, Sequence
from fnmatch import fnmatch
from pathlib import Path

import torch
import transformers
from datasets import disable_progress_bars
from safetensors.torch import load_file, save_file
from sklearn.cluster import KMeans
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, logging

from mpoe_convert import Finetuning, Recipe, convert, evaluate, finetune, router_stats
from mpoe_convert.artifact.loading import AUTO_CLASSES

EXAMPLES = Path(__file__).resolve().parents[1]
DATA = Path(os.environ["MPOE_TEST_DATA"]) if "MPOE_TEST_DATA" in os.environ else None
CHARACTERS = 400_000  # per source of text
LINES = 2000  # per source, to be told apart


# ---------------------------------------------------------------------------------------------------
# Tasks: what is trained on, and what is counted


def english() -> dict[str, str]:
    """Texts that the model was not trained on, by name."""
    topics = pydoc_data.topics.topics
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    found = {
        "topics": "\n\n".join(topics[name] for name in sorted(topics)),
        "code": "\n\n".join(path.read_text(encoding="utf-8") for path in sources[::4]),
    }
    if DATA:
        found["phonemes"] = (DATA / "text/g2p/t5_train.tsv").read_text(encoding="utf-8")
        found["captions"] = (DATA / "text/capp/greedy_teacher_7840.txt").read_text(encoding="utf-8")
    return {name: text[:CHARACTERS] for name, text in found.items()}


class Text:
    """Language modelling on several domains; held-out loss in nats per token.

    Attributes:
        steps: of the fine-tuning, if --steps does not say.
        rates: learning rates that every kind is tried at.
        factors: on the rate, for what experts own around a shared centre.
        bond: of one-sided chains.
        own: numbers that an expert of the other kinds owns, at most, in all matrices of an FFN.
        options: of the fine-tuning.
        domains: names of the texts.
        scored: tokens per domain and half.
    """

    unit = "loss, nats per token"
    rates = (1e-3, 2e-3)
    factors = (1.0, 3.0)
    bond = 64
    own = 2 * 2 * 64**2  # as many as in the outer cores of two one-sided chains
    steps = 250
    model = DATA / "checkpoints/gpt2-mix-2m" if DATA else EXAMPLES / "tiny-gpt2"
    options = {"length": 128, "batch_size": 4}
    domains = ("topics", "code", "phonemes", "captions")
    scored = 8192

    def write(self, folder: Path) -> None:
        """Nine tenths of each domain to train on, a twentieth each to choose by and to report."""
        self.paths = {"train": [], "choose": {}, "report": {}}
        for name, text in english().items():
            if name not in self.domains:
                continue
            cuts = [0, int(0.9 * len(text)), int(0.95 * len(text)), len(text)]
            for part, start, end in zip(self.paths, cuts[:-1], cuts[1:], strict=True):
                path = folder / f"{name}-{part}.txt"
                path.write_text(text[start:end], encoding="utf-8")
                if part == "train":
                    self.paths[part].append(str(path))
                else:
                    self.paths[part][name] = path

    def score(self, folder: str, part: str) -> dict[str, float]:
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        length, found = self.options["length"], {}
        for name, path in self.paths[part].items():
            ids = tokenizer(path.read_text(encoding="utf-8"))["input_ids"][: self.scored]
            windows = torch.tensor(ids[: len(ids) // length * length]).reshape(-1, length)
            with torch.no_grad():
                found[name] = float(model(input_ids=windows, labels=windows).loss)
        return found

    def examples(self, tokenizer, part: str = "report") -> list[dict]:
        texts = [path.read_text(encoding="utf-8")[:20_000] for path in self.paths[part].values()]
        windows = [torch.tensor(tokenizer(text)["input_ids"][:2048]).reshape(-1, 128) for text in texts]
        return [{"input_ids": ids} for ids in windows]


class Stories(Text):
    """The same by a Llama of 260,000 parameters, which learns for longer in the same time."""

    rates = (2e-3, 4e-3)
    factors = (1.0,)
    bond = 32
    own = 3 * 64 * (16 + 1)  # blocks of 16 and their scales in three matrices
    steps = 2500
    model = DATA and DATA / "checkpoints/llama-stories260k"


class SmolLM2(Text):
    """Two domains by a real language model, and the pronunciation of words by lm-evaluation-harness.

    The harness asks which of four pronunciations belongs to a word. The wrong ones are those of words that
    are spelt alike; none of the words is among those trained on.
    """

    rates = (5e-4,)
    factors = (1.0,)
    own = 3 * 576 * (64 + 1)  # blocks of 64 and their scales in three matrices
    steps = 75
    model = Path("smollm2")
    options = Text.options | {"precision": "bfloat16"}
    domains = ("code", "phonemes")
    scored = 4096
    questions = 200

    def write(self, folder: Path) -> None:
        super().write(folder)
        rows = (DATA / "text/g2p/t5_test.tsv").read_text(encoding="utf-8").splitlines()
        spoken = dict(row.split("\t") for row in rows)
        asked = []
        for number, word in enumerate(list(spoken)[: self.questions]):
            others = [other for other in spoken if spoken[other] != spoken[word]]
            choices = [spoken[other] for other in difflib.get_close_matches(word, others, 3, 0.0)]
            choices.insert(number % 4, spoken[word])
            asked.append({"word": word, "choices": choices, "answer": number % 4})
        self.asked = folder / "pronunciations.jsonl"
        self.asked.write_text("\n".join(map(json.dumps, asked)), encoding="utf-8")

    def harness(self, folder: str) -> float:
        """Share of the words whose pronunciation is chosen rightly."""
        import lm_eval

        task = {
            "task": "pronunciations",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(self.asked)}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{word}}",
            "target_delimiter": "\t",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc"}],
        }
        found = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": folder, "trust_remote_code": True},
            tasks=[task],
            device="cpu",
            batch_size=16,
            bootstrap_iters=0,
            log_samples=False,
        )
        return found["results"]["pronunciations"]["acc,none"]


class Phonemes:
    """A T5 that spells English words in phonemes; words not exactly right, in per cent."""

    unit = "words wrong, %"
    rates = (3e-4, 1e-3)
    factors = (1.0,)
    bond, own, steps = Text.bond, Text.own, Text.steps
    model = DATA and DATA / "checkpoints/t5-g2p-en-us"
    options = {"length": 32, "batch_size": 64, "task": "seq2seq"}

    def write(self, folder: Path) -> None:
        self.paths = {}
        for part, name in (("train", "train"), ("choose", "val"), ("report", "test")):
            rows = (DATA / f"text/g2p/t5_{name}.tsv").read_text(encoding="utf-8").splitlines()
            self.paths[part] = [str(folder / f"{part}.tsv")]
            text = "\n".join(["text\ttarget", *(row.replace('"', "") for row in rows)])
            Path(self.paths[part][0]).write_text(text + "\n", encoding="utf-8")

    def score(self, folder: str, part: str) -> dict[str, float]:
        found = evaluate(folder, self.paths[part], task="seq2seq", length=32, batch_size=128, limit=1000)
        return {"words": 100 * (1 - found.metrics["exact_match"].value)}

    def examples(self, tokenizer, part: str = "report") -> list[dict]:
        rows = Path(self.paths[part][0]).read_text(encoding="utf-8").splitlines()[1:257]
        words, phonemes = zip(*(row.split("\t") for row in rows), strict=True)
        made = tokenizer(list(words), text_target=list(phonemes), padding=True, return_tensors="pt")
        return [dict(made) | {"labels": made["labels"].masked_fill(made["labels"] == 0, -100)}]


class BartPhonemes(Phonemes):
    """A BART that does the same. Letters and phonemes share its ids, so phonemes are written as letters."""

    model = DATA and DATA / "checkpoints/bart-misaki-g2p-us"

    def write(self, folder: Path) -> None:
        vocabulary = json.loads((self.model / "g2p_vocab.json").read_text(encoding="utf-8"))
        letters, phonemes = vocabulary["grapheme_chars"], vocabulary["phoneme_chars"]
        self.model = shutil.copytree(self.model, folder / self.model.name)
        ids = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
        ids |= {letter: number for number, letter in enumerate(letters) if number > 3}
        tokenizer = Tokenizer(WordLevel(ids, "<unk>"))
        tokenizer.pre_tokenizer = Split(Regex("."), "isolated")
        tokenizer.post_processor = TemplateProcessing("<s> $A </s>", None, [("<s>", 1), ("</s>", 2)])
        tokenizer.decoder = Fuse()
        special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(self.model)
        text = DATA / "text/g2p"
        held = set((text / "us_silver_idx10.tsv").read_text(encoding="utf-8").splitlines())
        rows = set((text / "us_silver.tsv").read_text(encoding="utf-8").splitlines())
        rows |= set((text / "us_gold.tsv").read_text(encoding="utf-8").splitlines())
        parts = {"train": sorted(rows - held), "held": sorted(held)}
        for name in parts:
            random.Random(0).shuffle(parts[name])
        parts["choose"], parts["report"] = parts["held"][:1000], parts["held"][1000:4000]
        self.paths = {}
        for part in ("train", "choose", "report"):
            pairs = [row.split("\t") for row in parts[part]]
            lines = [
                f"{word}\t{''.join(letters[phonemes.index(c)] for c in spoken)}"
                for word, spoken in pairs
                if set(spoken) <= set(phonemes) and set(word) <= set(letters[4:])
            ]
            self.paths[part] = [str(folder / f"{part}.tsv")]
            text = "\n".join(["text\ttarget", *lines])
            Path(self.paths[part][0]).write_text(text + "\n", encoding="utf-8")


class Source:
    """Which source a line of text comes from; wrong ones in per cent."""

    unit = "lines wrong, %"
    rates = (3e-4, 1e-3)
    factors = (1.0,)
    bond, own, steps = Text.bond, Text.own, Text.steps
    model = Text.model
    options = {"length": 32, "batch_size": 16, "task": "classification"}

    def write(self, folder: Path) -> None:
        texts = {name: text for name, text in english().items() if name in ("topics", "code")}
        for path in sorted((DATA / "text/mix").glob("train_*.txt")) if DATA else ():
            texts[path.stem.removeprefix("train_")] = path.read_text(encoding="utf-8")
        shuffle = random.Random(0).shuffle
        parts = {"train": [], "choose": [], "report": []}
        for name, text in texts.items():
            lines = sorted({line.strip()[:120] for line in text.splitlines() if len(line.strip()) >= 20})
            shuffle(lines)
            for part, count in (("choose", 300), ("report", 300), ("train", LINES)):
                parts[part] += [(line, name) for line in lines[:count]]
                del lines[:count]
        self.paths = {part: [str(folder / f"{part}.csv")] for part in parts}
        for part, rows in parts.items():
            shuffle(rows)
            with Path(self.paths[part][0]).open("w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows([("text", "label"), *rows])

    def score(self, folder: str, part: str) -> dict[str, float]:
        found = evaluate(folder, self.paths[part], task="classification", length=32, batch_size=64)
        return {"lines": 100 * (1 - found.metrics["accuracy"].value)}

    def examples(self, tokenizer, part: str = "report") -> list[dict]:
        with Path(self.paths[part][0]).open(encoding="utf-8", newline="") as file:
            lines = [text for text, _ in csv.reader(file)][1:257]
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        return [dict(tokenizer(lines, padding=True, truncation=True, max_length=32, return_tensors="pt"))]


TASKS = {
    "text": Text,
    "stories": Stories,
    "phonemes": Phonemes,
    "phonemes-bart": BartPhonemes,
    "source": Source,
    "smollm2": SmolLM2,
}


# ---------------------------------------------------------------------------------------------------
# Contenders

BASE = {"experts": 8, "top_k": 2}
# More experts, of which a token takes as many as there are in all by default.
MANY = {"experts": 64, "top_k": 8}
# The systems of the field, by the names of the contenders that stand for them; N is a number.
SYSTEMS = {
    "dense": "no experts",
    "plain MoE": "sparse upcycling (2212.05055)",
    "plain MoE, top-1": "Switch (2101.03961), weights of one",
    "plain MoE, top-1, raw": "Switch, its own weights",
    "plain MoE, top-1, raw x N": "Switch, its weights one at the start",
    "plain MoE, 1 shared": "sparse upcycling, a shared expert",
    "fine-grained N, 1 shared": "DeepSeekMoE (2401.06066)",
    "split N": "MoEfication (2110.01786), all parts",
    "split, top N": "MoEfication, half of the parts",
    "split, fixed N": "half of the neurons, no router",
    "split, top-p 0.5": "MoEfication with XMoE's choice (2403.18926)",
    "split, top-any": "MoEfication with DynMoE's choice (2405.14297)",
    "blocks N": "MPOE (2203.01104), untied cores",
    "blocks N, top-p 0.25": "MPOE with XMoE's choice",
    "blocks N, top-any": "MPOE with DynMoE's choice",
    "low-rank N": "LoRA experts",
    "low-rank N, sizes N to N": "HMoE's sizes (2408.10681) of LoRA experts",
    "adapter N": "PESC (2401.02731)",
    "core-space N": "CoMoL's experts (2603.00573), routed",
}
# Twice the weight that the load-balancing loss has by default.
EVEN = {"options": {"router_aux_loss_coef": 0.01}}
# What the shared matrix, what experts own, and the routers learn: the mask, and factors on the rate.
ROLES = (
    ("mask 0.75", {"skip_centre": 0.75}),
    ("frozen centre", {"freeze": ("centre",)}),
    ("centre x 0.1", {"central_lr": 0.1}),
    ("centre x 0.3", {"central_lr": 0.3}),
    ("centre x 3", {"central_lr": 3.0}),
    ("owned x 0.1", {"auxiliary_lr": 0.1}),
    ("owned x 0.3", {"auxiliary_lr": 0.3}),
    ("owned x 3", {"auxiliary_lr": 3.0}),
    ("owned x 10", {"auxiliary_lr": 10.0}),
    ("router x 0.1", {"router_lr": 0.1}),
    ("router x 10", {"router_lr": 10.0}),
)
# Keys of a recipe that say what happens to the artifact behind the conversion.
CHANGES = ("thin", "routers", "probabilities")
# Recipes of MPO experts that name no layout have this one.
LAYOUT = "one-sided"


def system_of(name: str) -> str | None:
    """The system of the field that a contender stands for, if it does for one."""
    patterns = ((re.escape(known).replace("N", r"\d+"), system) for known, system in SYSTEMS.items())
    return next((system for pattern, system in patterns if re.fullmatch(pattern, name)), None)


def like(task) -> str:
    """MPO experts that others are variations of, run at the rate and the factor that these choose."""
    return f"one-sided {task.bond}"


def recipe_of(task, recipe: dict, seed: int) -> Recipe:
    """The recipe of a contender's conversion."""
    layout = {} if "kind" in recipe else {"layout": LAYOUT}
    given = {name: value for name, value in recipe.items() if name not in CHANGES}
    return Recipe(str(task.model), **BASE | {"seed": seed} | layout | given)


def contenders(task) -> dict[str, tuple[dict | None, dict, tuple]]:
    """Name -> (recipe, None for the dense model; options of the fine-tuning, None for none; factors)."""
    config = AutoConfig.from_pretrained(task.model)
    hidden, matrices = config.hidden_size, 3 if config.model_type == "llama" else 2
    names = ("d_ff", "encoder_ffn_dim", "n_inner", "intermediate_size")
    inner = next((size for name in names if (size := getattr(config, name, None))), 4 * hidden)
    rank, width = task.own // (matrices * (hidden + inner)), task.own // (2 * hidden)
    variations = {
        "one-sided 64, mask 0.5": ({"bond_dim": 64}, {"skip_centre": 0.5}),
        "one-sided 64, mask 0.75": ({"bond_dim": 64}, {"skip_centre": 0.75}),
        "one-sided 64, frozen centre": ({"bond_dim": 64}, {"freeze": ("centre",)}),
        "one-sided 64, own biases": ({"bond_dim": 64, "bias": "per-expert"}, {}),
        "one-sided 64, centre x 0.3": ({"bond_dim": 64}, {"central_lr": 0.3}),
        "one-sided 64, centre x 2": ({"bond_dim": 64}, {"central_lr": 2.0}),
        "one-sided 64, noise 0.05": ({"bond_dim": 64, "noise": 0.05}, {}),
        "one-sided 64, balance 0.03": ({"bond_dim": 64}, {"options": {"router_aux_loss_coef": 0.03}}),
        **{f"one-sided 64, {n} experts": ({"bond_dim": 64, "experts": n}, {}) for n in (2, 4, 16)},
        "one-sided 32": ({"bond_dim": 32}, {}),
        "one-sided 96": ({"bond_dim": 96}, {}),
        "one-sided 64, identity gauge": ({"bond_dim": 64, "gauge": "identity"}, {}),
        "two-sided 64": ({"layout": "two-sided", "bond_dim": 64}, {}),
        "two-sided 32": ({"layout": "two-sided", "bond_dim": 32}, {}),
        "two-sided 96": ({"layout": "two-sided", "bond_dim": 96}, {}),
        "balanced, full bonds": ({"layout": "balanced", "bond_dim": 4096}, {}),
    }
    most = task.own // (matrices * hidden) - 1  # beside the scales
    block = max(size for size in range(1, most + 1) if hidden % size == 0)
    blocks = {"layout": "blocks", "bond_dim": block}
    side = math.isqrt(task.own // matrices) // 8 * 8
    core = {"kind": "core-space", "bond_dim": side}
    free = {
        like(task): ({"bond_dim": task.bond}, {}),
        f"blocks {block}": (blocks, {}),
        f"blocks {block}, identity gauge": (
            blocks | {"gauge": "identity"},
            EVEN,
        ),
        f"blocks {block}, balance 0.01": (blocks, EVEN),
        f"blocks {block}, clustered routers": (blocks | {"routers": "clustered"}, {}),
        **{f"blocks {block}, {role}": (blocks, tuned) for role, tuned in ROLES},
        f"low-rank {rank}": ({"kind": "low-rank", "bond_dim": rank}, {}),
        f"adapter {width}": ({"kind": "adapter", "bond_dim": width}, {}),
        f"core-space {side}": (core, {}),
        f"core-space {side}, owned x 3": (core, {"auxiliary_lr": 3.0}),
    }
    found = {name: (None, tuned, (1.0,)) for name, tuned in (("dense", {}), ("untrained", None))}
    found["plain MoE"] = ({"kind": "dense"}, {}, (1.0,))
    free[f"low-rank {rank}, balance 0.01"] = (free[f"low-rank {rank}"][0], EVEN)
    many = {"plain MoE": {"kind": "dense"}} | {n: recipe for n, (recipe, tuned) in free.items() if not tuned}
    free |= {f"{name}, 64 experts": (recipe | {"experts": 64}, {}) for name, recipe in many.items()}
    small, low_rank = core | {"bond_dim": side // 4}, free[f"low-rank {rank}"][0]
    free[f"core-space {side // 4}, 64 experts"] = (small | {"experts": 64}, {})
    chosen = {f"core-space {side}": core, f"core-space {side // 4}": small, f"low-rank {rank}": low_rank}
    chosen |= {f"blocks {block}": blocks, "plain MoE": {"kind": "dense"}}
    free |= {f"{name}, 64 experts, top-8": (recipe | MANY, {}) for name, recipe in chosen.items()}
    free[f"core-space {side}, 256 experts"] = (core | {"experts": 256}, {})
    found |= {name: (*each, task.factors) for name, each in free.items()}
    sized = different_sizes("low-rank", rank) | different_sizes("adapter", width)
    found |= {name: (*each, task.factors) for name, each in sized.items()}
    parts = max(size for size in range(2, 9) if inner % size == 0)
    own = whole_experts(parts) | selections(block, parts) | thin_chains(task.own, matrices, hidden, inner)
    if config.is_encoder_decoder:
        own |= encoders()
    found |= {name: (recipe, {}, (1.0,)) for name, recipe in own.items()}
    fixed = {"kind": "split", "experts": parts, "top_k": parts // 2, "routers": "none"}
    found[f"split, fixed {parts // 2}"] = (fixed, {"router_lr": 0.0}, (1.0,))
    single, raw = own["plain MoE, top-1"], {"options": {"router_combine": "raw"}}
    scaled = single | {"probabilities": BASE["experts"]}
    found["plain MoE, top-1, raw"] = (single, raw, (1.0,))
    own_code = raw | {"trust_remote_code": True}
    found[f"plain MoE, top-1, raw x {BASE['experts']}"] = (scaled, own_code, (1.0,))
    return found | {name: (*each, None) for name, each in variations.items() if name not in found}


def whole_experts(parts: int) -> dict[str, dict]:
    """Name -> recipe of mixtures whose experts share nothing: copies of the FFN, or parts of its neurons."""
    fine = {"kind": "split", "parts": parts - 1, "experts": 8 * (parts - 1), "shared_experts": 1}
    return {
        f"split {parts}": {"kind": "split", "experts": parts, "top_k": parts},
        f"fine-grained {8 * (parts - 1)}, 1 shared": fine | {"top_k": parts - 1},
        "plain MoE, top-1": {"kind": "dense", "top_k": 1},
        "plain MoE, 1 shared": {"kind": "dense", "shared_experts": 1},
    }


def encoders() -> dict[str, dict]:
    """Recipes for the encoder alone, whose tokens choose experts or whose experts choose tokens."""
    recipe = {"kind": "dense", "exclude": ("decoder*",)}
    choice = recipe | {"select": "expert-choice"}
    return {"plain MoE, encoder": recipe, "plain MoE, encoder, expert-choice": choice}


def thin_chains(own: int, matrices: int, hidden: int, inner: int) -> dict[str, dict]:
    """Recipes of low-rank experts whose thin chains are shared in part, at equal size; see `share_thin`."""
    wide = matrices - 1  # matrices of which the input is the smaller side
    sizes = {
        "out": own // (wide * inner + hidden),
        "in": own // (wide * hidden + inner),
    }
    found = {
        f"low-rank {rank}, owned {thin}": {"kind": "low-rank", "bond_dim": rank, "thin": thin}
        for thin, rank in sizes.items()
    }
    return found | {f"{name}, 64 experts": recipe | {"experts": 64} for name, recipe in found.items()}


def share_thin(folder: Path, owned: str) -> None:
    """Let the experts of a low-rank artifact own one core of their thin chains, and share the others.

    Args:
        owned: "out", the core that gives the outputs (HydraLoRA, arXiv 2404.19245); "in", the one that takes
            the inputs.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    terms = [part["terms"][1] for form in config["mpoe"]["forms"] for part in form.values()]
    for term in terms:
        term["shared"] = {"out": [True, False], "in": [False, True]}[owned]
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if ".terms.1.aux_0" in name]:
        stem = name.removesuffix("aux_0")
        shared, place = ("aux_0", "central_0") if owned == "out" else ("aux_1", "central_1")
        tensors[stem + place] = tensors.pop(stem + shared)[0].clone()
    save_file(tensors, file, metadata={"format": "pt"})


def scale_probabilities(folder: Path, factor: int) -> None:
    """Multiply the combine weights of an artifact that are probabilities, in its own code."""
    file, weights = folder / "modeling_mpoe.py", "logits.log_softmax(-1).gather(-1, experts).exp()"
    before, after = file.read_text(encoding="utf-8").split(f"return {weights}")
    file.write_text(f"{before}return {factor} * {weights}{after}", encoding="utf-8")


def cluster_routers(model, examples: list[dict], seed: int) -> None:
    """Start the routers of an artifact from k-means of the tokens that reach them, and write it again.

    The rows are the clusters' centres less their mean, scaled so that the logits have the variance of one.
    """
    seen: dict[str, list[torch.Tensor]] = {name: [] for name, _ in model.mixtures()}
    hooks = [
        ffn.register_forward_pre_hook(lambda _, given, name=name: seen[name].append(given[0].flatten(0, 1)))
        for name, ffn in model.mixtures()
    ]
    with torch.no_grad():
        for inputs in examples:
            model(**inputs)
        for name, ffn in model.mixtures():
            tokens = torch.cat(seen[name])  # (tokens, H)
            centres = KMeans(ffn.num_experts, random_state=seed).fit(tokens.numpy()).cluster_centers_
            rows = torch.from_numpy(centres) - torch.from_numpy(centres).mean(0)
            ffn.router.weight.copy_(rows / (tokens @ rows.mT).std())
    for hook in hooks:
        hook.remove()
    model.save_pretrained(model.name_or_path)


def stop_routers(model) -> None:
    """Let all tokens take the same experts, as rows of zeros make them, and write the artifact again."""
    for _, ffn in model.mixtures():
        torch.nn.init.zeros_(ffn.router.weight)
    model.save_pretrained(model.name_or_path)


def different_sizes(kind: str, mean: int) -> dict[str, tuple[dict, dict]]:
    """Experts that differ in size as HMoE's, 9 to 23 parts, beside those of the mean: as much is stored."""
    parts = range(9, 25, 2)
    ends = [round(mean * sum(parts[:n]) / 16) for n in range(len(parts) + 1)]
    sizes = [end - start for start, end in itertools.pairwise(ends)]
    name = f"{kind} {mean}, sizes {min(sizes)} to {max(sizes)}"
    recipe = {"kind": kind, "bond_dim": "/".join(map(str, sizes))}
    alike = {"options": {"router_size_penalty": False}}
    strong = {"options": {"router_aux_loss_coef": 0.05}}
    return {
        name: (recipe, {}),
        f"{name}, no penalty": (recipe, alike),
        f"{name}, penalty 0.05": (recipe, strong),
    }


def selections(block: int, parts: int) -> dict[str, dict]:
    """Recipes in which the number of experts per token varies, beside fixed numbers of the same experts."""
    blocks, split = {"layout": "blocks", "bond_dim": block}, {"kind": "split", "experts": parts}
    return {
        f"blocks {block}, top-p 0.25": blocks | {"select": "top-p", "threshold": 0.25, "top_k": 8},
        f"blocks {block}, top-any": blocks | {"select": "top-any", "top_k": 8},
        f"split, top {parts // 2}": split | {"top_k": parts // 2},
        "split, top-p 0.5": split | {"select": "top-p", "threshold": 0.5, "top_k": parts},
        "split, top-any": split | {"select": "top-any", "top_k": parts},
    }


class Runs:
    """The runs of one task, each made once."""

    def __init__(self, task, options):
        self.task, self.options = task, options
        self.rates = options.rates or task.rates
        self.folder = options.out / options.task / "runs"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.contenders = contenders(task)

    def get(self, name: str, rate: float, factor: float, seed: int) -> dict:
        recipe, tuning, _ = self.contenders[name]
        settings = [self.options.task, name, BASE, recipe, tuning, rate, factor, seed, self.options.steps]
        settings += [Path(self.task.model).name, self.task.options]
        key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
        path = self.folder / f"{key}.json"
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=self.options.out) as work:
                result = self.make(recipe, tuning, rate, factor, seed, Path(work))
            result = {"contender": name, "rate": rate, "factor": factor, "seed": seed} | result
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        result = json.loads(path.read_text(encoding="utf-8"))
        print(f"{name}, rate {rate:g} x {factor:g}, seed {seed}: {mean(result['choose']):.4f}", flush=True)
        return result

    def make(self, recipe, tuning: dict, rate: float, factor: float, seed: int, work: Path) -> dict:
        """Convert, fine-tune, measure."""
        start, options = str(self.task.model), {}
        if tuning is None:
            return self.measure(start) | {"seconds_per_step": 0.0}
        if recipe is not None:
            start = str(work / "converted")
            convert(recipe_of(self.task, recipe, seed), start)
            if "thin" in recipe:
                share_thin(Path(start), recipe["thin"])
            if "probabilities" in recipe:
                scale_probabilities(Path(start), recipe["probabilities"])
            if recipe.get("routers") == "clustered":
                tokenizer = AutoTokenizer.from_pretrained(start)
                cluster_routers(self.load(start), self.task.examples(tokenizer, "choose"), seed)
            if recipe.get("routers") == "none":
                stop_routers(self.load(start))
            options = {"skip_centre": 0.0, "auxiliary_lr": factor}
        steps, tuned = self.options.steps, str(work / "tuned")
        report = finetune(
            Finetuning(
                model=start,
                data=tuple(self.task.paths["train"]),
                steps=steps,
                learning_rate=rate,
                seed=seed,
                save_every=10**9,
                log_every=steps,
                **self.task.options | options | tuning,
            ),
            tuned,
        )
        return self.measure(tuned) | {"seconds_per_step": report["seconds"] / steps}

    def measure(self, folder: str) -> dict:
        """Scores on both halves of the held-out data, of the harness where the task asks it, and sizes."""
        found = {part: self.task.score(folder, part) for part in ("choose", "report")}
        if hasattr(self.task, "harness"):
            found["accuracy"] = self.task.harness(folder)
        return found | self.look(folder)

    def load(self, folder: str):
        """The model, by the Auto class of the task."""
        auto = getattr(transformers, AUTO_CLASSES[self.task.options.get("task", "causal")])
        return auto.from_pretrained(folder, trust_remote_code=True).eval()

    def look(self, folder: str) -> dict:
        """Sizes of the FFNs, and what the routers do on held-out data."""
        model = self.load(folder)
        block = getattr(model.config, "mpoe", None)
        if block is None:
            places = (".mlp.", ".DenseReluDense.", ".fc1.", ".fc2.")
            ffn = [p for n, p in model.named_parameters() if any(place in n for place in places)]
            size = sum(p.numel() for p in ffn)
            return {"stored": size, "active": size}
        numbers = [
            (p.numel(), ".aux_" in name or (name.endswith("bias") and p.ndim == 2))
            for _, ffn in model.mixtures()
            for name, p in ffn.named_parameters()
            if "router" not in name
        ]
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        with torch.no_grad(), router_stats(model, similarity_tokens=256) as stats:
            for inputs in self.task.examples(tokenizer):
                model(**inputs)
        chosen = mean(layer.experts_per_token for layer in stats.values())
        always = sum(sum(ffn.own_by_expert[block["num_experts"] :]) for _, ffn in model.mixtures())
        found = {
            "experts_per_token": chosen,
            "stored": sum(number for number, _ in numbers),
            "active": round(
                sum(number for number, own in numbers if not own)
                + always
                + sum(layer.own_params for layer in stats.values())
            ),
        }
        others = ~torch.eye(block["num_experts"], dtype=torch.bool)
        entropies = [float(torch.special.entr(s.load).sum()) / math.log(len(s.load)) for s in stats.values()]
        return found | {
            "load_entropy": mean(entropies),
            "lowest_load_entropy": min(entropies),
            "similarity": mean(float(s.similarity[others].mean()) for s in stats.values()),
        }

    def best(self, name: str) -> tuple[float, float]:
        """Rate and factor at which the first seed does best on the half to choose by."""
        factors = self.contenders[name][2]
        if factors is None:
            return self.best(like(self.task))
        pairs = [(rate, factor) for factor in factors for rate in self.rates]
        return min(pairs, key=lambda pair: mean(self.get(name, *pair, 0)["choose"]))

    def row(self, name: str) -> dict:
        """What the table says about a contender."""
        rate, factor = self.best(name)
        results = [self.get(name, rate, factor, seed) for seed in range(self.options.seeds)]
        scores = [mean(result["report"]) for result in results]
        row = {
            "scores": scores,
            "name": name,
            "rate": rate,
            "factor": factor,
            "seeds": len(scores),
            "score": mean(scores),
            "tried": len(self.contenders[name][2] or ()) * len(self.rates),
        }
        if self.options.only == "systems":
            row["system"] = system_of(name)
        row["spread"] = spread(scores)
        parts = results[0]["report"]
        row["parts"] = {part: mean(result["report"][part] for result in results) for part in parts}
        kinds = {
            "seconds_per_step": mean,
            "load_entropy": mean,
            "lowest_load_entropy": min,
            "similarity": mean,
            "experts_per_token": mean,
            "accuracy": mean,
        }
        for key, over_seeds in kinds.items():
            if key in results[0]:
                row[key] = over_seeds([result[key] for result in results])
        return row | {key: results[0][key] for key in ("stored", "active")}


def mean(values) -> float:
    return statistics.mean(values.values() if isinstance(values, dict) else values)


def spread(values: list[float]) -> float:
    """Standard deviation over seeds."""
    return statistics.stdev(values) if len(values) > 1 else float("nan")


# ---------------------------------------------------------------------------------------------------
# Table and picture


# Columns of what only some contenders and tasks have.
EXTRA = {
    "load_entropy": "load entropy",
    "lowest_load_entropy": "lowest",
    "similarity": "similarity",
    "experts_per_token": "experts per token",
    "accuracy": "accuracy",
}


def table(rows: list[dict], task) -> str:
    parts = list(rows[0]["parts"]) if len(rows[0]["parts"]) > 1 else []
    names = [f"perplexity, {part}" for part in parts]
    named = any("system" in row for row in rows)
    head = ["contender", *["system"] * named, "rate", "x", "tried", "seeds"]
    head += [task.unit, "spread", "less dense", "95 %", *names]
    head += ["stored", "active", "s / step"]
    extra = [key for key in EXTRA if any(key in row for row in rows)]
    head += [EXTRA[key] for key in extra]
    left = 1 + named  # columns of words
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * left + "---:|" * (len(head) - left)]
    dense = next((row["scores"] for row in rows if row["name"] == "dense"), None)
    for row in sorted(rows, key=lambda row: row["score"]):
        cells = [row["name"], *[row.get("system", "")] * named, f"{row['rate']:g}", f"{row['factor']:g}"]
        cells += [str(row["tried"] or ""), str(row["seeds"])]
        gained = gains(row, dense) if dense else []
        cells += [f"{row['score']:.4f}", f"{row['spread']:.4f}"]
        cells += [f"{mean(gained):+.4f}", f"{interval(gained):.4f}"] if gained else ["", ""]
        cells = ["" if cell == "nan" else cell for cell in cells]
        cells += [f"{math.exp(row['parts'][part]):.2f}" for part in parts]
        cells += [f"{row['stored']:,}", f"{row['active']:,}", f"{row['seconds_per_step']:.2f}"]
        cells += [f"{row[key]:.3f}" if key in row else "" for key in extra]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


# Student's t, two-sided 95 %, for 1, 2, ... degrees of freedom.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def interval(values: list[float]) -> float:
    """Half of the 95 % confidence interval of the mean."""
    if len(values) < 2:
        return float("nan")
    return STUDENT[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))


def gains(row: dict, dense: list[float]) -> list[float]:
    """Differences from dense fine-tuning, seed by seed: the same seed orders the data alike."""
    return [ours - theirs for ours, theirs in zip(row["scores"], dense, strict=False)]


def plot(rows: list[dict], task, path: Path, costs: Sequence[str] = ("stored",)) -> None:
    """Score against costs; against one alone also the difference from dense, where that was run."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    dense = next((row["scores"] for row in rows if row["name"] == "dense"), None)
    panels = [(cost, False) for cost in costs]
    if len(costs) == 1 and dense is not None:
        panels.append((costs[0], True))
    size = (6 * len(panels) + 3, 6)
    figure, grid = pyplot.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    for number, row in enumerate(sorted(rows, key=lambda row: row["score"])):
        style = {"marker": "osv^Dp*X"[number // 10 % 8], "capsize": 3, "ls": ""}
        style["label"] = f"{row['name']} ({row['score']:.3f})"
        for axes, (cost, is_gain) in zip(grid.flat, panels, strict=True):
            values = gains(row, dense) if is_gain else row["scores"]
            error = interval(values) if is_gain else row["spread"]
            axes.errorbar(row[cost], mean(values), error, **style)
    for axes, (cost, is_gain) in zip(grid.flat, panels, strict=True):
        what = "held out, less dense with the same seed" if is_gain else "held out"
        axes.set(xscale="log", xlabel=f"FFN parameters {cost} (routers apart)", ylabel=f"{what}: {task.unit}")
        axes.grid(alpha=0.3)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.savefig(path)
    pyplot.close(figure)


def chosen(names: Collection[str], only: str | None) -> list[str]:
    """The contenders that --only takes."""
    if only == "systems":
        return [name for name in names if system_of(name)]
    patterns = only.split(";") if only else ["*"]
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in names):
            raise SystemExit(f"no contender is called {pattern!r}")
    return [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--out", type=Path, default=Path("compare-experts"))
    parser.add_argument("--only", help="systems, or patterns of contenders' names with semicolons between")
    parser.add_argument("--rates", type=lambda text: [float(rate) for rate in text.split(",")])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="250; 2500 for stories")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    task = TASKS[options.task]()
    if task.model is None:
        raise SystemExit(f"{options.task} needs MPOE_TEST_DATA")
    options.steps = options.steps or task.steps
    runs = Runs(task, options)
    with tempfile.TemporaryDirectory() as data:
        task.write(Path(data))
        rows = [runs.row(name) for name in chosen(runs.contenders, options.only)]
    text, folder = table(rows, task), options.out / options.task
    if options.only == "systems":
        names, costs = ("systems.md", "systems"), ("stored", "active")
    else:
        names, costs = ("table.md", "by-size"), ("stored",)
    (folder / names[0]).write_text(text, encoding="utf-8")
    for suffix in ("png", "svg"):
        plot(rows, task, folder / f"{names[1]}.{suffix}", costs)
    print(text)


if __name__ == "__main__":
    main()
