"""Variational autoencoders: two halves, and a code that is its mean, or drawn with a gradient."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmodels
from jaxmodels.errors import UserError
from jaxmodels.models.vae import VAEConfig

# at these shapes LLVM's optimizations take longer than all else
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
B, Z = 3, 4
CONFIGS = {
    "mlp": VAEConfig(input_shape=(8, 4, 1), hidden=(10, 9), latents=Z),
    "conv": VAEConfig(kind="conv", input_shape=(8, 4, 2), hidden=(5, 6), latents=Z),
}


@functools.cache
def prepare(name):
    model = jaxmodels.create(CONFIGS[name])
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype), model.shapes())
    images = jnp.asarray(rng.random((B, *CONFIGS[name].input_shape)), jnp.float32)
    return model, params, images, jit(model.apply, static_argnames="train")


@pytest.fixture(params=CONFIGS)
def case(request):
    return prepare(request.param)


def test_linear_layers_by_hand():
    _, params, images, apply = prepare("mlp")

    def linear(p, x):
        return x @ p["w"] + p["b"]

    x = images.reshape(B, -1)
    for i in range(2):
        x = np.maximum(linear(params["encoder"][f"hidden{i}"], x), 0)
    mean, log_variance = (linear(params["encoder"][name], x) for name in ("mean", "log_variance"))
    x = mean
    for i in range(2):
        x = np.maximum(linear(params["decoder"][f"hidden{i}"], x), 0)
    expected = linear(params["decoder"]["head"], x).reshape(images.shape)
    for got, reference in zip(apply(params, images), (expected, mean, log_variance), strict=True):
        np.testing.assert_allclose(got, reference, atol=1e-5)
        assert np.std(reference) > 0.05


def test_shapes_and_that_every_parameter_matters(case):
    model, params, images, apply = case
    outputs = apply(params, images, rng=jax.random.key(0))
    assert [x.shape for x in outputs] == [images.shape, (B, Z), (B, Z)]
    assert all(x.dtype == jnp.float32 for x in outputs)
    gradient = jit(jax.grad(lambda p: sum(x.var() for x in model.apply(p, images, rng=jax.random.key(0)))))(params)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


def test_latents_alone_are_decoded_as_the_model_decodes_them(case):
    _, params, images, apply = case
    logits, mean, _ = apply(params, images)
    np.testing.assert_allclose(apply(params, latents=mean), logits, atol=1e-6)
    decoder = {"decoder": params["decoder"]}
    np.testing.assert_array_equal(apply(decoder, latents=mean), apply(params, latents=mean))


def test_the_code_is_drawn_with_the_mean_and_deviation_that_come_out(case):
    _, params, images, apply = case
    logits, _, _ = apply(params, images, rng=jax.random.key(0), train=True)
    same, other = (apply(params, images, rng=jax.random.key(seed))[0] for seed in (0, 1))
    np.testing.assert_array_equal(logits, same)
    assert np.abs(logits - other).max() > 1e-3
    # a decoder that is known shows the code
    _, params, images, apply = prepare("mlp")
    config = dataclasses.replace(CONFIGS["mlp"], hidden=(40,))
    model = jaxmodels.create(config)
    encoder = {
        "hidden0": {"w": jnp.zeros((32, 40)), "b": jnp.zeros(40)},
        "mean": {"w": jnp.zeros((40, Z)), "b": jnp.arange(4.0)},
        "log_variance": {"w": jnp.zeros((40, Z)), "b": jnp.log(jnp.array([0.25, 1.0, 4.0, 1e-8]))},
    }
    eye = jnp.eye(Z, 40)
    # relu(z) and relu(-z) side by side
    first = {"w": eye.at[:, Z : 2 * Z].set(-jnp.eye(Z)), "b": jnp.zeros(40)}
    head = {"w": jnp.zeros((40, 32)).at[:Z, :Z].set(jnp.eye(Z)).at[Z : 2 * Z, :Z].set(-jnp.eye(Z)), "b": jnp.zeros(32)}
    known = {"encoder": encoder, "decoder": {"hidden0": first, "head": head}}
    many = jnp.zeros((4000, 8, 4, 1))
    z = np.asarray(model.apply(known, many, rng=jax.random.key(0))[0]).reshape(4000, -1)[:, :Z]
    np.testing.assert_allclose(z.mean(0), np.arange(4.0), atol=0.1)
    np.testing.assert_allclose(z.std(0), [0.5, 1, 2, 1e-4], rtol=0.05)


def test_the_gradient_goes_through_the_draw_as_finite_differences_do(case):
    model, params, images, _ = case
    rng = np.random.default_rng(3)
    direction = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params["encoder"])

    def value(step):
        moved = jax.tree.map(lambda p, d: p + step * d, params["encoder"], direction)
        logits, _, _ = model.apply({**params, "encoder": moved}, images, rng=jax.random.key(5))
        return jnp.square(logits).mean()

    value, gradient = jit(value), jit(jax.grad(value))
    h = 3e-3
    difference = (float(value(h)) - float(value(-h))) / (2 * h)
    assert abs(difference) > 0.01
    assert float(gradient(0.0)) == pytest.approx(difference, rel=0.02)


def test_sizes_on_mnist():
    mlp = (784 * 500 + 500) + 2 * (500 * 20 + 20) + (20 * 500 + 500) + (500 * 784 + 784)
    assert jaxmodels.create("vae-mnist").count() == mlp == 815_824
    encoder = (16 * 32 + 32) + (16 * 32 * 64 + 64) + 2 * (49 * 64 * 20 + 20)
    decoder = (20 * 49 * 64 + 49 * 64) + (16 * 64 * 32 + 32) + (16 * 32 + 1)
    assert jaxmodels.create("vae-mnist-conv").count() == encoder + decoder


@pytest.mark.parametrize("name", ["vae-mnist", "vae-mnist-conv"])
def test_activations_keep_their_size_through_the_first_weights(name):
    model = jaxmodels.create(name)
    params = jit(model.init)(jax.random.key(0))
    z = jnp.asarray(np.random.default_rng(0).normal(size=(16, 20)), jnp.float32)
    logits = jit(model.apply)(params, latents=z)
    # products of relu by He's weights keep the mean square, that of normal numbers being 1; the last has half of it
    assert 0.5 < float(jnp.sqrt(jnp.square(logits).mean())) < 1.5


def test_what_cannot_be_is_refused():
    with pytest.raises(
        UserError, match="got hidden \\(32, 64, 64\\) for images of 28×28, expected sides that 8 divides"
    ):
        VAEConfig(kind="conv", hidden=(32, 64, 64))
    with pytest.raises(UserError, match="at least one hidden layer"):
        VAEConfig(hidden=())
    model, params, _, _ = prepare("mlp")
    with pytest.raises(UserError, match=r"got inputs of shape \(28, 28, 1\), expected \(8, 4, 1\)"):
        model.apply(params, jnp.zeros((2, 28, 28, 1)))
    with pytest.raises(UserError, match=r"latents of shape \(2, 5\), expected images or latents \(B, 4\)"):
        model.apply(params, latents=jnp.zeros((2, 5)))
    with pytest.raises(UserError, match="neither images nor latents"):
        model.apply(params)
