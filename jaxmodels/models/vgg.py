"""VGG: stages of 3×3 convolutions, each with a pooling, and a classifier of wide layers (Simonyan & Zisserman 2014).

The classifier reads the output of the last pooling, without an adaptive pooling in between. At 224×224 this is
PyTorch's VGG weight for weight, except that the classifier's inputs are flattened in the order H, W, C.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmodels.errors import UserError
from jaxmodels.fields import Depth, Dim, Dropped, Shape
from jaxmodels.models import layers
from jaxmodels.models.checks import check_shape
from jaxmodels.models.config import ModelConfig
from jaxmodels.models.families import register
from jaxmodels.models.inputs import image_inputs
from jaxmodels.models.model import Dtype, Family


@dataclass(frozen=True)
class VGGConfig(ModelConfig):
    """VGG; the defaults are VGG-16 without batch normalization."""

    input_shape: Shape = (224, 224, 3)
    """Height, width and channels of an image."""
    classes: Dim = 1000
    """Outputs."""
    depths: tuple[Depth, ...] = (2, 2, 3, 3, 3)
    """Convolutions of each stage; a pooling after each halves height and width."""
    widths: tuple[Dim, ...] = (64, 128, 256, 512, 512)
    """Channels of each stage."""
    hidden: tuple[Dim, ...] = (4096, 4096)
    """Units of each hidden layer of the classifier."""
    batch_norm: bool = False
    """Batch normalization after each convolution."""
    dropout: Dropped = 0.5
    """Share of the classifier's hidden units dropped while training."""
    dtype: Dtype = "float32"
    """Type of activations and products; parameters stay float32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.depths) != len(self.widths):
            raise UserError(
                f"got depths {self.depths} with widths {self.widths}, expected one of each for a stage, "
                f"try widths {tuple(min(64 * 2**i, 512) for i in range(len(self.depths)))}"
            )
        side = min(self.input_shape[:2])
        if side < 2 ** len(self.depths):
            most = side.bit_length() - 1
            raise UserError(
                f"got images of {self.input_shape[0]}×{self.input_shape[1]} for {len(self.depths)} stages, which halve "
                f"them as often, expected at least {2 ** len(self.depths)} pixels a side, "
                f"try depths {self.depths[:most]} and widths {self.widths[:most]}"
            )


class Stage(nn.Module):
    """Convolutions of one width with relu, and a pooling."""

    config: VGGConfig
    index: int
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        for i in range(c.depths[self.index]):
            inputs = "channels_in" if self.index or i else "features"
            x = Unit(c, c.widths[self.index], inputs, self.train, name=str(i))(x)
        return layers.shard(layers.max_pool(x, 2, 2), "batch", None, None, "channels_out")


class Unit(nn.Module):
    config: VGGConfig
    features: int
    inputs: str
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = layers.Conv(self.features, axes=(self.inputs, "channels_out"), dtype=self.config.dtype, name="conv")(x)
        if self.config.batch_norm:
            x = layers.BatchNorm(name="norm")(x, self.train)
        return nn.relu(x)


class Stages(nn.Module):
    config: VGGConfig
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(len(self.config.depths)):
            x = Stage(self.config, i, self.train, name=str(i))(x)
        return x


class VGG(nn.Module):
    """Images (B, H, W, C) to logits (B, classes) in float32, or with `head=False` to the last hidden units (B, D)."""

    config: VGGConfig

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False, head: bool = True) -> jax.Array:
        c = self.config
        check_shape(images, c.input_shape)
        x = Stages(c, train, name="stages")(images)
        x = x.reshape(x.shape[0], -1)
        init = layers.normal(0.01)
        for i, width in enumerate(c.hidden):
            # as in an MLP, the second one takes the first one's outputs as they are sharded
            axes = ("mlp", "embed") if i % 2 else ("embed", "mlp")
            x = nn.relu(layers.Linear((width,), axes, initializer=init, dtype=c.dtype, name=f"hidden{i}")(x))
            x = layers.Dropout(c.dropout)(x, train)
        if not head:
            return x
        inputs = "mlp" if len(c.hidden) % 2 else "embed"
        return layers.Linear((c.classes,), (inputs, "classes"), initializer=init, dtype=c.dtype, name="head")(x).astype(
            jnp.float32
        )


DEPTHS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
plain = {f"vgg-{weights}": VGGConfig(depths=depths) for weights, depths in DEPTHS.items()}

register(
    Family(
        name="vgg",
        config=VGGConfig,
        network=VGG,
        inputs=image_inputs,
        # Simonyan & Zisserman 2014, table 1: A, B, D, E
        presets=plain | {f"{name}-bn": dataclasses.replace(c, batch_norm=True) for name, c in plain.items()},
    )
)
