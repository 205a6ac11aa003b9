"""Small mixtures with random parameters."""

import torch
from torch import nn

from mpoe_convert.runtime.modeling_mpoe import MPOEFeedForward


def chain(in_dims, out_dims, bonds, shared) -> dict:
    return {"in_dims": in_dims, "out_dims": out_dims, "bonds": bonds, "shared": shared}


# Input features 12, output features 10, by the way their experts are applied.
TERMS = {
    "one-sided": chain([3, 4, 1], [1, 5, 2], [3, 2], [False, True, False]),
    "one-sided, left only": chain([3, 4], [1, 10], [2], [False, True]),
    "one-sided, right only": chain([12, 1], [5, 2], [2], [True, False]),
    "one-sided, five sites": chain([2, 3, 2, 1, 1], [1, 1, 5, 2, 1], [2, 5, 2, 1], [0, 0, 1, 0, 0]),
    "one-sided, shared centre of two": chain(
        [3, 4, 1, 1], [1, 1, 5, 2], [3, 2, 2], [False, True, True, False]
    ),
    "two-sided": chain([2, 3, 2], [2, 1, 5], [3, 4], [False, True, False]),
    "balanced": chain([2, 2, 3, 1, 1], [1, 2, 1, 1, 5], [2, 3, 3, 4], [0, 0, 1, 0, 0]),
    "dense": chain([12], [10], [], [False]),
    "shared": chain([12], [10], [], [True]),
    "low rank": chain([12, 1], [1, 10], [2], [False, False]),
    "two shared runs": chain([2, 3, 2], [5, 1, 2], [2, 2], [True, False, True]),
}


LORA = [TERMS["shared"], TERMS["low rank"]]


NUM_EXPERTS = 4


def fill(module: nn.Module, seed: int = 0, scale: float = 0.5) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return module


def randn(*shape, seed: int = 1, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def mirrored(term: dict) -> dict:
    """The same kind of chain for a matrix of the transposed shape."""
    names = ("out_dims", "in_dims", "bonds", "shared")
    return chain(*[term[name][::-1] for name in names])


def make_ffn(name="one-sided", top_k=2, bias=None) -> MPOEFeedForward:
    """A gated mixture, 12 -> 10 -> 12."""
    terms = LORA if name == "lora" else [TERMS[name]]
    up = {"terms": terms, "bias": bias}
    down = {"terms": [mirrored(term) for term in terms], "bias": bias}
    ffn = MPOEFeedForward({"gate": up, "up": up, "down": down}, NUM_EXPERTS, top_k)
    ffn.act = nn.SiLU()
    return fill(ffn)
