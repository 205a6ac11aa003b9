"""The conversion loop: what it needs, and how it names what went wrong."""

import subprocess
import sys

import pytest
import torch

from mpoe_convert.conversion.convert import _naming
from mpoe_convert.errors import CheckpointError, MachineError


def test_running_out_of_memory_names_the_matrix():
    wording = r"out of memory while working on h\.0\.mlp\.up; `mpoe-convert plan`"
    with pytest.raises(MachineError, match=wording), _naming(lambda: "h.0.mlp.up"):
        torch.empty(10**17)


def test_other_errors_of_torch_pass_unchanged():
    with pytest.raises(RuntimeError, match="size of tensor"), _naming(lambda: "h.0.mlp.up"):
        torch.ones(2) + torch.ones(3)


def test_errors_name_the_matrix_once():
    with pytest.raises(CheckpointError, match="^h.0.mlp.up: it is odd$"), _naming(lambda: "h.0.mlp.up"):
        raise CheckpointError("it is odd")
    with pytest.raises(CheckpointError, match="^h.0.mlp.up is odd$"), _naming(lambda: "h.0.mlp.up"):
        raise CheckpointError("h.0.mlp.up is odd")


# What the extras install and a plain `pip install mpoe-convert` does not.
OPTIONAL = ("accelerate", "datasets", "greenlet", "matplotlib", "peft", "sacrebleu", "sklearn")
BARE = f"""
import sys
from importlib.machinery import PathFinder

class Bare:
    find_distributions = staticmethod(PathFinder.find_distributions)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {OPTIONAL} else PathFinder.find_spec(name, path, target)

sys.meta_path = [Bare() if finder is PathFinder else finder for finder in sys.meta_path]
from transformers.utils import is_accelerate_available
assert not is_accelerate_available()
from mpoe_convert import Recipe, convert, verify
print(convert(Recipe(sys.argv[1], experts=2, bond_dim=2), sys.argv[2]).max_error < 1e-5)
"""


def test_it_needs_no_optional_library(tiny_gpt2, tmp_path):
    command = [sys.executable, "-c", BARE, str(tiny_gpt2), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("True\n", 0), done.stderr
