"""YOLOX: a detector without anchor boxes, whose head predicts a class and a box at each place (Ge et al. 2021).

A backbone of cross-stage partial blocks (Darknet), a pyramid whose features pass down and up again (PAFPN), and heads
at three strides that tell the class apart from the box. Dims: B rows, A places of all three strides, C classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.errors import UserError
from jaxmodels.fields import Dim, Positive, Shape
from jaxmodels.models import layers
from jaxmodels.models.checks import check_shape
from jaxmodels.models.config import ModelConfig
from jaxmodels.models.families import register
from jaxmodels.models.inputs import image_inputs
from jaxmodels.models.model import Dtype, Family

STRIDES = (8, 16, 32)
PRIOR = 0.01
"""Probability of an object, and of each class, with which training begins (Lin et al. 2017, section 3.3)."""


@dataclass(frozen=True)
class YOLOXConfig(ModelConfig):
    """YOLOX; the defaults are YOLOX-L."""

    input_shape: Shape = (640, 640, 3)
    """Height, width and channels of an image; 32 divides both sides."""
    classes: Dim = 80
    """Kinds of objects."""
    depth: Positive = 1.0
    """Factor of the number of blocks."""
    width: Positive = 1.0
    """Factor of the numbers of channels."""
    depthwise: bool = False
    """Whether 3×3 convolutions are one of each channel and a 1×1 of all of them, as in YOLOX-Nano."""
    dtype: Dtype = "float32"
    """Type of activations and products; parameters stay float32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        height, width, _ = self.input_shape
        if height % STRIDES[-1] or width % STRIDES[-1]:
            near = [max(round(side / STRIDES[-1]), 1) * STRIDES[-1] for side in (height, width)]
            raise UserError(
                f"got images of {height}x{width}, expected sides that {STRIDES[-1]} divides, "
                f"try --model.input-shape {near[0]} {near[1]} {self.input_shape[2]}"
            )
        if self.channels(64) < 2:
            raise UserError(f"got width {self.width}, expected two channels or more of 64, try --model.width 0.25")

    def channels(self, count: int) -> int:
        """Scale a number of channels of YOLOX-L."""
        return int(count * self.width)

    @property
    def blocks(self) -> int:
        """How many residual blocks a stage has, or a third of them: three in YOLOX-L."""
        return max(round(3 * self.depth), 1)

    def anchors(self) -> np.ndarray:
        """Centers and strides of the places that the outputs are of, in pixels, (A, 3)."""
        found = []
        for stride in STRIDES:
            rows, columns = self.input_shape[0] // stride, self.input_shape[1] // stride
            y, x = np.divmod(np.arange(rows * columns), columns)
            found.append(np.stack([(x + 0.5) * stride, (y + 0.5) * stride, np.full(len(x), stride)], -1))
        return np.concatenate(found).astype(np.float32)


