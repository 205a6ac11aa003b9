"""Parts of the conversion loop that need no artifact."""

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
