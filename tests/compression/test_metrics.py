"""Fit metrics, each against the definition of its error."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers.tiny import save_tiny

from mpoe_convert import Recipe, plan
from mpoe_convert.compression import metrics
from mpoe_convert.compression.moments import FFNMoments
from mpoe_convert.decomposition.low_rank import factor, spectrum
from mpoe_convert.errors import RecipeError
from mpoe_convert.planning import recipe

TOKENS = 200


def eye(n):
    return torch.eye(n, dtype=torch.float64)


# By metric: S of all inputs and M of all outputs. The error of D = W - W' is tr(S D M D^T).
WEIGHING = {
    "weights": lambda x, gradient: (eye(x.shape[1]), eye(gradient.shape[1])),
    "diagonal": lambda x, gradient: (torch.diag(x.square().mean(0)), eye(gradient.shape[1])),
    "outputs": lambda x, gradient: (x.mT @ x / TOKENS, eye(gradient.shape[1])),
    "loss": lambda x, gradient: (
        x.mT @ x / TOKENS,
        0.7 * gradient.mT @ gradient / TOKENS + 0.3 * gradient.square().mean() * eye(gradient.shape[1]),
    ),
}


def test_names_are_those_of_the_recipe():
    assert sorted(recipe.METRICS) == list(metrics.METRICS)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)], ids=["thin inputs", "thin outputs"])
@pytest.mark.parametrize("name", metrics.METRICS)
def test_spectrum_is_the_error_of_the_factors(name, shape):
    rows, cols = shape
    generator = torch.Generator().manual_seed(0)
    options = {"generator": generator, "dtype": torch.float64}
    weight = torch.randn(rows, cols, **options)
    x = torch.randn(TOKENS, rows, **options) * torch.logspace(0, 1, rows) @ torch.randn(rows, rows, **options)
    gradient = torch.randn(TOKENS, cols, **options) * torch.logspace(0, -1, cols)
    thin_gradient = gradient @ weight.mT if rows < cols else gradient
    outputs = x @ weight
    moments = FFNMoments(
        {
            "inputs": x.mT @ x / TOKENS,
            "inputs.scale": x.square().mean(0),
            "up.outputs": outputs.mT @ outputs / TOKENS,
            "up.gradient": thin_gradient.mT @ thin_gradient / TOKENS,
            "up.gradient_mean": gradient.square().mean(),
        }
    )
    matrix = SimpleNamespace(role="up", rows=rows, cols=cols, is_truncated=False)
    metric = metrics.load(name)
    weighed = metric.weigh(matrix, weight, moments)
    first, second = factor(weight, 3, weighed)
    s, m = WEIGHING[name](x, gradient)
    lost = weight - first @ second
    error = torch.trace(s @ lost @ m @ lost.mT)
    torch.testing.assert_close(spectrum(weight, weighed)[3:].sum(), error, rtol=1e-4, atol=0.0)
    if metric.input_moment:
        torch.testing.assert_close(metric.input_moment(moments, matrix), s)


@pytest.mark.parametrize("name", metrics.METRICS)
def test_contracts(name):
    metric = metrics.load(name)
    assert metric.about
    assert metric.allocation in recipe.ALLOCATIONS
    assert (metric.allocation == "loss") == (metric.nats is not None)
    assert metric.takes_calibration or not (metric.takes_gradients or metric.is_correctable)
    assert metric.takes_chains or metric.input_moment is None
    assert (metric.gradient is not None) == metric.takes_gradients


def test_without_moments_errors_are_those_of_the_weights():
    matrix = SimpleNamespace(role="up", rows=4, cols=6, is_truncated=False)
    for name in metrics.METRICS:
        weighed = metrics.load(name).weigh(matrix, torch.ones(4, 6), None)
        assert weighed.moment is None


def test_a_metric_that_chains_do_not_take(tmp_path, monkeypatch):
    folder = save_tiny("gpt2", "AutoModelForCausalLM", tmp_path)
    asked = Recipe(str(folder), layout="balanced", sites=3, bond_dim=2, metric="outputs", calibrate="builtin")
    assert plan(asked).recipe.metric == "outputs"
    from mpoe_convert.compression.metrics import outputs

    monkeypatch.setattr(outputs, "FIT", replace(outputs.FIT, takes_chains=False))
    with pytest.raises(RecipeError, match="metric='outputs' given without keep or max_error; chains"):
        plan(asked)
