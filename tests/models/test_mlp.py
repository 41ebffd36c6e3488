"""The multilayer perceptron against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmodels
from jaxmodels.errors import UserError
from jaxmodels.models.mlp import MLPConfig

CONFIG = MLPConfig(input_shape=(3, 2, 2), classes=5, hidden=(8, 7))


@pytest.fixture(scope="module")
def case():
    model = jaxmodels.create(CONFIG)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), model.shapes())
    return model, params, jnp.asarray(rng.normal(size=(4, 3, 2, 2)), jnp.float32)


def by_hand(params, x):
    x = np.asarray(x).reshape(len(x), -1)
    for name in ("hidden0", "hidden1"):
        x = np.maximum(x @ params[name]["w"] + params[name]["b"], 0)
    return x @ params["head"]["w"] + params["head"]["b"]


def test_logits_equal_products_and_relus(case):
    model, params, x = case
    logits = model.apply(params, x)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, by_hand(params, x), rtol=1e-4, atol=1e-4)


def test_bfloat16_is_float32_to_within_its_rounding(case):
    _, params, x = case
    logits, exact = jaxmodels.create(CONFIG, dtype="bfloat16").apply(params, x), by_hand(params, x)
    assert logits.dtype == jnp.float32
    assert 0 < np.abs(logits - exact).max() < 2**-5 * np.abs(exact).max()


def test_no_hidden_layer_is_a_linear_classifier():
    model = jaxmodels.create(CONFIG, hidden=())
    assert model.count() == 12 * 5 + 5


def test_size_on_mnist():
    assert jaxmodels.create("mlp-mnist").count() == 784 * 512 + 512 + 512 * 512 + 512 + 512 * 10 + 10


def test_dropout_happens_in_training_only_and_is_a_function_of_the_key(case):
    _, params, x = case
    model = jaxmodels.create(CONFIG, dropout=0.5)
    np.testing.assert_allclose(model.apply(params, x), by_hand(params, x), rtol=1e-4, atol=1e-4)
    one, same, other = (model.apply(params, x, train=True, rng=jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 0.1


def test_initial_weights_follow_he_and_biases_are_0():
    init = jaxmodels.create(CONFIG, hidden=(256, 256)).init
    params = jax.jit(init, compiler_options={"xla_backend_optimization_level": 0})(jax.random.key(0))
    for name, inputs in (("hidden0", 12), ("hidden1", 256)):
        assert np.std(params[name]["w"]) == pytest.approx(np.sqrt(2 / inputs), rel=0.05)
        assert not np.any(params[name]["b"])


def test_inputs_of_another_shape_are_refused(case):
    model, params, _ = case
    with pytest.raises(UserError, match=r"got inputs of shape \(28, 28, 1\), expected \(3, 2, 2\), try --model"):
        model.apply(params, jnp.zeros((4, 28, 28, 1)))
