"""U-Net: an encoder that halves images, and a decoder that doubles them again with the encoder's features beside.

Source: Ronneberger et al. 2015. As in the implementations that are in use, convolutions are padded, so that each pixel
has a class, and have no bias but a batch normalization behind them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

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
class UNetConfig(ModelConfig):
    """U-Net; the defaults are the channels of the paper."""

    input_shape: Shape = (256, 256, 3)
    """Height, width and channels of an image."""
    classes: Dim = 2
    """Classes of a pixel."""
    widths: tuple[Dim, ...] = (64, 128, 256, 512, 1024)
    """Channels at each resolution, each of which is half of the one before."""
    dtype: Dtype = "float32"
    """Type of activations and products; parameters stay float32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.widths:
            raise UserError("got no widths, expected channels of at least one resolution, try --model.widths 16 32 64")
        halvings(self.input_shape, self.widths[1:], "widths")


class Convolutions(nn.Module):
    """Two 3×3 convolutions, each with batch normalization and a ReLU."""

    features: int
    train: bool
    dtype: Dtype
    inputs: str = "channels_in"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(2):
            axes = (self.inputs if not i else "channels_in", "channels_out")
            x = layers.Conv(self.features, bias=False, axes=axes, dtype=self.dtype, name=f"conv{i}")(x)
            x = nn.relu(layers.BatchNorm(name=f"norm{i}")(x, self.train))
        return layers.shard(x, "batch", None, None, "channels_out")


class UNet(nn.Module):
    """Images (B, H, W, C) to logits of each pixel (B, H, W, classes) in float32."""

    config: UNetConfig

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        c, beside = self.config, []
        check_shape(images, c.input_shape)
        x = images
        for i, width in enumerate(c.widths):
            x = layers.max_pool(beside[-1], 2, 2) if i else x
            x = Convolutions(width, train, c.dtype, "channels_in" if i else "features", name=f"down{i}")(x)
            beside.append(x)
        for i, width in reversed([*enumerate(c.widths[:-1])]):
            x = layers.ConvTranspose(width, (2, 2), dtype=c.dtype, name=f"grow{i}")(x)
            x = Convolutions(width, train, c.dtype, name=f"up{i}")(jnp.concatenate([beside[i], x], -1))
        head = layers.Linear((c.classes,), ("channels_in", "classes"), initializer=layers.normal(0.02), name="head")
        return head(x.astype(jnp.float32))


register(
    Family(
        name="unet",
        config=UNetConfig,
        network=UNet,
        inputs=image_inputs,
        presets={
            "unet-64": UNetConfig(),
            "unet-32": dataclasses.replace(UNetConfig(), widths=(32, 64, 128, 256, 512)),
        },
    )
)
