"""What is summed of the outputs of experts that are not chosen, too."""

from types import SimpleNamespace

import pytest
import torch

from mpoe_convert.pruning import observe
from mpoe_convert.pruning.observe import Observed


@pytest.mark.parametrize("outputs", [1, 1 << 26], ids=["token by token", "at once"])
@pytest.mark.parametrize("parts", [1, 2])
def test_outputs_are_compared_with_the_mean_of_experts_that_hold_the_same_neurons(
    parts, outputs, monkeypatch
):
    """A fifth expert, which every token passes, belongs to no mean. Weights may be negative."""
    monkeypatch.setattr(observe, "_OUTPUTS", outputs)
    generator = torch.Generator().manual_seed(0)
    given, x = torch.randn(5, 3, 6, generator=generator), torch.arange(3.0).unsqueeze(1).expand(3, 6)
    module = SimpleNamespace(num_experts=5, run_all_experts=lambda rows: given[:, rows[:, 0].long()])
    tokens, experts = torch.tensor([0, 0, 1, 2]), torch.tensor([3, 0, 2, 3])
    weights = torch.tensor([0.5, -0.25, 1.0, 2.0])
    sums = Observed.nothing(4)
    observe._add_outputs(sums, module, x, (tokens, experts, weights), parts)
    expected = torch.zeros(4)
    for token, expert, weight in zip(tokens.tolist(), experts.tolist(), weights.tolist(), strict=True):
        alike = range(expert % parts, 4, parts)
        mean = sum(given[other, token] for other in alike) / len(alike)
        expected[expert] += abs(weight) * (given[expert, token] - mean).norm()
    torch.testing.assert_close(sums.differences.float(), expected)
