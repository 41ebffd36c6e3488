"""Cross-entropy against numpy, in sums that add up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.tasks.losses import cross_entropy, divergence, linear_cross_entropy

B, T, D, V = 3, 7, 5, 11
SETTINGS = [(0.0, 0.0), (0.1, 0.0), (0.0, 0.01), (0.2, 0.05)]


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    features, table = rng.normal(size=(B, T, D)).astype(np.float32), rng.normal(size=(V, D)).astype(np.float32)
    logits = features @ table.T
    targets = rng.integers(0, V, (B, T)).astype(np.int32)
    targets[1] = logits[1].argmax(-1)  # so that some are right
    targets[0, :3], targets[2, 3:] = -1, -100
    return features, table, targets, logits


def by_hand(logits, targets, smoothing, z_loss):
    objective = loss = correct = count = 0
    for row, target in zip(logits.reshape(-1, V).astype(np.float64), targets.reshape(-1), strict=True):
        if target < 0:
            continue
        log_z = np.log(np.exp(row).sum())
        wanted = np.full(V, smoothing / V)
        wanted[target] += 1 - smoothing
        objective += -(wanted * (row - log_z)).sum() + z_loss * log_z**2
        loss += log_z - row[target]
        correct += row.argmax() == target
        count += 1
    return objective, loss, correct, count


@pytest.mark.parametrize(("smoothing", "z_loss"), SETTINGS)
def test_cross_entropy_equals_its_formula(case, smoothing, z_loss):
    _, _, targets, logits = case
    expected = by_hand(logits, targets, smoothing, z_loss)
    assert T <= expected[2] < expected[3] == B * T - 7
    np.testing.assert_allclose(cross_entropy(logits, targets, smoothing, z_loss), expected, rtol=1e-5)


def test_the_gradient_is_the_softmax_less_the_target_and_0_where_ignored(case):
    _, _, targets, logits = case
    got = jax.grad(lambda x: cross_entropy(x, targets).objective)(jnp.asarray(logits))
    share = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = (share - np.eye(V)[np.maximum(targets, 0)]) * (targets >= 0)[..., None]
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_large_logits_do_not_overflow():
    scores = cross_entropy(jnp.array([[1e4, -1e4, 0.0]]), jnp.array([1]), 0.1, 1e-4)
    assert scores.loss == pytest.approx(2e4)
    assert np.isfinite(scores.objective)


def test_of_equal_logits_the_first_is_chosen():
    targets = jnp.array([[0, 1, 2, 0, -1]])
    assert int(cross_entropy(jnp.zeros((1, 5, 3)), targets).correct) == 2  # a model that knows nothing is not right
    logits = jnp.array([[0.0, 7.0, 7.0], [7.0, 0.0, 7.0], [jnp.nan, 7.0, 0.0]])
    assert [int(cross_entropy(logits[i], jnp.array(t)).correct) for i in range(3) for t in range(3)] == [
        0, 1, 0, 1, 0, 0, 0, 0, 0,
    ]  # fmt: skip


def test_sums_of_parts_add_to_the_whole(case):
    _, _, targets, logits = case
    whole = cross_entropy(logits, targets, 0.1, 0.01)
    parts = [cross_entropy(logits[i : i + 1], targets[i : i + 1], 0.1, 0.01) for i in range(B)]
    np.testing.assert_allclose(np.sum([np.array(p, np.float64) for p in parts], axis=0), np.array(whole), rtol=1e-5)
    assert [int(p.count) for p in parts] == [4, 7, 3], "the mean of the parts' means would be another number"


def test_nothing_to_predict_is_a_sum_of_0_of_0(case):
    _, _, targets, logits = case
    assert [float(x) for x in cross_entropy(logits, np.full_like(targets, -1), 0.1, 0.1)] == [0, 0, 0, 0]


@pytest.mark.parametrize("chunk", [2, 7, 32])
@pytest.mark.parametrize(("smoothing", "z_loss"), [SETTINGS[0], SETTINGS[-1]])
def test_chunks_of_logits_give_the_scores_and_gradients_of_the_whole(case, chunk, smoothing, z_loss):
    features, table, targets, _ = case

    def whole(h, w):
        scores = cross_entropy(h @ w.T, targets, smoothing, z_loss)
        return 0.5 * scores.objective, scores

    def chunked(h, w):
        scores = linear_cross_entropy(h, w, targets, smoothing, z_loss, chunk)
        return 0.5 * scores.objective, scores

    (_, expected), gradients = jax.value_and_grad(whole, (0, 1), has_aux=True)(features, table)
    (_, got), gradients2 = jax.jit(jax.value_and_grad(chunked, (0, 1), has_aux=True))(features, table)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    for a, b in zip(gradients2, gradients, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    plain = linear_cross_entropy(features, table, targets, smoothing, z_loss, chunk)
    np.testing.assert_allclose(plain, expected, rtol=1e-5)


def test_chunks_never_hold_all_logits():
    B, T, D, V = 4, 256, 16, 4096
    shapes = [jax.ShapeDtypeStruct(s, d) for s, d in (((B, T, D), "float32"), ((V, D), "float32"), ((B, T), "int32"))]

    def whole(features, unembedding, targets):
        return cross_entropy(jnp.einsum("btd,vd->btv", features, unembedding), targets).objective

    def pieces(features, unembedding, targets):
        return linear_cross_entropy(features, unembedding, targets).objective

    used = [
        jax.jit(jax.grad(fn, (0, 1))).lower(*shapes).compile().memory_analysis().temp_size_in_bytes
        for fn in (whole, pieces)
    ]
    logits = 4 * B * T * V
    assert used[0] >= logits, "the whole matrix of logits"
    assert used[1] < 0.5 * logits, used


def test_the_divergence_and_its_gradient_are_hintons():
    """T² KL, and so T (softmax(z / T) - softmax(v / T)) for each logit z; independent classes have a sigmoid each."""
    rng = np.random.default_rng(0)

    def softmax(x):
        x = np.exp(x - x.max(-1, keepdims=True))
        return x / x.sum(-1, keepdims=True)

    z, v = (2 * rng.normal(size=(3, 5, 7)) for _ in range(2))
    targets, T = np.where(rng.random((3, 5)) < 0.3, -1, 1), 4.0
    counts = (targets >= 0)[..., None]
    value, gradient = jax.value_and_grad(divergence)(jnp.array(z), jnp.array(v), jnp.array(targets), T)
    expected = T**2 * (softmax(v / T) * np.log(softmax(v / T) / softmax(z / T)) * counts).sum()
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, T * (softmax(z / T) - softmax(v / T)) * counts, atol=1e-5)

    known = np.where(rng.random((3, 7)) < 0.3, -1, 1.0)
    z, v = z[:, 0], v[:, 0]
    a, b = (1 / (1 + np.exp(-x / T)) for x in (z, v))
    value, gradient = jax.value_and_grad(divergence)(jnp.array(z), jnp.array(v), jnp.array(known), T)
    each = b * np.log(b / a) + (1 - b) * np.log((1 - b) / (1 - a))
    np.testing.assert_allclose(value, T**2 * (each * (known >= 0)).sum(), rtol=1e-5)
    np.testing.assert_allclose(gradient, T * (a - b) * (known >= 0), atol=1e-5)
