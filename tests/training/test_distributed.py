"""DDP and FSDP2 with two processes on one machine (gloo): the same loss, gradients and step as without."""

import re
import signal
import subprocess
import sys
from pathlib import Path

from helpers.data import words

HELPERS = Path(__file__).parents[1] / "helpers"
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def launch(script: str, *args: object) -> str:
    """What two processes print."""
    done = subprocess.run(
        [*LAUNCH, HELPERS / script, *map(str, args)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


PARTS = {"kind": "split", "experts": 3, "top_k": 2, "shared_experts": 1}
WRAPPED = [
    ("gpt2", {"layout": "one-sided"}, "ddp"),
    ("llama", {"layout": "two-sided"}, "fsdp2"),
    ("llama", {"layout": "one-sided"}, "fsdp2-bfloat16"),
    ("gpt2", PARTS, "ddp, parts"),
    ("gpt2", PARTS, "fsdp2, parts"),
]


def test_wrapped_it_is_the_same(artifact):
    """All in one launch, since processes that import torch take seconds."""
    asked = []
    for model_type, recipe, how in WRAPPED:
        asked += [artifact(model_type, noise=0.1, **recipe)[1], how]
    printed = launch("distributed.py", *asked)
    found = {(how, rank): line for how, rank, line in re.findall(r"(\S.*) rank (\d): (loss=.*)", printed)}
    assert found.keys() == {(how, rank) for *_, how in WRAPPED for rank in "01"}, printed
    for (how, _), line in found.items():
        numbers = {name: float(value) for name, value in re.findall(r"(\w+)=(\S+)", line)}
        scale = 5000 if how.endswith("bfloat16") else 1  # steps between bfloat16 numbers are 2**-8
        assert numbers["loss"] < 1e-6 * scale, (how, numbers)
        assert numbers["gradient"] < 1e-5 * scale and numbers["logits"] < 1e-5 * scale, (how, numbers)


def test_a_signal_to_one_process_ends_all_at_the_same_step(artifact, tmp_path):
    """Both save the step that runs, and go on to the same model."""
    (tmp_path / "text.txt").write_text(words(600))
    _, out = artifact("gpt2", noise=0.1)
    printed = launch("interrupted.py", out, tmp_path / "text.txt", tmp_path, "{}")
    for rank in (0, 1):
        assert f"rank {rank} step 3 signal {int(signal.SIGTERM)}\n" in printed, printed
    assert re.search(r"differ 0 of [1-9]\d+", printed), printed
