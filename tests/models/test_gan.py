"""The networks of DCGAN and WGAN-GP, and the transposed convolution that they rest on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmodels
from jaxmodels.errors import UserError
from jaxmodels.models import flops, layers
from jaxmodels.models.gan import GANConfig

# at these shapes LLVM's optimizations take longer than all else
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
B = 5
SMALL = GANConfig(input_shape=(8, 12, 2), latents=6, channels=(4, 8))


@functools.cache
def prepare(**fields):
    model = jaxmodels.create(SMALL, **fields)
    params = jit(model.init)(jax.random.key(0))
    params = jax.tree.map(lambda x: 4 * x, params)  # so that outputs differ
    x = jnp.asarray(np.random.default_rng(0).normal(size=model.inputs(B)[0].shape), jnp.float32)
    return model, params, x


@pytest.mark.parametrize(
    ("window", "stride", "padding", "cut"),
    [(4, 2, "SAME", (1, 1)), (5, 2, ((1, 2), (1, 2)), (1, 2)), (3, 3, "SAME", (0, 0)), (3, 1, "SAME", (1, 1)),
     (2, 3, "SAME", (0, -1)), (5, 2, "SAME", (1, 2)), (6, 2, ((0, 0), (0, 0)), (0, 0))],
)  # fmt: skip
def test_a_transposed_convolution_adds_windows_a_stride_apart(window, stride, padding, cut):
    rng = np.random.default_rng(0)
    H, W, C, E = 3, 4, 3, 2
    layer = layers.ConvTranspose(E, (window, window), (stride, stride), padding)
    x, w, b = (rng.normal(size=s) for s in ((2, H, W, C), (window, window, C, E), (E,)))
    room = max(0, -cut[1])
    full = np.zeros((2, (H - 1) * stride + window + room, (W - 1) * stride + window + room, E))
    for i in range(H):
        for j in range(W):
            here = np.s_[:, i * stride : i * stride + window, j * stride : j * stride + window]
            full[here] += np.einsum("bc,klce->bkle", x[:, i, j], w)
    expected = full[:, cut[0] : full.shape[1] - max(cut[1], 0), cut[0] : full.shape[2] - max(cut[1], 0)] + b
    if padding == "SAME":
        assert expected.shape[1:3] == (H * stride, W * stride)
    got = layer.apply({"params": {"w": jnp.asarray(w), "b": jnp.asarray(b)}}, jnp.asarray(x))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_a_transposed_convolution_is_the_transpose_of_a_convolution():
    rng = np.random.default_rng(0)
    x, y, w = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 8, 12, 2), (2, 4, 6, 5), (4, 4, 2, 5)))
    down = layers.Conv(5, (4, 4), (2, 2), bias=False).apply({"params": {"w": w}}, x)
    up = layers.ConvTranspose(2, bias=False).apply({"params": {"w": jnp.swapaxes(w, 2, 3)}}, y)
    assert isinstance(down, jax.Array) and isinstance(up, jax.Array)
    np.testing.assert_allclose(jnp.vdot(down, y), jnp.vdot(x, up), rtol=1e-4)


def test_flops_of_a_transposed_convolution_are_those_of_its_products():
    layer = layers.ConvTranspose(2, bias=False)
    x, w = jax.ShapeDtypeStruct((3, 4, 6, 5), jnp.float32), jax.ShapeDtypeStruct((4, 4, 5, 2), jnp.float32)
    assert flops.count(lambda x, w: layer.apply({"params": {"w": w}}, x), x, w) == 2 * 3 * 4 * 6 * 5 * 16 * 2


@pytest.mark.parametrize("kind", ["dcgan", "wgan-gp"])
def test_a_generator_makes_images_and_a_discriminator_logits(kind):
    model, params, z = prepare(kind=kind)
    images, stats = model.apply(params, z, stats=model.stats(), train=True)
    assert images.shape == (B, 8, 12, 2) and images.dtype == jnp.float32
    assert np.abs(images).max() <= 1 and np.std(images, axis=0).mean() > 0.05
    assert jax.tree.map(jnp.shape, stats) == jax.tree.map(jnp.shape, model.stats())
    model, params, x = prepare(kind=kind, network="discriminator")
    logits, _ = model.apply(params, x, stats=model.stats(), train=True)
    assert logits.shape == (B,) and logits.dtype == jnp.float32 and np.std(logits) > 0.01


def test_batch_normalization_is_where_it_was_published():
    def normalized(**fields):
        return sorted(jaxmodels.create("dcgan-mnist", **fields).stats())

    assert normalized() == ["norm0", "norm1"]
    assert normalized(network="discriminator") == ["norm1"], "none on the images"
    assert normalized(network="discriminator", kind="wgan-gp") == []
    model, params, x = prepare(kind="wgan-gp", network="discriminator")
    together = model.apply(params, x, train=True)
    alone = jnp.concatenate([model.apply(params, row[None], train=True) for row in x])
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_a_hidden_layer_sees_the_whole_image():
    """What two far corners say is joined: without it each corner adds to the logit what it adds alone."""
    corners = [(0, 0), (7, 11)]

    def joint(hidden):
        model, params, x = prepare(kind="wgan-gp", network="discriminator", hidden=hidden)
        changed = [x, *(x.at[:, i, j].add(3.0) for i, j in corners)]
        both = changed[1].at[:, 7, 11].add(3.0)
        none, first, second, all_ = (model.apply(params, each) for each in (*changed, both))
        return np.abs(all_ - first - second + none).max() / np.abs(first - none).max()

    assert joint(0) < 1e-4 and joint(6) > 1e-2
    assert "hidden" not in jaxmodels.create(SMALL).axes()


def test_a_hidden_layer_is_normalized_where_the_others_are():
    def names(**fields):
        return sorted(jaxmodels.create(SMALL, hidden=6, **fields).stats())

    assert names() == names(kind="wgan-gp") == ["hidden_norm", "norm0", "norm1"]
    assert names(network="discriminator") == ["hidden_norm", "norm1"]
    assert names(network="discriminator", kind="wgan-gp") == []


def test_initial_values_are_dcgans():
    shapes = ("dcgan-mnist", {}), ("dcgan-mnist-discriminator", {}), ("dcgan-mnist", {"hidden": 64})
    params = {str(given): jit(jaxmodels.create(given[0], **given[1]).init)(jax.random.key(0)) for given in shapes}
    for tree in params.values():
        for name, layer in tree.items():
            if "w" in layer and layer["w"].size > 500:
                assert np.std(layer["w"]) == pytest.approx(0.02, rel=0.1), name
            if "scale" in layer:
                assert np.mean(layer["scale"]) == pytest.approx(1, abs=0.01)
                assert np.std(layer["scale"]) == pytest.approx(0.02, rel=0.25)
                assert not np.any(layer["bias"])


def test_sizes_on_mnist():
    def count(name):
        return jaxmodels.create(name).count()

    assert count("dcgan-mnist") == 100 * 49 * 128 + 2 * 128 + 16 * 128 * 64 + 2 * 64 + 16 * 64 + 1
    assert count("dcgan-mnist-discriminator") == 16 * 64 + 64 + 16 * 64 * 128 + 2 * 128 + 49 * 128 + 1
    assert count("wgan-gp-mnist") == count("dcgan-mnist") + 28 * 49 * 128
    assert count("wgan-gp-mnist-critic") == count("dcgan-mnist-discriminator") - 2 * 128 + 128
    hidden = jaxmodels.create("dcgan-mnist", hidden=32).count()
    assert hidden == count("dcgan-mnist") + 100 * 32 + 2 * 32 + (32 - 100) * 49 * 128
    hidden = jaxmodels.create("wgan-gp-mnist-critic", hidden=32).count()
    assert hidden == count("wgan-gp-mnist-critic") + 32 * (49 * 128 + 1) + 32 - 49 * 128


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match="for images of 28×28, expected sides that 8 divides, try at most 2 channels"):
        GANConfig(channels=(8, 8, 8))
    with pytest.raises(UserError, match="got model.hidden -1, expected at least 0, try --model.hidden 0"):
        GANConfig(hidden=-1)
    model, params, _ = prepare()
    with pytest.raises(UserError, match=r"got inputs of shape \(7,\) for a generator, expected \(6,\)"):
        model.apply(params, jnp.zeros((2, 7)), stats=model.stats())
    with pytest.raises(UserError, match="got no batch statistics"):
        model.apply(params, jnp.zeros((2, 6)))
    with pytest.raises(UserError, match="field 'chanels'"):
        jaxmodels.create(dataclasses.replace(SMALL), chanels=(4,))
