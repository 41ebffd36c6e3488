"""Variational autoencoders of images, Bernoulli pixels, of linear or convolutional layers (Kingma & Welling 2013).

Relu instead of the paper's tanh, which trains faster.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmodels.errors import UserError
from jaxmodels.fields import Dim, Shape
from jaxmodels.models import layers
from jaxmodels.models.checks import check_shape, halvings
from jaxmodels.models.config import ModelConfig
from jaxmodels.models.families import register
from jaxmodels.models.inputs import image_inputs
from jaxmodels.models.model import Dtype, Family


@dataclass(frozen=True)
class VAEConfig(ModelConfig):
    """A variational autoencoder; the defaults fit MNIST."""

    kind: Literal["mlp", "conv"] = "mlp"
    """Linear layers, or convolutions that halve the image each time and transposed ones that double it."""
    input_shape: Shape = (28, 28, 1)
    """Height, width and channels of an image, with values in [0, 1]."""
    hidden: tuple[Dim, ...] = (500,)
    """Units of each hidden layer (mlp) or channels of each convolution (conv); the decoder has them in reverse."""
    latents: Dim = 20
    """Size of the code (Z)."""
    dtype: Dtype = "float32"
    """Type of activations and products; parameters stay float32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.hidden:
            raise UserError("got hidden (), expected at least one hidden layer, try hidden (500,)")
        if self.kind == "conv":
            halvings(self.input_shape, self.hidden, "hidden")


class Encoder(nn.Module):
    """Images (B, H, W, C) to the mean and log-variance of their codes, (B, Z) in float32."""

    config: VAEConfig

    @nn.compact
    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        c, x = self.config, images
        if c.kind == "mlp":
            x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(c.hidden):
            if c.kind == "mlp":
                axes = ("embed" if i else "features", "mlp")
                x = layers.Linear((width,), axes, initializer=he, dtype=c.dtype, name=f"hidden{i}")(x)
            else:
                axes = ("channels_in" if i else "features", "channels_out")
                conv = layers.Conv(width, (4, 4), (2, 2), axes=axes, initializer=he, dtype=c.dtype, name=f"down{i}")
                x = layers.shard(conv(x), "batch", None, None, "channels_out")
            x = nn.relu(x)
        x = x.reshape(x.shape[0], -1)
        mean, log_variance = (
            layers.Linear((c.latents,), ("embed", "features"), initializer=lecun, dtype=c.dtype, name=name)(x)
            for name in ("mean", "log_variance")
        )
        return mean.astype(jnp.float32), log_variance.astype(jnp.float32)


class Decoder(nn.Module):
    """Codes (B, Z) to logits of pixels (B, H, W, C) in float32."""

    config: VAEConfig

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        c, x = self.config, z
        if c.kind == "mlp":
            for i, width in enumerate(c.hidden[::-1]):
                axes = ("embed" if i else "features", "mlp")
                x = nn.relu(layers.Linear((width,), axes, initializer=he, dtype=c.dtype, name=f"hidden{i}")(x))
            pixels = math.prod(c.input_shape)
            x = layers.Linear((pixels,), ("embed", "features"), initializer=lecun, dtype=c.dtype, name="head")(x)
            return x.reshape(-1, *c.input_shape).astype(jnp.float32)
        shape = (*halvings(c.input_shape, c.hidden, "hidden"), c.hidden[-1])
        axes = ("features", "window", "window", "channels_out")
        x = nn.relu(layers.Linear(shape, axes, initializer=codes, dtype=c.dtype, name="project")(x))
        for i, width in enumerate((*c.hidden[-2::-1], c.input_shape[-1])):
            last = i == len(c.hidden) - 1
            axes = ("channels_in", "features" if last else "channels_out")
            # a pixel is the sum of a quarter of the 4×4 window
            init = nn.initializers.variance_scaling(4.0 if last else 8.0, "fan_in", "normal")
            x = layers.shard(x, "batch", None, None, "channels_out")
            x = layers.ConvTranspose(width, axes=axes, initializer=init, dtype=c.dtype, name=f"up{i}")(x)
            x = x if last else nn.relu(x)
        return x.astype(jnp.float32)


class VAE(nn.Module):
    """Images (B, H, W, C) to logits of pixels, and the mean and log-variance (B, Z) of their codes; in float32.

    The code is sampled if a key is given (`rng=`), else it is the mean. With `latents=` (B, Z) in place of images, it
    returns logits alone.
    """

    config: VAEConfig

    @nn.compact
    def __call__(
        self, images: jax.Array | None = None, *, latents: jax.Array | None = None, train: bool = False
    ) -> Any:
        c = self.config
        if images is not None:
            check_shape(images, c.input_shape)
        decoder = Decoder(c, name="decoder")
        if images is None:
            if latents is None or latents.shape[1:] != (c.latents,):
                got = "neither images nor latents" if latents is None else f"latents of shape {latents.shape}"
                raise UserError(f"got {got}, expected images or latents (B, {c.latents})")
            return decoder(latents)
        mean, log_variance = Encoder(c, name="encoder")(images)
        z = mean
        if self.has_rng("latent"):
            z = reparameterize(mean, log_variance, jax.random.normal(self.make_rng("latent"), mean.shape))
        return decoder(z), mean, log_variance


def reparameterize(mean: jax.Array, log_variance: jax.Array, noise: jax.Array) -> jax.Array:
    """The code for standard normal noise (Kingma & Welling 2013, section 2.4)."""
    return mean + jnp.exp(0.5 * log_variance) * noise


he = nn.initializers.he_normal()
lecun = nn.initializers.lecun_normal()


def codes(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """He et al.'s initialization of w (Z, H, W, C), of which Z alone are inputs."""
    return math.sqrt(2 / shape[0]) * jax.random.normal(key, shape, dtype)


register(
    Family(
        name="vae",
        config=VAEConfig,
        network=VAE,
        inputs=image_inputs,
        presets={
            # one hidden layer of 500, Kingma & Welling 2013, section 5
            "vae-mnist": VAEConfig(),
            "vae-mnist-conv": VAEConfig(kind="conv", hidden=(32, 64)),
        },
    )
)
