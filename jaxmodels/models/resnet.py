"""ResNet v1.5: residual convolutions with batch normalization (He et al. 2015).

v1.5 is the variant of PyTorch and NVIDIA: a bottleneck's stride is in its 3×3 convolution, not in the first 1×1. He et
al. 2019 call it ResNet-B, and add ResNet-D.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

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
class ResNetConfig(ModelConfig):
    """ResNet; the defaults are ResNet-50."""

    input_shape: Shape = (224, 224, 3)
    """Height, width and channels of an image."""
    classes: Dim = 1000
    """Outputs."""
    depths: tuple[Depth, ...] = (3, 4, 6, 3)
    """Blocks of each stage; each stage but the first begins by halving height and width."""
    widths: tuple[Dim, ...] = (256, 512, 1024, 2048)
    """Channels that each stage gives; inside a bottleneck there are a quarter of them."""
    bottleneck: bool = True
    """Whether blocks are 1×1, 3×3 and 1×1 convolutions, or else two 3×3."""
    stem: Literal["imagenet", "small"] = "imagenet"
    """imagenet: a 7×7 convolution with stride 2 and a pooling; small: a 3×3 convolution, for images such as 32×32."""
    stem_width: Dim = 64
    """Channels that the stem gives."""
    variant: Literal["b", "d"] = "b"
    """b: ResNet v1.5; d: three 3×3 convolutions for the stem's 7×7, and shortcuts that average before they convolve."""
    frozen: bool = False
    """Whether normalization is by constants, which come with trained weights, rather than by statistics of a batch."""
    stochastic_depth: Dropped = 0.0
    """Share of examples that skip the last block while training; earlier blocks in proportion (Huang et al. 2016)."""
    dtype: Dtype = "float32"
    """Type of activations and products; parameters stay float32."""
    remat: Literal["none", "full"] = "none"
    """What the backward pass recomputes: nothing, or whole blocks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.depths) != len(self.widths) or not self.depths:
            raise UserError(
                f"got depths {self.depths} with widths {self.widths}, expected one of each for a stage, "
                f"try widths {tuple(64 * 2**i for i in range(len(self.depths) or 4))}"
            )
        least = 4 if self.bottleneck else 1
        if min(self.depths) < 1 or min(self.widths) < least:
            raise UserError(
                f"got depths {self.depths} and widths {self.widths}, "
                f"expected depths from 1 and widths from {least} up, try the defaults"
            )


class ConvNorm(nn.Module):
    """A convolution without bias, padded to keep the size, and batch normalization."""

    features: int
    window: int
    stride: int
    train: bool
    dtype: Dtype
    inputs: str = "channels_in"
    frozen: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        around = self.window // 2
        x = layers.Conv(
            self.features,
            (self.window, self.window),
            (self.stride, self.stride),
            ((around, around), (around, around)),
            bias=False,
            axes=(self.inputs, "channels_out"),
            dtype=self.dtype,
            name="conv",
        )(x)
        return layers.FrozenNorm(name="norm")(x) if self.frozen else layers.BatchNorm(name="norm")(x, self.train)


class Block(nn.Module):
    """Two or three convolutions beside a shortcut, which is a convolution where the shape changes."""

    config: ResNetConfig
    features: int
    stride: int
    train: bool
    skipped: float = 0.0
    first: bool = False
    """Whether its shortcut is a convolution even where no shape changes."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, width = self.config, self.features

        def unit(x: jax.Array, name: str, features: int, window: int, stride: int = 1) -> jax.Array:
            return ConvNorm(features, window, stride, self.train, c.dtype, frozen=c.frozen, name=name)(x)

        if c.bottleneck:
            y = nn.relu(unit(x, "unit0", width // 4, 1))
            y = nn.relu(unit(y, "unit1", width // 4, 3, self.stride))
            y = unit(y, "unit2", width, 1)
        else:
            y = nn.relu(unit(x, "unit0", width, 3, self.stride))
            y = unit(y, "unit1", width, 3)
        if c.variant == "d" and self.stride != 1:
            x = unit(halved(x), "shortcut", width, 1)
        elif x.shape[-1] != width or self.stride != 1 or self.first:
            x = unit(x, "shortcut", width, 1, self.stride)
        y = layers.StochasticDepth()(y, self.skipped, self.train)
        return layers.shard(nn.relu(x + y), "batch", None, None, "channels_out")


class Stage(nn.Module):
    """Blocks of one width; the first one has the stride."""

    config: ResNetConfig
    index: int
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        block = nn.remat(Block, prevent_cse=False) if c.remat == "full" else Block
        for i in range(c.depths[self.index]):
            stride = 2 if self.index and not i else 1
            skipped = c.stochastic_depth * (sum(c.depths[: self.index]) + i + 1) / sum(c.depths)
            first = c.variant == "d" and not c.bottleneck and not i  # as in the published ResNet-D of 18 and 34 layers
            x = block(c, c.widths[self.index], stride, self.train, skipped, first, name=str(i))(x)
        return x


class Stages(nn.Module):
    config: ResNetConfig
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> list[jax.Array]:
        found = []
        for i in range(len(self.config.depths)):
            x = Stage(self.config, i, self.train, name=str(i))(x)
            found.append(x)
        return found


class Stem(nn.Module):
    """The three convolutions of ResNet-D, the first with stride 2."""

    config: ResNetConfig
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, half = self.config, self.config.stem_width // 2
        for i, (width, stride) in enumerate(((half, 2), (half, 1), (c.stem_width, 1))):
            inputs = "channels_in" if i else "features"
            x = nn.relu(ConvNorm(width, 3, stride, self.train, c.dtype, inputs, c.frozen, name=str(i))(x))
        return x


def halved(x: jax.Array) -> jax.Array:
    """Averages of 2×2 places of (B, H, W, C); what an odd side lacks is not counted."""
    x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)), mode="edge")
    return (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4


def features(c: ResNetConfig, images: jax.Array, train: bool) -> list[jax.Array]:
    """What each stage gives (B, H, W, C), for the `__call__` of a network, whose submodules `stem` and `stages` are."""
    if c.stem == "imagenet" and c.variant == "d":
        x = Stem(c, train, name="stem")(images)
    else:
        window, stride = (7, 2) if c.stem == "imagenet" else (3, 1)
        stem = ConvNorm(c.stem_width, window, stride, train, c.dtype, "features", c.frozen, name="stem")
        x = nn.relu(stem(images))
    if c.stem == "imagenet":
        x = layers.max_pool(x, 3, 2, 1)
    return Stages(c, train, name="stages")(layers.shard(x, "batch", None, None, "channels_out"))


class Backbone(nn.Module):
    """Images (B, H, W, C) to what each stage gives, for a network that sees more than classes."""

    config: ResNetConfig
    train: bool

    @nn.compact
    def __call__(self, images: jax.Array) -> list[jax.Array]:
        return features(self.config, images, self.train)


class ResNet(nn.Module):
    """Images (B, H, W, C) to logits (B, classes) in float32, or with `head=False` to averaged features (B, D)."""

    config: ResNetConfig

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False, head: bool = True) -> jax.Array:
        c = self.config
        check_shape(images, c.input_shape)
        x = features(c, images, train)[-1].mean((1, 2))
        if not head:
            return x
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # up to 1 / sqrt(inputs), as PyTorch

        def bias(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
            bound = x.shape[-1] ** -0.5
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        return layers.Linear(
            (c.classes,), ("embed", "classes"), initializer=init, bias_initializer=bias, dtype=c.dtype, name="head"
        )(x).astype(jnp.float32)


basic = ResNetConfig(bottleneck=False, depths=(2, 2, 2, 2), widths=(64, 128, 256, 512))

register(
    Family(
        name="resnet",
        config=ResNetConfig,
        network=ResNet,
        inputs=image_inputs,
        presets={
            # He et al. 2015, table 1
            "resnet-18": basic,
            "resnet-34": dataclasses.replace(basic, depths=(3, 4, 6, 3)),
            "resnet-50": ResNetConfig(),
            "resnet-101": ResNetConfig(depths=(3, 4, 23, 3)),
            "resnet-152": ResNetConfig(depths=(3, 8, 36, 3)),
        },
    )
)
