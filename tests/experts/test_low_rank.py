"""Low-rank experts: the dense matrix once, and two thin ones per expert."""

import pytest
import torch
from helpers.models import load, logits

from mpoe_convert import Recipe, convert
from mpoe_convert.artifact.layout import REPORT_FILE
from mpoe_convert.errors import RecipeError, SitesError
from mpoe_convert.source.json_files import read_json_object

RANK, EXPERTS = 3, 3


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "phi3", "opt", "bloom", "t5", "bert"])
def test_it_starts_as_the_dense_model_whatever_the_noise(model_type, artifact):
    dense, out = artifact(model_type, kind="low-rank", bond_dim=RANK, noise=0.5, experts=EXPERTS)
    model, stock = load(out, model_type), load(dense, model_type)
    torch.testing.assert_close(logits(model, model_type), logits(stock, model_type), rtol=0, atol=1e-5)
    report = read_json_object(out / REPORT_FILE)
    assert report["exact"] and report["max_clone_drift"] == 0 and report["max_relative_error"] < 1e-7
    for matrix in report["matrices"]:
        rows, cols = matrix["shape"]
        extra = EXPERTS * RANK * (rows + cols)
        assert matrix["stored_params"] == matrix["dense_params"] + extra and matrix["bonds"] == [RANK]


def test_left_factors_differ_and_separate_the_experts(artifact):
    _, out = artifact("llama", kind="low-rank", bond_dim=RANK, noise=0.0, experts=EXPERTS)
    model = load(out, "llama")
    chain = model.model.layers[0].mlp.up.terms[1]
    assert float(chain.aux_0.detach().std()) == pytest.approx(chain.aux_0.shape[1] ** -0.5, rel=0.3)
    assert not chain.aux_1.any()
    assert not torch.allclose(chain.aux_0[0], chain.aux_0[1])
    ids = torch.arange(3, 33).reshape(3, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model.train()(ids, labels=ids).loss.backward()
    optimizer.step()
    with torch.no_grad():
        own = [chain.matrix([chain.aux_0, chain.aux_1], e) for e in range(EXPERTS)]
    assert all(m.norm() > 0 for m in own) and (own[0] - own[1]).norm() > 0.1 * own[0].norm()


def test_a_rank_that_is_none(tiny_gpt2, tmp_path):
    with pytest.raises(SitesError, match=r"the rank \(bond_dim\) is 17; expected at most 16"):
        convert(Recipe(str(tiny_gpt2), kind="low-rank", bond_dim=17), tmp_path / "out")
    with pytest.raises(RecipeError, match="expected a whole number of at least 1, the rank"):
        Recipe(str(tiny_gpt2), kind="low-rank", bond_dim=(2, 2))
