"""Mixtures that `compression_mixtures.py` compresses, and texts of their domains.

* `qwen3moe-mix`: 16 experts a layer, trained from scratch.
* an upcycled one: llama-stories260k with eight copies of its FFNs, trained on the domains of
  `compare_experts.py stories`, and exported: a stock Mixtral.
"""

import os
import tempfile
from pathlib import Path

from compare_experts import DATA, Stories

from mpoe_convert import Finetuning, Recipe, convert, export, finetune

# As in the longer runs of compare_experts.py.
UPCYCLING = {"steps": 1500, "learning_rate": 4e-3, "length": 256, "batch_size": 4}

Texts = dict[str, tuple[str, str]]  # domain -> (calibration text, evaluation text)


def trained_from_scratch() -> tuple[Path, Texts]:
    """qwen3moe-mix; domains that it was trained on, and parts of them that it was not."""
    code = sorted(Path(os.__file__).parent.glob("*.py"))
    parts = [code[1::2], code[::20]]
    sources = ["\n".join(f.read_text(encoding="utf-8", errors="ignore") for f in part) for part in parts]
    pairs = {
        "stories": ("train_tinystories.txt", "heldout_tinystories_heldout.txt"),
        "plays": ("train_shakespeare.txt", "heldout_shakespeare_last10_.txt"),
        "wiki": ("train_wikitext2valid.txt", "heldout_wikitext2_test_300k_chars_.txt"),
    }
    found = {"code": (sources[0], sources[1])}
    for name, files in pairs.items():
        ours, theirs = ((DATA / "text/mix" / file).read_text(encoding="utf-8") for file in files)
        found[name] = (ours, theirs)
    return DATA / "checkpoints/qwen3moe-mix", found


def upcycled(folder: Path) -> tuple[Path, Texts]:
    """The upcycled one, made in this folder if it is not there; calibration text is of its training data."""
    task = Stories()
    with tempfile.TemporaryDirectory() as work:
        task.write(Path(work))
        if not folder.exists():
            _upcycle(task, Path(work), folder)
        ours = [Path(path).read_text(encoding="utf-8") for path in task.paths["train"]]
        theirs = {name: path.read_text(encoding="utf-8") for name, path in task.paths["report"].items()}
    return folder, {name: (mine, theirs[name]) for name, mine in zip(theirs, ours, strict=True)}


def _upcycle(task: Stories, work: Path, folder: Path) -> None:
    convert(Recipe(str(task.model), kind="dense", experts=8, top_k=2), str(work / "copies"))
    data = tuple(task.paths["train"])
    finetune(Finetuning(str(work / "copies"), data=data, **UPCYCLING), str(work / "tuned"))
    export(work / "tuned", folder, "moe")