class Unit(nn.Module):
    """A convolution, batch normalization, and SiLU."""

    config: YOLOXConfig
    features: int
    train: bool
    window: int = 1
    stride: int = 1
    each: bool = False
    """Whether each channel is convolved by itself."""
    first: bool = False
    """Whether its inputs are pixels."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        around, groups = (self.window - 1) // 2, x.shape[-1] if self.each else 1
        x = layers.Conv(
            self.features,
            (self.window, self.window),
            (self.stride, self.stride),
            ((around, around), (around, around)),
            groups,
            bias=False,
            axes=("features" if self.each or self.first else "channels_in", "channels_out"),
            initializer=nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),  # PyTorch's
            dtype=self.config.dtype,
            name="conv",
        )(x)
        x = nn.silu(layers.BatchNorm(momentum=0.97, eps=1e-3, name="norm")(x, self.train))
        return layers.shard(x, "batch", None, None, "channels_out")


class Wide(nn.Module):
    """A 3×3 unit, or with `depthwise` one of each channel and a 1×1 unit of all."""

    config: YOLOXConfig
    features: int
    train: bool
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        if not c.depthwise:
            return Unit(c, self.features, self.train, 3, self.stride, name="full")(x)
        x = Unit(c, x.shape[-1], self.train, 3, self.stride, each=True, name="depth")(x)
        return Unit(c, self.features, self.train, name="point")(x)


class Partial(nn.Module):
    """A cross-stage partial block: half of the channels go through blocks, half past them (Wang et al. 2019)."""

    config: YOLOXConfig
    features: int
    blocks: int
    train: bool
    residual: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, half = self.config, self.features // 2
        past = Unit(c, half, self.train, name="past")(x)
        x = Unit(c, half, self.train, name="through")(x)
        for i in range(self.blocks):
            y = Wide(c, half, self.train, name=f"wide{i}")(Unit(c, half, self.train, name=f"narrow{i}")(x))
            x = x + y if self.residual else y
        return Unit(c, self.features, self.train, name="joined")(jnp.concatenate([x, past], -1))


class Pooled(nn.Module):
    """Maxima of windows of 5, 9 and 13 beside the features themselves (spatial pyramid pooling)."""

    config: YOLOXConfig
    features: int
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = Unit(self.config, self.features // 2, self.train, name="narrow")(x)
        every = [x]
        for _ in range(3):  # the maximum over 9 is that of 5 over 5
            every.append(layers.max_pool(every[-1], 5, 1, 2))
        return Unit(self.config, self.features, self.train, name="joined")(jnp.concatenate(every, -1))


class Backbone(nn.Module):
    """Images to features at strides 8, 16 and 32."""

    config: YOLOXConfig
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> list[jax.Array]:
        c = self.config
        # neighbours of 2×2 become channels: upper left, lower left, upper right, lower right
        x = jnp.concatenate([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)
        x = Unit(c, c.channels(64), self.train, 3, first=True, name="stem")(x)
        found = []
        few, many = c.blocks, 3 * c.blocks
        for i, (features, blocks) in enumerate(zip((128, 256, 512, 1024), (few, many, many, few), strict=True)):
            last, features = i == 3, c.channels(64) * features // 64
            x = Wide(c, features, self.train, 2, name=f"halved{i}")(x)
            if last:
                x = Pooled(c, features, self.train, name="pooled")(x)
            x = Partial(c, features, blocks, self.train, residual=not last, name=f"stage{i}")(x)
            found.append(x)
        return found[1:]


class Pyramid(nn.Module):
    """Fuse features of three strides: first from the coarsest to the finest, then back."""

    config: YOLOXConfig
    train: bool

    @nn.compact
    def __call__(self, fine: jax.Array, middle: jax.Array, coarse: jax.Array) -> list[jax.Array]:
        c = self.config

        def joined(name: str, features: int, *parts: jax.Array) -> jax.Array:
            whole = jnp.concatenate(parts, -1)
            return Partial(c, c.channels(features), c.blocks, self.train, residual=False, name=name)(whole)

        coarse = Unit(c, c.channels(512), self.train, name="coarse")(coarse)
        down = joined("down_middle", 512, doubled(coarse), middle)
        middle = Unit(c, c.channels(256), self.train, name="middle")(down)
        fine = joined("down_fine", 256, doubled(middle), fine)
        up = Wide(c, c.channels(256), self.train, 2, name="halved_fine")(fine)
        middle = joined("up_middle", 512, up, middle)
        up = Wide(c, c.channels(512), self.train, 2, name="halved_middle")(middle)
        return [fine, middle, joined("up_coarse", 1024, up, coarse)]


def doubled(x: jax.Array) -> jax.Array:
    """Repeat each place of (B, H, W, C) in both directions."""
    return x.repeat(2, 1).repeat(2, 2)


class Head(nn.Module):
    """Features of one stride to (B, H · W, 5 + C): offsets and logarithms of sizes, objectness, and classes."""

    config: YOLOXConfig
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, features = self.config, self.config.channels(256)

        def towers(name: str, x: jax.Array) -> jax.Array:
            for i in range(2):
                x = Wide(c, features, self.train, name=f"{name}{i}")(x)
            return x

        def head(name: str, x: jax.Array, count: int, bias: float = 0.0) -> jax.Array:
            uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
            return layers.Linear(
                (count,), ("embed", "classes"), True, uniform, c.dtype, nn.initializers.constant(bias), name=name
            )(x).astype(jnp.float32)

        rare = -math.log((1 - PRIOR) / PRIOR)
        x = Unit(c, features, self.train, name="narrow")(x)
        kind, place = towers("kind", x), towers("place", x)
        found = [head("box", place, 4), head("object", place, 1, rare), head("class", kind, c.classes, rare)]
        return jnp.concatenate(found, -1).reshape(len(x), -1, 5 + c.classes)


class YOLOX(nn.Module):
    """Images (B, H, W, 3) to (B, A, 5 + C) in float32; published weights take pixels from 0 to 255.

    Of each place: a box's corners (left, top, right, bottom) in pixels, a logit of whether there is an object, and
    logits of its classes. The places are those of `YOLOXConfig.anchors`.
    """

    config: YOLOXConfig

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        c = self.config
        check_shape(images, c.input_shape)
        features = Pyramid(c, train, name="pyramid")(*Backbone(c, train, name="backbone")(images))
        found = [Head(c, train, name=f"head{s}")(x) for s, x in zip(STRIDES, features, strict=True)]
        out = layers.shard(jnp.concatenate(found, 1), "batch", None, None)
        at, stride = jnp.asarray(c.anchors()[:, :2]), jnp.asarray(c.anchors()[:, 2:])
        # offsets are from a place's corner
        middle, half = at + (out[..., :2] - 0.5) * stride, jnp.exp(out[..., 2:4]) * stride / 2
        return jnp.concatenate([middle - half, middle + half, out[..., 4:]], -1)


register(
    Family(
        name="yolox",
        config=YOLOXConfig,
        network=YOLOX,
        inputs=image_inputs,
        presets={
            # Ge et al. 2021, tables 3 and 4
            "yolox-nano": YOLOXConfig((416, 416, 3), depth=0.33, width=0.25, depthwise=True),
            "yolox-tiny": YOLOXConfig((416, 416, 3), depth=0.33, width=0.375),
            "yolox-s": YOLOXConfig(depth=0.33, width=0.5),
            "yolox-m": YOLOXConfig(depth=0.67, width=0.75),
            "yolox-l": YOLOXConfig(),
            "yolox-x": YOLOXConfig(depth=1.33, width=1.25),
        },
    )
)
