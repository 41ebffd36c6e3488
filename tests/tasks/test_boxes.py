"""Boxes: overlaps, which anchor finds which object, and which boxes are told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.tasks import boxes
from jaxmodels.tasks.average_precision import average_precisions, matched, overlaps

SIZE = 64


def drawn(rng, *shape, least=4.0, most=30.0):
    """Boxes inside an image of SIZE."""
    low = rng.uniform(0, SIZE - most, (*shape, 2))
    return np.concatenate([low, low + rng.uniform(least, most, (*shape, 2))], -1).astype(np.float32)


def grid():
    """Anchors of strides 8 and 16: centers and strides."""
    found = []
    for stride in (8, 16):
        y, x = np.divmod(np.arange((SIZE // stride) ** 2), SIZE // stride)
        found.append(np.stack([(x + 0.5) * stride, (y + 0.5) * stride, np.full(len(x), stride)], -1))
    return np.concatenate(found).astype(np.float32)


def sigmoid(x):
    return 1 / (1 + np.exp(-x.astype(np.float64)))


def simota(predicted, objectness, classes, anchors, truth, labels):
    """SimOTA by loops, from the paper's description: each anchor's object or -1."""
    real = np.flatnonzero(labels >= 0)
    cost, overlap, usable = {}, {}, set()
    for g in real:
        (left, top, right, bottom), name = truth[g], labels[g]
        for a, (x, y, stride) in enumerate(anchors):
            inside = left < x < right and top < y < bottom
            near = abs(x - (left + right) / 2) < 2.5 * stride and abs(y - (top + bottom) / 2) < 2.5 * stride
            usable |= {a} if inside or near else set()
            overlap[g, a] = overlaps(predicted[a : a + 1], truth[g : g + 1])[0, 0]
            p = np.sqrt(sigmoid(classes[a]) * sigmoid(objectness[a]))
            right_class = np.arange(len(p)) == name
            cost[g, a] = -np.log(np.where(right_class, p, 1 - p)).sum() - 3 * np.log(overlap[g, a] + 1e-8)
            cost[g, a] += 0 if inside and near else 1e5
    asked = {}
    for g in real:
        best = sorted((overlap[g, a] for a in usable), reverse=True)[:10]
        count = max(1, int(sum(best)))
        for a in sorted(usable, key=lambda a: cost[g, a])[:count]:
            asked.setdefault(a, []).append(g)
    found = np.full(len(anchors), -1)
    for a, who in asked.items():
        found[a] = who[0] if len(who) == 1 else min(real, key=lambda g: cost[g, a])
    return found


@pytest.fixture(scope="module")
def assign():
    return jax.jit(jax.vmap(boxes.assign, in_axes=(0, 0, 0, None, 0, 0)))


def test_anchors_are_given_the_objects_that_simota_by_loops_gives_them(assign):
    rng, anchors = np.random.default_rng(0), grid()
    images, count = 6, len(anchors)
    truth = drawn(rng, images, 7)
    truth[:, 1] = truth[:, 0] + 1  # two that compete for the same anchors
    labels = rng.integers(0, 3, (images, 7))
    labels[0, 4:], labels[1] = -1, -1
    of = rng.integers(0, 7, (images, count))
    predicted = np.take_along_axis(truth, of[..., None], 1) + rng.normal(0, 3, (images, count, 4)).astype(np.float32)
    objectness, classes = rng.normal(size=(images, count)), rng.normal(size=(images, count, 3))
    given = [np.asarray(x, np.float32) for x in (predicted, objectness, classes)]
    chosen, overlap = map(np.asarray, assign(*given, anchors, truth, labels))
    for i in range(images):
        expected = simota(given[0][i], given[1][i], given[2][i], anchors, truth[i], labels[i])
        np.testing.assert_array_equal(chosen[i], expected)
        for a in np.flatnonzero(expected >= 0):
            true = overlaps(given[0][i, a : a + 1], truth[i, expected[a]][None])[0, 0]
            assert overlap[i, a] == pytest.approx(true, abs=1e-5)
    assert (chosen[1] == -1).all() and (chosen[0] >= 4).sum() == 0, "where there is no object, none is given"
    assert all(set(chosen[i]) - {-1} == set(range(7)) for i in range(2, images)), "each object has an anchor"


def test_an_object_no_anchor_fits_costs_no_nan(assign):
    """Boxes without an area, and predictions as far from all as numbers are."""
    anchors = grid()
    truth = np.zeros((1, 7, 4), np.float32)
    truth[0, 0] = (3, 3, 3, 3)
    predicted, large = np.zeros((1, len(anchors), 4), np.float32), np.full((1, len(anchors)), -1e4, np.float32)
    labels = np.array([[0, *[-1] * 6]])
    chosen, overlap = assign(predicted, large, large[..., None].repeat(3, -1), anchors, truth, labels)
    assert np.isfinite(overlap).all() and (np.asarray(chosen) == 0).sum() == 1


def test_suppression_keeps_what_greedy_suppression_keeps():
    rng = np.random.default_rng(1)
    where, classes = drawn(rng, 60), rng.integers(0, 2, 60)
    expected = []
    for i in range(60):
        rivals = [j for j in expected if classes[j] == classes[i]]
        if not rivals or overlaps(where[i : i + 1], where[rivals]).max() <= 0.3:
            expected.append(i)
    found = np.flatnonzero(jax.jit(boxes.kept, static_argnums=2)(where, classes, 0.3))
    assert 10 < len(expected) < 50
    np.testing.assert_array_equal(found, expected)


def test_boxes_are_told_by_falling_score_and_filled_up():
    outputs = np.full((1, 6, 7), -8.0, np.float32)
    outputs[0, :, :4] = [[0, 0, 8, 8], [1, 0, 8, 8], [20, 20, 30, 30], [0, 0, 8, 8], [40, 0, 50, 9], [0, 40, 9, 50]]
    outputs[0, [0, 1, 2, 3], 4] = [2, 3, 4, 1]
    outputs[0, [0, 1, 2], 5], outputs[0, 3, 6] = 5, 5
    found = boxes.tell(jnp.asarray(outputs), 0.5, 0.01, 8)
    np.testing.assert_array_equal(
        found.classes, [[0, 0, 1, *[-1] * 5]], "the second box of class 0 is kept, not the first"
    )
    np.testing.assert_array_equal(found.boxes[0, :3], outputs[0, [2, 1, 3], :4])
    each = sigmoid(np.array([4, 3, 1])) * sigmoid(np.array(5.0))
    np.testing.assert_allclose(found.scores[0], [*each, *[0] * 5], rtol=1e-5)


def test_overlaps_are_areas_over_areas():
    a, b = np.array([0, 0, 4, 4.0]), np.array([[2, 2, 6, 6.0], [0, 0, 4, 4], [8, 0, 12, 4], [3, 3, 3, 3]])
    np.testing.assert_allclose(boxes.overlaps(a, b), [4 / 28, 1, 0, 0])
    np.testing.assert_allclose(overlaps(a[None], b)[0], [4 / 28, 1, 0, 0])
    np.testing.assert_allclose(boxes.generalized(a, b), [4 / 28 - 8 / 36, 1, -(48 - 32) / 48, 0], atol=1e-6)


def test_a_better_box_takes_the_object_first():
    truth = np.array([[0, 0, 10, 10.0]])
    found = matched(np.array([[0, 0, 10, 6.0], [0, 0, 10, 10]]), truth, np.array([0.5, 0.75]))
    np.testing.assert_array_equal(found, [[0, -1], [-1, 0]])


def test_average_precision_of_a_hit_and_a_miss_is_that_by_hand():
    """Two objects, of which the second-best box finds one: precision 1/2 up to a recall of 1/2, 51 of 101 places."""
    found = {
        "boxes": np.array([[[50, 50, 60, 60], [0, 0, 10, 10.0]]]),
        "scores": np.array([[0.9, 0.8]]),
        "classes": np.array([[0, 0]]),
        "truth": np.array([[[0, 0, 10, 10], [20, 0, 30, 10.0]]]),
        "labels": np.array([[0, 0]]),
    }
    got = average_precisions(found, 2)
    np.testing.assert_allclose(got[0], 51 / 101 / 2)
    assert np.isnan(got[1]).all(), "a class without an object has no precision"
