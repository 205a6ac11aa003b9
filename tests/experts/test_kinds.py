"""Every kind describes and builds a whole FFN; one that decides about all its matrices together fits in."""

import pytest
import torch
from torch import nn

from mpoe_convert import Recipe
from mpoe_convert.conversion.build import seeded
from mpoe_convert.errors import SitesError
from mpoe_convert.experts import KINDS, load
from mpoe_convert.experts.ffn import FFNShape, Fitted, Form, MatrixShape, Target
from mpoe_convert.runtime.modeling_mpoe import FeedForward, matrix_shape, name_cores

HIDDEN, INNER, EXPERTS = 12, 18, 3
WIDE = ("blocks", "two-sided")  # layouts beside the default that are exact at any bond limit
SHAPES = {"gate": (HIDDEN, INNER), "up": (HIDDEN, INNER), "down": (INNER, HIDDEN)}
FFN = FFNShape("h.0.mlp", {role: MatrixShape(*size, has_bias=False) for role, size in SHAPES.items()})


class Given:
    """An FFN whose matrices are at hand."""

    shape, activations = FFN, None

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.matrices = {role: torch.randn(size, generator=generator) for role, size in SHAPES.items()}
        self.asked: list[str] = []

    def target(self, role: str, expert: int = 0) -> Target:
        self.asked.append(role)
        return Target(self.matrices[role])

    def generator(self, part: str) -> torch.Generator:
        return seeded(0, part)

    def dense(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = (x @ self.matrices[role] for role in ("gate", "up"))
        return (nn.functional.silu(gate) * up) @ self.matrices["down"]


def module(form: Form, parts) -> FeedForward:
    """The shipped module with the parts that a kind has built; clones are exact copies."""
    made = FeedForward(form.parts, EXPERTS, 1)
    made.act = nn.SiLU()
    state = {"router.weight": torch.zeros(EXPERTS, HIDDEN)}
    for part, built in parts:
        if not isinstance(built, Fitted):
            state |= {f"{part}.{name}": tensor for name, tensor in built.items()}
            continue
        for number, (term, cores) in enumerate(zip(form.parts[part]["terms"], built.terms, strict=True)):
            for name, core, shared in zip(name_cores(term), cores, term["shared"], strict=True):
                each = core if isinstance(core, list) else [core] * (1 if shared else EXPERTS)
                each = [own.reshape(matrix_shape(own.shape)) for own in each]
                differ = len({own.shape for own in each}) > 1
                whole = torch.cat([own.flatten() for own in each]) if differ else torch.stack(each)
                state[f"{part}.terms.{number}.{name}"] = whole[0] if shared else whole
    made.load_state_dict(state)
    return made


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        *((kind, {}) for kind in KINDS if kind != "split"),
        *(("mpo", {"layout": layout}) for layout in WIDE),
        *((kind, {"bond_dim": "3/1/2"}) for kind in ("adapter", "low-rank")),
        *(("mpo", {"layout": layout, "bond_dim": "6/2/4"}) for layout in ("blocks", "one-sided")),
        *(("mpo", {"layout": layout, "bond_dim": "4/3/6"}) for layout in ("blocks", "one-sided")),
    ],
)
def test_every_expert_starts_as_the_dense_ffn(kind, more):
    own = {"bond_dim": 3, "bias": "shared", "noise": 0.0} | more
    options = Recipe("dense", kind=kind, experts=EXPERTS, **own).own_options
    ffn, kind = Given(), load(kind)
    form = kind.describe(FFN, options)
    made = module(form, kind.build(ffn, form, options))
    assert ffn.asked == list(SHAPES)  # each matrix is read once
    x = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(1))
    for output in made.run_all_experts(x):
        torch.testing.assert_close(output, ffn.dense(x), rtol=1e-4, atol=1e-4)


def test_an_error_names_the_matrix_and_its_size():
    options = Recipe("dense", kind="low-rank", bond_dim=13).own_options
    with pytest.raises(SitesError, match=r"^h\.0\.mlp\.gate \(12 x 18\): the rank .*at most 12"):
        load("low-rank").describe(FFN, options)
