"""95 % intervals of scores: bootstrap over windows or examples, Wilson's for rates, or none with a reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 1000
# The bootstrap knows nothing beyond the units that it draws. Of so many, 6 % of the intervals miss the true
# mean of normal values, where 5 % are promised; of five, 9 % do (measured; tests hold the first).
MIN_UNITS = 10


@dataclass(frozen=True)
class Metric:
    """A score with its 95 % interval over units: windows or examples.

    Attributes:
        value: None: the data do not define the score.
        low / high: None: the data are too few, or too much alike, for an interval.
        note: why something is None.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    note: str | None = None

    def in_words(self) -> str:
        """The value and the interval, for tables."""
        if self.value is None:
            return "undefined"
        if self.low is None or self.high is None:
            return f"{self.value:.4g} (no interval)"
        return f"{self.value:.4g} ({self.low:.4g} to {self.high:.4g})"


def draw_samples(num_units: int, seed: int) -> np.ndarray:
    """(RESAMPLES, N) the units of every bootstrap sample; the same ones for all models that are compared."""
    return np.random.default_rng(seed).integers(num_units, size=(RESAMPLES, num_units))


def bootstrap(
    function: Callable[[np.ndarray], float], statistics: np.ndarray, draws: np.ndarray
) -> np.ndarray:
    """(R,) the score of every sample of units, from the statistics (N, ...) of the units."""
    return np.array([function(statistics[draw]) for draw in draws])


def bootstrap_interval(value: float, samples: np.ndarray, num_units: int, unit: str) -> Metric:
    """The expanded percentile interval of a score.

    Of n units the plain percentile interval is too narrow by about sqrt((n - 1) / n) and by what Student's t
    has beyond the normal distribution; the quantiles are moved outwards by both (Hesterberg, "What Teachers
    Should Know About the Bootstrap", The American Statistician 69, 2015).

    Args:
        value: the score of all units.
        samples: (R,) the scores of the bootstrap samples.
        num_units: N.
        unit: what they are, in the plural.
    """
    if num_units < MIN_UNITS:
        need = f"it takes at least {MIN_UNITS} {unit}"
        return Metric(value, note=f"no interval: {need}, the data give {num_units}")
    if np.ptp(samples) <= 1e-12 * abs(value):
        return Metric(value, note=f"no interval: it does not vary over the {num_units} {unit}")
    level = outer_level(num_units)
    low, high = (float(q) for q in np.quantile(samples, (level, 1 - level)))
    return Metric(value, low, high)


def outer_level(num_units: int) -> float:
    """The lower quantile of an expanded percentile interval of n units: Phi(-sqrt(n / (n - 1)) t)."""
    return NormalDist().cdf(-sqrt(num_units / (num_units - 1)) * _student(num_units - 1))


def _student(degrees: int) -> float:
    """Student's t with 2.5 % beyond it, to 1e-3 from 9 degrees of freedom (Abramowitz and Stegun, 26.7.5)."""
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / degrees**power for power, term in enumerate(terms))


def rate_interval(hits: np.ndarray) -> Metric:
    """Wilson's interval (1927) of a rate, from outcomes (N,) that are 0 or 1; they may be all alike."""
    n, rate, z = len(hits), float(hits.mean()), NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    centre = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2))
    # Of no hits, or of all, one end is the rate itself, but for rounding.
    return Metric(rate, min(max(centre - half, 0.0), rate), max(min(centre + half, 1.0), rate))


def notes(*found: Mapping[str, Metric] | None) -> list[str]:
    """Why values or intervals are missing: one sentence per reason, with the names of the scores."""
    reasons: dict[str, dict[str, None]] = {}
    for metrics in filter(None, found):
        for name, metric in metrics.items():
            if metric.note:
                reasons.setdefault(metric.note, {})[name] = None
    return [f"{', '.join(names)}: {reason}." for reason, names in reasons.items()]
