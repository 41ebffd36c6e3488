"""ArcFace's margin equals its formula; AUC and accepted pairs are scikit-learn's, whatever the batches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics as sklearn

from jaxmodels import tasks
from jaxmodels.config import Stdlib, Verification
from jaxmodels.errors import UserError
from jaxmodels.models.cnn import CNNConfig
from jaxmodels.models.gpt2 import GPT2Config
from jaxmodels.tasks.verification import angular, sums

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def test_the_margin_is_added_to_the_angle_of_the_own_class_alone():
    cosines = np.linspace(-0.999, 0.999, 24, dtype=np.float32).reshape(6, 4)
    labels, margin = np.array([0, 3, 1, 2, -1, 0]), 0.5
    expected = cosines.copy()
    for row, label in enumerate(labels):
        if label >= 0:
            angle = np.arccos(cosines[row, label])
            beyond = angle + margin > np.pi
            expected[row, label] = np.cos(angle) - margin * np.sin(margin) if beyond else np.cos(angle + margin)
    np.testing.assert_allclose(jit(angular, static_argnums=2)(cosines, labels, margin), expected, atol=1e-5)
    assert np.isfinite(jax.grad(lambda c: angular(c, labels, margin).sum())(jnp.ones((6, 4)))).all()


def test_a_margin_beyond_half_a_turn_is_refused():
    with pytest.raises(UserError, match=r"got task\.margin 4\.0, expected below 3\.14"):
        Verification(margin=4.0)


def pairs(ties):
    rng = np.random.default_rng(0)
    labels = rng.integers(-1, 5, 60)
    embeddings = rng.normal(size=(60, 6)) + 1.2 * rng.normal(size=(5, 6))[np.maximum(labels, 0)]
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    if ties:
        embeddings[30:40] = embeddings[:10]
    return embeddings.astype(np.float32), labels


@pytest.mark.parametrize("ties", [False, True])
def test_auc_and_accepted_pairs_are_those_of_scikit_learn(ties):
    embeddings, labels = pairs(ties)
    zero = np.zeros(60, np.float32)
    found = sums(embeddings, labels, zero, zero, np)
    seen = labels >= 0
    first, second = np.triu_indices(seen.sum(), 1)
    similar = (embeddings[seen] @ embeddings[seen].T)[first, second]
    same = labels[seen][first] == labels[seen][second]
    rates = sklearn.roc_curve(same, similar, drop_intermediate=False)
    expected = {"auc": sklearn.roc_auc_score(same, similar), "tar": rates[1][rates[0] <= 0.01].max()}
    assert {name: found[name][0] / found[name][1] for name in expected} == pytest.approx(expected, abs=1e-4)
    on_device = jit(functools.partial(sums, xp=jnp))(embeddings, labels, zero, zero)
    for name, (total, count) in on_device.items():
        assert float(total) == pytest.approx(float(found[name][0]), abs=1.5) and float(count) == float(found[name][1])
    alone = sums(embeddings, np.arange(60), zero, zero, np)
    assert alone["auc"][1] == alone["tar"][1] == 0, "without a pair of one class there is no rate"


def test_a_model_learns_directions_and_predicts_embeddings_of_length_one():
    config = CNNConfig((8, 8, 1), 4, (4,), (8,))
    task = tasks.build(Verification(), config, Stdlib())
    params = jit(task.init)(jax.random.key(0))
    rng = np.random.default_rng(0)
    batch = {"inputs": rng.integers(0, 256, (6, 8, 8, 1), np.uint8), "labels": np.array([0, 1, 2, 3, -1, 0])}
    (total, aux), grads = jit(jax.value_and_grad(task.losses[0].fn, has_aux=True))(params, {}, batch, jax.random.key(1))
    assert int(aux.weight) == 5 and float(jnp.abs(grads["model"]["head"]["w"]).max()) > 0
    found = jit(task.predicts)(params, {}, {"inputs": batch["inputs"]})["embedding"]
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    directions = np.array(params["model"]["head"]["w"])
    directions /= np.linalg.norm(directions, axis=0)
    logits = 16 * np.asarray(angular(jnp.asarray(found @ directions), batch["labels"], 0.5), np.float64)
    likely = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    seen = batch["labels"] >= 0
    assert float(total) == pytest.approx(-likely[seen, batch["labels"][seen]].sum(), rel=1e-4)
    with pytest.raises(UserError, match="got task verification with GPT2Config, expected a classifier of images"):
        tasks.build(Verification(), GPT2Config(16, 8, layers=1, width=8, heads=2), Stdlib())
