"""The value of an FFN: dense ones are the case of one expert."""

import pytest

from mpoe_convert.source.ffn import FFN, Source


def matrices(expert: int) -> dict[str, Source]:
    return {role: Source(f"mlp.experts.{expert}.{role}.weight", None, False) for role in ("up", "down")}


def test_a_dense_ffn_has_the_projections_of_its_only_expert():
    ffn = FFN("h.0", 0, "transformer.h.0.mlp", (matrices(0),))
    assert (ffn.num_experts, ffn.router, ffn.shared) == (1, None, None)
    assert ffn.projections == matrices(0)


@pytest.mark.parametrize("experts", [1, 2])
def test_a_mixture_has_no_projections_of_the_whole(experts):
    ffn = FFN("h.0", 0, "h.0.mlp", tuple(map(matrices, range(experts))), router="h.0.mlp.gate.weight")
    assert ffn.num_experts == experts
    with pytest.raises(AssertionError):
        _ = ffn.projections
