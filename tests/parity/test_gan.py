"""Transposed convolutions, their gradients, and a whole generator are torch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmodels
from jaxmodels.models import layers

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="needs the parity extra: torch")


@pytest.mark.parametrize(("window", "stride", "cut"), [(4, 2, 1), (5, 2, 2), (3, 1, 1), (5, 3, 0), (2, 2, 0)])
def test_a_transposed_convolution_and_its_gradients_equal_torch(window, stride, cut):
    torch.manual_seed(0)
    theirs = torch.nn.ConvTranspose2d(3, 5, window, stride, cut)
    x = torch.randn(2, 3, 4, 6, requires_grad=True)
    y = theirs(x)
    direction = torch.randn_like(y)
    (y * direction).sum().backward()

    def last(image):
        return np.moveaxis(image.detach().numpy(), 1, -1)

    layer = layers.ConvTranspose(5, (window,) * 2, (stride,) * 2, ((cut, cut),) * 2)
    params = {"w": theirs.weight.detach().permute(2, 3, 0, 1).numpy(), "b": theirs.bias.detach().numpy()}

    def total(params, x):
        y = layer.apply({"params": params}, x)
        return (y * last(direction)).sum(), y

    (grads, of_x), got = jax.grad(total, argnums=(0, 1), has_aux=True)(jax.tree.map(jnp.asarray, params), last(x))
    np.testing.assert_allclose(got, last(y), atol=1e-5)
    np.testing.assert_allclose(of_x, last(x.grad), atol=1e-5)
    np.testing.assert_allclose(grads["w"], theirs.weight.grad.permute(2, 3, 0, 1), atol=1e-4)
    np.testing.assert_allclose(grads["b"], theirs.bias.grad, atol=1e-4)


def test_a_generator_and_a_discriminator_in_training_equal_torch():
    nn = torch.nn
    torch.manual_seed(0)
    up = nn.Sequential(
        nn.ConvTranspose2d(6, 8, 2, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 4, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.ConvTranspose2d(4, 1, 4, 2, 1), nn.Tanh(),
    )  # fmt: skip
    down = nn.Sequential(
        nn.Conv2d(1, 4, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(4, 8, 4, 2, 1, bias=False), nn.BatchNorm2d(8),
        nn.LeakyReLU(0.2), nn.Conv2d(8, 1, 2),
    )  # fmt: skip

    def w(layer, *order):
        return jnp.asarray(layer.weight.detach().permute(*order).numpy())

    def rest(layer, **names):
        return {ours: jnp.asarray(getattr(layer, name).detach().numpy()) for ours, name in names.items()}

    generator = {
        "project": {"w": w(up[0], 0, 2, 3, 1)},
        "norm0": rest(up[1], scale="weight", bias="bias"),
        "up0": {"w": w(up[3], 2, 3, 0, 1)},
        "norm1": rest(up[4], scale="weight", bias="bias"),
        "up1": {"w": w(up[6], 2, 3, 0, 1), **rest(up[6], b="bias")},
    }
    discriminator = {
        "down0": {"w": w(down[0], 2, 3, 1, 0), **rest(down[0], b="bias")},
        "down1": {"w": w(down[2], 2, 3, 1, 0)},
        "norm1": rest(down[3], scale="weight", bias="bias"),
        "head": {"w": w(down[5], 2, 3, 1, 0), **rest(down[5], b="bias")},
    }
    z = torch.randn(5, 6)
    expected = up(z[:, :, None, None])
    config = {"input_shape": (8, 8, 1), "latents": 6, "channels": (4, 8)}
    model = jaxmodels.create("dcgan-mnist", **config)
    images, _ = model.apply(generator, jnp.asarray(z.numpy()), stats=model.stats(), train=True)
    np.testing.assert_allclose(images[..., 0], expected.detach()[:, 0], atol=1e-5)
    model = jaxmodels.create("dcgan-mnist-discriminator", **config)
    logits, stats = model.apply(discriminator, images, stats=model.stats(), train=True)
    np.testing.assert_allclose(logits, down(expected).detach()[:, 0, 0, 0], atol=1e-5)
    np.testing.assert_allclose(stats["norm1"]["mean"], down[3].running_mean, atol=1e-6)
    np.testing.assert_allclose(stats["norm1"]["var"], down[3].running_var, atol=1e-6)
