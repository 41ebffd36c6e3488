"""What a classifier is judged by: equal to scikit-learn's, whatever the batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from sklearn import metrics as sklearn

from jaxmodels.tasks import metrics
from jaxmodels.tasks.task import divide, perplexity

CLASSES = 8
NAMES = ("precision", "recall", "f1")


def draw(rows=200, missing=(), seed=0):
    """Scores that are right more often than not, and labels without some classes."""
    rng = np.random.default_rng(seed)
    labels = rng.choice([c for c in range(CLASSES) if c not in missing], rows).astype(np.int32)
    logits = rng.normal(size=(rows, CLASSES)).astype(np.float32)
    logits[np.arange(rows), labels] += 1.5
    logits[:, list(missing)] -= 50
    return logits, labels


@jax.jit
def single(logits, labels):
    return metrics.single(logits, labels)


@jax.jit
def multiple(logits, labels):
    return metrics.multiple(logits, labels)


def whole(measure, logits, labels, size=None):
    """Metrics of a set seen in batches of `size`, the last one filled up with ignored rows."""
    size = size or len(logits)
    more = -len(logits) % size
    logits = np.concatenate([logits, np.ones((more, CLASSES), np.float32)])
    labels = np.concatenate([labels, np.full((more, *labels.shape[1:]), -1, labels.dtype)])
    totals = None
    for i in range(0, len(logits), size):
        sums = jax.tree.map(lambda x: np.asarray(x, np.float64), measure(logits[i : i + size], labels[i : i + size]))
        totals = sums if totals is None else jax.tree.map(np.add, totals, sums)
    return metrics.summarize(totals)


def judged(actual, chosen, classes=None):
    """The same by scikit-learn."""
    found = {}
    for average in ("macro", "micro", None):
        labels = range(CLASSES) if average is None else classes
        values = sklearn.precision_recall_fscore_support(
            actual, chosen, average=average, zero_division=0, labels=labels
        )
        for name, value in zip(NAMES, values, strict=False):
            if average is None:
                found |= {f"{name}/{k}": float(v) for k, v in enumerate(value)}
            else:
                found[name if average == "macro" else f"{name}_micro"] = float(value)
    return found


@pytest.mark.parametrize("missing", [(), (2, 5)], ids=["all classes", "two that never occur"])
def test_one_class_an_example_equals_scikit_learn(missing):
    logits, labels = draw(missing=missing)
    found, expected = whole(single, logits, labels), judged(labels, logits.argmax(1))
    assert 0.5 < expected["f1"] < 1
    absent = {f"{name}/{k}" for name in NAMES for k in missing}
    assert not absent & set(found), "a class that is nowhere has no metric, not 0"
    for name in set(expected) - absent:
        assert found[name] == pytest.approx(expected[name], abs=1e-12), name
    assert found["precision_micro"] == pytest.approx(sklearn.accuracy_score(labels, logits.argmax(1)))
    top5 = sklearn.top_k_accuracy_score(labels, logits, k=5, labels=range(CLASSES))
    assert found["top5"] == pytest.approx(top5) and top5 < 1


def test_a_class_that_is_only_chosen_counts_in_the_macro_mean():
    logits = np.eye(CLASSES, dtype=np.float32)[[0, 0, 1, 3]] * 9
    labels = np.array([0, 0, 1, 1], np.int32)
    assert whole(single, logits, labels)["f1"] == pytest.approx(judged(labels, logits.argmax(1))["f1"]) != 1


def test_calibration_error_is_that_of_a_plain_loop():
    logits, labels = draw(seed=3)
    p = np.exp(np.float64(logits))
    p /= p.sum(1, keepdims=True)
    expected = 0.0
    for k in range(15):
        rows = [i for i in range(len(p)) if k / 15 < p[i].max() <= (k + 1) / 15]
        if rows:
            confidence = sum(p[i].max() for i in rows) / len(rows)
            right = sum(p[i].argmax() == labels[i] for i in rows) / len(rows)
            expected += len(rows) / len(p) * abs(confidence - right)
    found = whole(single, logits, labels)["calibration_error"]
    assert found == pytest.approx(expected, rel=1e-5) and found > 0.01


@pytest.mark.parametrize("empty", [False, True], ids=["all classes", "one that neither occurs nor is chosen"])
def test_several_classes_an_example_equals_scikit_learn(empty):
    rng = np.random.default_rng(1)
    labels = (rng.random((150, CLASSES)) < 0.3).astype(np.float32)
    logits = (rng.normal(size=labels.shape) + 3 * labels - 1.5).astype(np.float32)
    if empty:
        labels[:, 4], logits[:, 4] = 0, -1
    found = whole(multiple, logits, labels)
    for name, value in judged(labels, logits > 0).items():
        assert found[name] == pytest.approx(value, abs=1e-12), name
    exact = sklearn.accuracy_score(labels, logits > 0)
    assert found["accuracy"] == pytest.approx(exact) and 0 < exact < 1
    assert "calibration_error" not in found and "top5" not in found


@pytest.mark.parametrize("measure", [single, multiple])
def test_batches_and_rows_that_fill_them_up_change_nothing(measure):
    logits, labels = draw()
    if measure is multiple:
        labels = np.eye(CLASSES, dtype=np.float32)[labels]
    expected = whole(measure, logits, labels)
    assert whole(measure, logits, labels, 64) == pytest.approx(expected, rel=1e-6)


def test_nothing_seen_has_no_metric_and_names_of_classes_are_used():
    logits, labels = draw()
    nothing = whole(single, logits, np.full(len(labels), -1, np.int32))
    assert nothing == {}
    named = metrics.summarize(jax.tree.map(np.asarray, single(logits, labels)), ["cat", "dog"])
    assert {"f1/cat", "f1/dog", "f1/2"} <= set(named) and "f1/0" not in named


def test_five_classes_have_no_top_five_and_a_thousand_no_metrics_of_single_ones():
    assert "top5" not in metrics.single(jnp.zeros((1, 5)), jnp.zeros(1, int))
    many = metrics.summarize({"counts": (np.ones((1000, 3)), 1.0)})
    assert many["f1"] == pytest.approx(0.5) and not any("/" in name for name in many)


def test_the_inception_score_is_1_for_equal_rows_and_the_number_of_classes_for_all_in_turn():
    equal = np.tile(np.random.default_rng(0).dirichlet(np.ones(10)), (50, 1))
    assert metrics.inception_score(equal) == pytest.approx(1)
    assert metrics.inception_score(np.eye(10)[np.arange(50) % 10]) == pytest.approx(10)
    assert metrics.inception_score(np.eye(10)[np.arange(48) % 4]) == pytest.approx(4)


@pytest.mark.parametrize(
    ("classes", "names"),
    [
        (("1", "2", "3"), ["1", "2", "3 (2)", "3 (3)"]),  # the fourth class has no name but its number
        (("a", "a", "b", "c"), ["a (0)", "a (1)", "b", "c"]),
        (("a", "a", "a (1)", "c"), ["a (0)", "a (1) (1)", "a (1) (2)", "c"]),
        ((), ["0", "1", "2", "3"]),
    ],
)
def test_no_two_classes_share_a_metric(classes, names):
    counts = np.array([[1, 0, 0], [0, 1, 0], [2, 1, 1], [3, 0, 3]], float)
    found = metrics.summarize({"loss": (8.0, 4.0), "counts": (counts, 4.0)}, classes)
    assert [name.removeprefix("recall/") for name in found if name.startswith("recall/")] == names
    assert [found[f"recall/{name}"] for name in names] == [1, 0, 2 / 3, 0.5]
    assert found["loss"] == 2


def test_a_mean_over_nothing_is_no_metric_and_a_perplexity_beyond_all_numbers_neither():
    assert divide({"loss": (3.0, 2.0), "bits_per_byte": (3.0, 0.0)}) == {"loss": 1.5}
    assert perplexity({"loss": (709.0, 1.0)})["perplexity"] == pytest.approx(np.exp(709.0))
    assert perplexity({"loss": (710.0, 1.0)}) == {"loss": 710.0}


def test_logits_that_are_all_alike_choose_one_class_and_those_that_are_no_numbers_are_never_right():
    labels = jnp.arange(CLASSES)
    alike, none = (metrics.single(jnp.full((CLASSES, CLASSES), value), labels) for value in (0.0, jnp.nan))
    assert int(alike["accuracy"][0]) == int(alike["counts"][0][:, 0].sum()) == 1
    assert int(none["top5"][0]) == 0


def test_a_class_of_which_an_example_says_nothing_counts_neither_way():
    """The second class of the first example and all of the third are unknown."""
    logits = np.array([[2.0, 3.0, -1.0], [2.0, -1.0, 1.0], [1.0, 1.0, 1.0]], np.float32)
    labels = np.array([[1, -1, 0], [1, 1, 1], [-1, -1, -1]], np.float32)
    found = multiple(logits, labels)
    assert np.asarray(found["counts"][0]).tolist() == [[2, 0, 0], [0, 0, 1], [1, 0, 0]]
    assert [int(x) for x in found["accuracy"]] == [1, 2]


def test_the_frechet_distance_is_that_of_scipys_matrix_root():
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(200, 5)), 0.3 + rng.normal(size=(150, 5)) @ rng.normal(size=(5, 5))
    a, b = np.cov(one.T), np.cov(other.T)
    apart = np.square(one.mean(0) - other.mean(0)).sum()
    expected = apart + np.trace(a + b - 2 * scipy.linalg.sqrtm(a @ b).real)
    assert metrics.frechet_distance(one, other) == pytest.approx(expected, rel=1e-9)
    assert metrics.frechet_distance(one, one[::-1]) == pytest.approx(0, abs=1e-9)
    assert metrics.frechet_distance(one, one + 2) == pytest.approx(5 * 4)
    flat = one * [1, 1, 0, 0, 0]  # features that never vary, of which a plain root has an imaginary part
    assert metrics.frechet_distance(flat, 3 * flat) == pytest.approx(
        np.square(2 * flat.mean(0)).sum() + 4 * np.trace(np.cov(flat.T))
    )
