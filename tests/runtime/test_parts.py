"""The parts of a mixture: another type of part is one class and one row."""

import pytest
import torch
from helpers.mixtures import TERMS, fill, mirrored, randn, schedule
from torch import nn

from mpoe_convert.runtime import modeling_mpoe as modeling
from mpoe_convert.runtime.modeling_mpoe import PARTS, Cost, FeedForward, Part, Work

NUM_EXPERTS = 4


class Scale(Part):
    """Behind the FFN: every feature times a number of the expert's own, plus one that all share."""

    behind = True

    def __init__(self, hidden_size: int, num_experts: int, start: float):
        super().__init__()
        self.own = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.shared = nn.Parameter(torch.empty(hidden_size))
        self.shared_params, self.own_by_expert = hidden_size, (hidden_size,) * num_experts
        self.start = start

    @classmethod
    def from_form(cls, form, key, num_experts):
        return cls(modeling.hidden_size_of(form), num_experts, form[key]["start"])

    def forward(self, rows, picks):
        return rows * (self.own[picks.experts] + self.shared)

    def cost(self, work, schedule):
        return Cost(work.rows, 0, 4 * (self.shared_params + work.experts * self.own_params))

    def reset_parameters(self, std):
        self.own.data.fill_(self.start)
        self.shared.data.zero_()


@pytest.fixture
def scaled(monkeypatch):
    monkeypatch.setitem(PARTS, "scale", Scale)

    def make(name: str, **more) -> tuple[FeedForward, FeedForward]:
        """With the part and without, of the same weights."""
        form = {"up": {"terms": [TERMS[name]], "bias": None}}
        form["down"] = {"terms": [mirrored(TERMS[name])], "bias": None}
        form |= more
        ffns = [FeedForward(each, NUM_EXPERTS, 2) for each in (form | {"scale": {"start": 2.0}}, form)]
        for ffn in ffns:
            fill(ffn)
            ffn.act = nn.SiLU()
        ffns[1].load_state_dict(ffns[0].state_dict(), strict=False)
        return ffns[0].double(), ffns[1].double()

    return make


@pytest.mark.parametrize("mode", ["each row its own cores", "sorted rows", "expert by expert", "rebuild"])
@pytest.mark.parametrize("more", [{}, {"adapter": 3}], ids=["alone", "behind an adapter"])
@pytest.mark.parametrize("name", ["one-sided", "two-sided", "shared"])
def test_it_works_on_what_the_experts_put_out(name, more, mode, scaled):
    """Also where the FFN itself is shared, and with an adapter behind it: the table's order is theirs."""
    ffn, plain = scaled(name, **more)
    x = randn(9, 12)
    outputs = plain.run_all_experts(x)  # (E, T, H)
    expected = torch.zeros_like(x)
    for token, expert, weight in zip(*ffn.router(x).choices[:3], strict=True):
        factor = ffn.scale.own[expert] + ffn.scale.shared
        expected[token] += weight * outputs[expert, token] * factor
    with schedule(mode, ffn):
        found = ffn(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, plain(x), rtol=1e-2)


def test_its_parameters_and_costs_are_counted(scaled):
    ffn, plain = scaled("one-sided")
    assert ffn.own_params == plain.own_params + 12 and ffn.shared_params == plain.shared_params + 12
    assert ffn.shared_params + NUM_EXPERTS * ffn.own_params == sum(p.numel() for p in ffn.parameters())
    work = Work(tokens=5, rows=7, experts=3)
    assert ffn.cost(work).flops == plain.cost(work).flops + 7
    assert ffn.cost(work).nbytes == plain.cost(work).nbytes + 4 * 12 * 4
    assert list(ffn.state_dict())[-2:] == ["scale.own", "scale.shared"]
    for part in ffn.parts:
        part.reset_parameters(0.02)
    assert (ffn.scale.own == 2).all()


def test_a_part_that_the_file_does_not_know_is_named():
    form = {key: {"terms": [TERMS["dense"]], "bias": None} for key in ("up", "down")}
    with pytest.raises(
        ValueError, match=r"the parts \['brake'\]: this file knows \['gate', 'up', 'down', 'adapter'\]"
    ):
        FeedForward(form | {"brake": {}}, NUM_EXPERTS, 2)
