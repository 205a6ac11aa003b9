"""The value of an FFN: dense ones are the case of one expert."""

from mpoe_convert.source.ffn import FFN, Source


def matrices(expert: int) -> dict[str, Source]:
    return {role: Source(f"mlp.experts.{expert}.{role}.weight", None, False) for role in ("up", "down")}


def test_a_dense_ffn_has_the_projections_of_its_only_expert():
    ffn = FFN("h.0", 0, "transformer.h.0.mlp", (matrices(0),))
    assert ffn.num_experts == 1
    assert ffn.projections == matrices(0)


def test_a_mixture_has_tensors_that_stack_all_experts():
    ffn = FFN("h.0", 0, "h.0.mlp", (matrices(0),) * 3)
    assert ffn.num_experts == 3 and ffn.projections == matrices(0)
