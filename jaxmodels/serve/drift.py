"""Statistics of drift: how far numbers and categories of one sample lie from those of another, and whether by chance.

Which test is taken follows evidently's rules: up to 1,000 rows of reference a p-value below 0.05 of Kolmogorov-Smirnov
for numbers, of χ² for categories, and of z where there are two; above, where the smallest difference is significant, a
distance of 0.1, of Wasserstein in standard deviations of the reference, or of Jensen-Shannon. Two things differ, so
that samples of the same data raise no more alarms than they should: the p-values of all tests are corrected (Holm
1979), and a distance counts only where its p-value does too, since small samples are far apart by chance.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats
from scipy.spatial import distance

FEW = 1000
"""Up to this many rows of reference a p-value decides alone."""
LEVEL = 0.05
"""The largest share of comparisons of the same data in which anything raises an alarm."""
FAR = 0.1
"""The distance from which on samples of more rows differ; and the stability index that is worth a look."""
SMALLEST = 5
"""A category with fewer expected rows is joined with others: the p-value of χ² is not exact for less."""
BINS = 10


@dataclass(frozen=True)
class Test:
    """One comparison of a reference and what came later."""

    name: str
    test: str
    """KS, χ², z, Wasserstein, Jensen-Shannon, or Fisher."""
    value: float
    """The test's statistic, or the distance."""
    p: float
    """The probability of so large a difference between samples of the same data, before the correction."""
    psi: float | None = None
    """Population stability index over tenths of the reference, or over categories."""
    corrected: float = 1.0
    """The p-value, corrected for the number of tests."""
    alarm: bool = False


def numbers(name: str, reference: np.ndarray, current: np.ndarray) -> Test:
    """Compare two samples of numbers (N,) and (M,)."""
    found: Any = stats.ks_2samp(reference, current)
    psi = stability(*shares(reference, current))
    if len(reference) <= FEW:
        return Test(name, "KS", float(found.statistic), float(found.pvalue), psi)
    spread = max(float(np.std(reference)), 1e-12)
    apart = stats.wasserstein_distance(reference, current) / spread
    return Test(name, "Wasserstein", float(apart), float(found.pvalue), psi)


def categories(name: str, reference: np.ndarray, current: np.ndarray) -> Test:
    """Compare how often each category occurs, (K,) counts in each of two samples."""
    counts = np.stack([reference, current])[:, (reference + current) > 0].astype(float)
    first, second = (row / max(row.sum(), 1) for row in counts)
    value, p = chi_squared(counts)
    psi = stability(first, second)
    if reference.sum() > FEW:
        return Test(name, "Jensen-Shannon", float(distance.jensenshannon(first, second)), p, psi)
    if counts.shape[1] == 2:
        return Test(name, "z", float(np.sqrt(value)), p, psi)
    return Test(name, "χ²", value, p, psi)


def rates(name: str, reference: tuple[int, int], current: tuple[int, int], worse: str = "two-sided") -> Test:
    """Compare two rates, each as (how many, of how many), exactly; the value is the difference of the rates."""
    table = [[count, total - count] for count, total in (current, reference)]
    found: Any = stats.fisher_exact(table, alternative=worse)
    shares = [count / max(total, 1) for count, total in (current, reference)]
    return Test(name, "Fisher", shares[0] - shares[1], float(found.pvalue))


def chi_squared(counts: np.ndarray) -> tuple[float, float]:
    """χ² and its p-value for counts (2, K), whose rarest categories are joined."""
    least = counts.sum(1).min() / max(counts.sum(), 1) * counts.sum(0)
    rare = least < SMALLEST
    if rare.sum() > 1:
        counts = np.concatenate([counts[:, ~rare], counts[:, rare].sum(1, keepdims=True)], 1)
    if counts.shape[1] < 2:
        return 0.0, 1.0
    found: Any = stats.chi2_contingency(counts, correction=False)
    return float(found.statistic), float(found.pvalue)


def shares(reference: np.ndarray, current: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The shares of both samples between the tenths of the reference, of which equal ones are one."""
    edges = np.unique(np.quantile(reference, np.linspace(0, 1, BINS + 1)[1:-1]))
    places = (np.searchsorted(edges, x, side="left") for x in (reference, current))
    first, second = (np.bincount(at, minlength=len(edges) + 1) / len(at) for at in places)
    return first, second


def stability(reference: np.ndarray, current: np.ndarray) -> float:
    """Population stability index of two distributions over the same bins: the sum of (c - r) · log(c / r)."""
    first, second = (np.maximum(x, 1e-4) for x in (reference, current))
    return float(((second - first) * np.log(second / first)).sum())


def decided(tests: Sequence[Test]) -> list[Test]:
    """The tests with corrected p-values, and which of them raise an alarm (Holm 1979)."""
    order = sorted(range(len(tests)), key=lambda i: tests[i].p)
    found, so_far = list(tests), 0.0
    for place, i in enumerate(order):
        so_far = min(1.0, max(so_far, tests[i].p * (len(tests) - place)))
        near = tests[i].test in ("Wasserstein", "Jensen-Shannon") and tests[i].value < FAR
        found[i] = dataclasses.replace(tests[i], corrected=so_far, alarm=so_far < LEVEL and not near)
    return found


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Expected calibration error over ten equal bins of the confidence (Guo et al. 2017, equation 5)."""
    _, rows, sure, share = reliability(confidence, right)
    return float((rows * np.abs(sure - share)).sum() / max(rows.sum(), 1))


def reliability(confidence: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, ...]:
    """Of each bin of the confidence that has rows: its index, its rows, their mean confidence, and the right share."""
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    rows = np.bincount(place, minlength=BINS)
    sums = [np.bincount(place, x, minlength=BINS) for x in (confidence, right.astype(float))]
    held = np.flatnonzero(rows)
    return held, rows[held], sums[0][held] / rows[held], sums[1][held] / rows[held]
