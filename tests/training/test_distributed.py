"""DDP and FSDP2 with two processes on one machine (gloo): the same loss, gradients and step as without."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "helpers" / "distributed.py"


@pytest.mark.parametrize(
    ("model_type", "layout", "how"),
    [
        ("gpt2", "one-sided", "ddp"),
        ("llama", "two-sided", "fsdp2"),
        ("llama", "one-sided", "fsdp2-bfloat16"),
    ],
)
def test_wrapped_it_is_the_same(model_type, layout, how, artifact):
    _, out = artifact(model_type, layout=layout, noise=0.1)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*launch, SCRIPT, out, how], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {rank: line for rank, line in re.findall(r"rank (\d): (loss=.*)", done.stdout)}
    assert found.keys() == {"0", "1"}, done.stdout
    for line in found.values():
        numbers = {name: float(value) for name, value in re.findall(r"(\w+)=(\S+)", line)}
        scale = 5000 if how.endswith("bfloat16") else 1  # steps between bfloat16 numbers are 2**-8
        assert numbers["loss"] < 1e-6 * scale, numbers
        assert numbers["gradient"] < 1e-5 * scale and numbers["logits"] < 1e-5 * scale, numbers
