"""A small convolutional network: convolutions with poolings, hidden layers, one logit a class."""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmodels.errors import UserError
from jaxmodels.fields import Dim, Dropped, Shape
from jaxmodels.models import layers
from jaxmodels.models.checks import check_shape
from jaxmodels.models.config import ModelConfig
from jaxmodels.models.families import register
from jaxmodels.models.inputs import image_inputs
from jaxmodels.models.model import Dtype, Family


@dataclass(frozen=True)
class CNNConfig(ModelConfig):
    """A small convolutional network; the defaults fit MNIST."""

    input_shape: Shape = (28, 28, 1)
    """Height, width and channels of an image."""
    classes: Dim = 10
    """Outputs."""
    widths: tuple[Dim, ...] = (32, 64)
    """Channels of each 3×3 convolution; a pooling after each halves height and width."""
    hidden: tuple[Dim, ...] = (128,)
    """Units of each hidden layer after the convolutions."""
    dropout: Dropped = 0.0
    """Share of hidden units dropped while training."""
    dtype: Dtype = "float32"
    """Type of activations and products; parameters stay float32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        side = min(self.input_shape[:2])
        if side < 2 ** len(self.widths):
            raise UserError(
                f"got images of {self.input_shape[0]}×{self.input_shape[1]} for {len(self.widths)} convolutions with a "
                f"pooling each, expected at least {2 ** len(self.widths)} pixels a side, "
                f"try widths {self.widths[: side.bit_length() - 1]}"
            )


class CNN(nn.Module):
    """Images (B, H, W, C) to logits (B, classes) in float32, or with `head=False` to the last hidden units (B, D)."""

    config: CNNConfig

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False, head: bool = True) -> jax.Array:
        c, x = self.config, images
        check_shape(x, c.input_shape)
        he = nn.initializers.he_normal()
        for i, width in enumerate(c.widths):
            axes = ("channels_in" if i else "features", "channels_out")
            x = nn.relu(layers.Conv(width, axes=axes, initializer=he, dtype=c.dtype, name=f"conv{i}")(x))
            x = layers.shard(layers.max_pool(x, 2, 2), "batch", None, None, "channels_out")
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(c.hidden):
            x = layers.Linear((width,), ("embed", "mlp"), initializer=he, dtype=c.dtype, name=f"hidden{i}")(x)
            x = layers.Dropout(c.dropout)(nn.relu(x), train)
        if not head:
            return x
        return layers.Linear((c.classes,), ("embed", "classes"), initializer=he, dtype=c.dtype, name="head")(x).astype(
            jnp.float32
        )


register(
    Family(
        name="cnn",
        config=CNNConfig,
        network=CNN,
        inputs=image_inputs,
        presets={"cnn-mnist": CNNConfig()},
    )
)
