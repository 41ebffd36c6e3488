"""Statistics of drift are those of their definitions, and the same data raise no more alarms than they should."""

import numpy as np
import pytest
from scipy import stats

from jaxmodels.serve import drift
from jaxmodels.serve.monitor import compare
from jaxmodels.serve.window import Window


def test_numbers_are_compared_by_ks_up_to_1000_rows_and_by_wasserstein_above():
    rng = np.random.default_rng(0)
    for rows, name in ((1000, "KS"), (1001, "Wasserstein")):
        reference, current = rng.normal(size=rows), rng.normal(0.3, 1.2, 400)
        found = drift.numbers("x", reference, current)
        both = np.sort(np.concatenate([reference, current]))
        first, second = (np.searchsorted(np.sort(x), both, side="right") / len(x) for x in (reference, current))
        wanted = np.abs(first - second).max()
        assert found.test == name and found.p == pytest.approx(stats.ks_2samp(reference, current).pvalue, rel=1e-6)
        if name == "Wasserstein":  # the area between the distribution functions, in standard deviations
            wanted = (np.abs(first - second)[:-1] * np.diff(both)).sum() / reference.std()
        assert found.value == pytest.approx(wanted, rel=1e-6)


def test_categories_are_compared_by_z_or_chi_squared_and_above_1000_rows_by_jensen_shannon():
    counts = np.array([300.0, 500, 100]), np.array([200.0, 180, 120])
    found = drift.categories("x", *counts)
    whole = np.stack(counts)
    expected = whole.sum(1, keepdims=True) * whole.sum(0) / whole.sum()
    value = ((whole - expected) ** 2 / expected).sum()
    assert (found.test, found.value) == ("χ²", pytest.approx(value, rel=1e-6))
    assert found.p == pytest.approx(stats.chi2.sf(value, 2), rel=1e-6)
    two = drift.categories("x", counts[0][:2], counts[1][:2])
    (a, b), (n, m) = (300, 200), (800, 380)
    z = (a / n - b / m) / np.sqrt((a + b) / (n + m) * (1 - (a + b) / (n + m)) * (1 / n + 1 / m))
    assert two.test == "z" and two.value == pytest.approx(abs(z), rel=1e-6)
    assert two.p == pytest.approx(2 * stats.norm.sf(abs(z)), rel=1e-6)
    many = drift.categories("x", 10 * counts[0], counts[1])
    p, q = (x / x.sum() for x in counts)
    middle = (p + q) / 2
    divergence = ((p * np.log(p / middle)).sum() + (q * np.log(q / middle)).sum()) / 2
    assert (many.test, many.value) == ("Jensen-Shannon", pytest.approx(np.sqrt(divergence), rel=1e-6))
    assert many.psi == pytest.approx(((q - p) * np.log(q / p)).sum(), rel=1e-6)


def test_a_class_that_one_side_lacks_and_rare_ones_are_counted():
    assert drift.categories("x", np.array([50, 0, 50]), np.array([0, 0, 100])).p < 1e-9
    joined, p = drift.chi_squared(np.array([[90.0, 4, 3, 3], [90.0, 3, 4, 3]]))
    assert joined == pytest.approx(0) and p == pytest.approx(1)
    assert drift.categories("x", np.array([100, 0]), np.array([30, 0])).p == 1


def test_p_values_are_corrected_as_holm_does():
    tests = [drift.Test(str(i), "KS", 0.1, p) for i, p in enumerate((0.04, 0.01, 0.03, 0.005))]
    found = drift.decided(tests)
    assert [test.corrected for test in found] == pytest.approx([0.06, 0.03, 0.06, 0.02])
    assert [test.alarm for test in found] == [False, True, False, True]


def test_a_distance_that_is_small_raises_no_alarm_however_sure_it_is():
    reference = np.random.default_rng(0).normal(size=5000)
    near, far = (drift.numbers("x", reference, reference + shift) for shift in (0.09, 0.2))
    assert near.p < 0.01 and [test.alarm for test in drift.decided([near])] == [False]
    assert [test.alarm for test in drift.decided([far])] == [True]


def test_a_calibration_error_is_the_mean_gap_of_its_bins():
    confidence, right = np.array([0.95, 0.95, 0.65, 1.0]), np.array([True, False, True, True])
    wanted = (3 * abs((0.95 + 0.95 + 1.0) / 3 - 2 / 3) + abs(0.65 - 1)) / 4
    assert drift.calibration_error(confidence, right) == pytest.approx(wanted)


def drawn(rng, rows, bias=0.0):
    """A window of a classifier that is right in nine of ten cases."""
    labels = rng.integers(0, 5, rows)
    said = np.where(rng.random(rows) < 0.9 - bias, labels, rng.integers(0, 5, rows))
    sure = rng.beta(8, 2, rows)
    probabilities = np.full((rows, 5), 0.0) + ((1 - sure) / 4)[:, None]
    probabilities[np.arange(rows), said] = sure
    features = {
        "normal": rng.normal(size=rows),
        "heavy": rng.standard_cauchy(rows),
        "whole": rng.poisson(3, rows).astype(float),  # many equal ones
    }
    groups = np.array(["a", "b"])[rng.integers(0, 2, rows)]
    return Window(features, probabilities, int(rng.binomial(rows, 0.02)), labels, groups)


def test_windows_of_the_same_data_raise_no_more_alarms_than_the_level():
    rng = np.random.default_rng(0)
    for reference, count in ((150, 250), (1001, 50)):
        alarms = [any(t.alarm for t in compare(drawn(rng, reference), drawn(rng, 80), 5)) for _ in range(count)]
        assert np.mean(alarms) <= drift.LEVEL, np.mean(alarms)


def test_a_classifier_that_is_less_often_right_raises_an_alarm_of_its_accuracy():
    rng = np.random.default_rng(0)
    found = {t.name: t for t in compare(drawn(rng, 800), drawn(rng, 400, bias=0.2), 5)}
    assert found["accuracy"].alarm and found["accuracy"].value < -0.1 and found["accuracy/a"].alarm
    better = {t.name: t for t in compare(drawn(rng, 800, bias=0.2), drawn(rng, 400), 5)}
    assert not better["accuracy"].alarm
