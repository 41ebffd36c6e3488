"""Generative adversarial networks: DCGAN (Radford et al. 2015) and WGAN-GP (Gulrajani et al. 2017) for small images.

Generator and discriminator are models of their own, each with its parameters and statistics; `network` says which one a
config is. A critic trained with a gradient penalty has no batch normalization, since the penalty is for each example.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmodels.errors import UserError
from jaxmodels.fields import Dim, Range, Shape
from jaxmodels.models import layers
from jaxmodels.models.checks import halvings
from jaxmodels.models.config import ModelConfig
from jaxmodels.models.families import register
from jaxmodels.models.model import Dtype, Family


@dataclass(frozen=True)
class GANConfig(ModelConfig):
    """One network of a GAN; the defaults are DCGAN's generator at the size of MNIST."""

    network: Literal["generator", "discriminator"] = "generator"
    """Which of the two networks this is: latents to images, or images to logits."""
    kind: Literal["dcgan", "wgan-gp"] = "dcgan"
    """dcgan: batch normalization in both networks, logistic loss; wgan-gp: a critic without, Wasserstein distance."""
    input_shape: Shape = (28, 28, 1)
    """Height, width and channels of an image, with values in [-1, 1]."""
    latents: Dim = 100
    """Numbers that the generator makes an image from, normally distributed (Z)."""
    channels: tuple[Dim, ...] = (64, 128)
    """Channels after each halving of the image, from the outside in; the generator goes the other way."""
    hidden: Annotated[int, Range(0, 2**24)] = 0
    """Units of a layer that sees the whole image at once, behind the latents and before the logits (InfoGAN; Chen et
    al. 2016); 0: none, as DCGAN has it."""
    dtype: Dtype = "float32"
    """Type of activations and products; parameters stay float32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        halvings(self.input_shape, self.channels, "channels")


class GAN(nn.Module):
    """The generator, latents (B, Z) to images (B, H, W, C), or the discriminator, images to logits (B,); in float32."""

    config: GANConfig

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        c = self.config
        expected = (c.latents,) if c.network == "generator" else tuple(c.input_shape)
        if x.shape[1:] != expected:
            raise UserError(f"got inputs of shape {x.shape[1:]} for a {c.network}, expected {expected}")
        return self.generate(x, train) if c.network == "generator" else self.judge(x, train)

    def norm(self, name: str) -> layers.BatchNorm:
        return layers.BatchNorm(initializer=scales, name=name)

    def generate(self, z: jax.Array, train: bool) -> jax.Array:
        c = self.config
        shape = (*halvings(c.input_shape, c.channels, "channels"), c.channels[-1])
        if c.hidden:
            z = layers.Linear((c.hidden,), ("features", "channels_out"), bias=False, dtype=c.dtype, name="hidden")(z)
            z = layers.shard(nn.relu(self.norm("hidden_norm")(z, train)), "batch", "channels_out")
        axes = ("channels_in" if c.hidden else "features", "window", "window", "channels_out")
        x = layers.Linear(shape, axes, bias=False, dtype=c.dtype, name="project")(z)
        for i, width in enumerate((*c.channels[-2::-1], c.input_shape[-1])):
            x = layers.shard(nn.relu(self.norm(f"norm{i}")(x, train)), "batch", None, None, "channels_out")
            last = i == len(c.channels) - 1
            axes = ("channels_in", "features" if last else "channels_out")
            x = layers.ConvTranspose(width, bias=last, axes=axes, dtype=c.dtype, name=f"up{i}")(x)
        return jnp.tanh(x.astype(jnp.float32))

    def judge(self, x: jax.Array, train: bool) -> jax.Array:
        c = self.config
        # without normalization, DCGAN's small weights let so little through that a critic hardly learns
        init = layers.normal(0.02) if c.kind == "dcgan" else he
        for i, width in enumerate(c.channels):
            normal = c.kind == "dcgan" and i > 0
            axes = ("channels_in" if i else "features", "channels_out")
            conv = layers.Conv(
                width, (4, 4), (2, 2), bias=not normal, axes=axes, initializer=init, dtype=c.dtype, name=f"down{i}"
            )
            x = conv(x)
            x = nn.leaky_relu(self.norm(f"norm{i}")(x, train) if normal else x, 0.2)
            x = layers.shard(x, "batch", None, None, "channels_out")
        axes = ("window", "window", "channels_in")
        if c.hidden:
            normal = c.kind == "dcgan"
            x = layers.Linear(
                (c.hidden,), (*axes, "channels_out"), bias=not normal, initializer=init, dtype=c.dtype, name="hidden"
            )(x)
            x = nn.leaky_relu(self.norm("hidden_norm")(x, train) if normal else x, 0.2)
            x, axes = layers.shard(x, "batch", "channels_out"), ("channels_in",)
        axes = (*axes, "classes")
        return layers.Linear((1,), axes, initializer=init, dtype=c.dtype, name="head")(x)[:, 0].astype(jnp.float32)


he = nn.initializers.he_normal()


def scales(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """DCGAN's initial scales of batch normalization: normal around 1."""
    return 1 + 0.02 * jax.random.normal(key, shape, dtype)


def inputs(c: GANConfig, batch: int, length: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """What the network takes: latents or images."""
    shape = (c.latents,) if c.network == "generator" else c.input_shape
    return (jax.ShapeDtypeStruct((batch, *shape), jnp.float32),)


dcgan = GANConfig()
wgan = GANConfig(kind="wgan-gp", latents=128)

register(
    Family(
        name="gan",
        config=GANConfig,
        network=GAN,
        inputs=inputs,
        presets={
            # the published networks, halving twice instead of four (Radford) or three times (Gulrajani)
            "dcgan-mnist": dcgan,
            "dcgan-mnist-discriminator": dataclasses.replace(dcgan, network="discriminator"),
            "wgan-gp-mnist": wgan,
            "wgan-gp-mnist-critic": dataclasses.replace(wgan, network="discriminator"),
        },
    )
)
