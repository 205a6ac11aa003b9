"""Intervals: their coverage, against other formulas, and where there is none."""

import math

import numpy as np
import pytest
from scipy import stats

from mpoe_convert.training.intervals import (
    MIN_UNITS,
    Metric,
    bootstrap_interval,
    draw_samples,
    notes,
    outer_level,
    rate_interval,
)


@pytest.mark.parametrize("num_units", [10, 11, 30, 1000])
def test_quantiles_are_moved_outwards_as_student_says(num_units):
    t = stats.t.ppf(0.975, num_units - 1)
    expected = stats.norm.cdf(-math.sqrt(num_units / (num_units - 1)) * t)
    assert outer_level(num_units) == pytest.approx(expected, rel=2e-3)
    assert outer_level(num_units) < 0.025


def test_coverage_of_the_smallest_sample():
    """Of means of ten normal values; the plain percentile interval covers 90 %."""
    rng, covered, trials = np.random.default_rng(0), 0, 1000
    for trial in range(trials):
        values = rng.normal(3, 1, MIN_UNITS)
        samples = values[draw_samples(MIN_UNITS, trial)].mean(1)
        found = bootstrap_interval(values.mean(), samples, MIN_UNITS, "windows")
        covered += found.low <= 3 <= found.high
    assert 0.925 < covered / trials < 0.965


@pytest.mark.parametrize(("hits", "num"), [(0, 1), (1, 1), (0, 20), (3, 20), (20, 20), (500, 1000)])
def test_rates_are_wilsons(hits, num):
    found = rate_interval(np.array([1.0] * hits + [0.0] * (num - hits)))
    expected = stats.binomtest(hits, num).proportion_ci(method="wilson")
    assert found.value == hits / num and found.note is None
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert found.low <= found.value <= found.high


def test_too_few_units_have_no_interval():
    found = bootstrap_interval(186.8, np.array([186.6, 187.1]), 2, "windows")
    told = "no interval: it takes at least 10 windows, the data give 2"
    assert found == Metric(186.8, None, None, told) and found.in_words() == "186.8 (no interval)"


def test_units_that_are_alike_have_no_interval():
    found = bootstrap_interval(1.0, np.ones(1000), 12, "examples")
    assert (found.low, found.note) == (None, "no interval: it does not vary over the 12 examples")


def test_a_reason_is_told_once():
    few, fine = Metric(1.0, note="no interval: too few"), Metric(1.0, 0.9, 1.1)
    assert fine.in_words() == "1 (0.9 to 1.1)" and Metric(None, note="of no use").in_words() == "undefined"
    found = notes(
        {"bleu": few, "chrf": few, "rouge_l": fine}, None, {"bleu": few, "f1": Metric(None, note="why")}
    )
    assert found == ["bleu, chrf: no interval: too few.", "f1: why."]
