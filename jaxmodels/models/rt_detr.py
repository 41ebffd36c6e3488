"""RT-DETR: a DETR without a slow encoder, whose decoder samples a few points of three strides (Zhao et al. 2023).

A ResNet-D; attention on its last features alone; a pyramid whose features pass down and up again; the most promising
places of all strides as queries; and a decoder that refines their boxes block by block. Dims: B rows, S places of all
strides, Q queries, D width, C classes, L blocks of
the decoder.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.errors import UserError
from jaxmodels.fields import Depth, Dim, Dropped, Positive, Shape
from jaxmodels.models import layers
from jaxmodels.models.checks import check_shape, divide
from jaxmodels.models.config import ModelConfig
from jaxmodels.models.decoding import Context
from jaxmodels.models.deformable import Deformable
from jaxmodels.models.detr import Boxes
from jaxmodels.models.families import register
from jaxmodels.models.heads import MultiHead
from jaxmodels.models.inputs import image_inputs
from jaxmodels.models.kernels.kernel import Attention
from jaxmodels.models.model import Dtype, Family
from jaxmodels.models.resnet import Backbone, ResNetConfig

STRIDES = (8, 16, 32)
SIDE = 0.05
"""Side of the box from which a place of stride 8 begins, as a share of the image; twice that at the next stride."""
EDGE = 0.01
"""Places whose box begins nearer to an end of the image than this, or as large, are no queries."""
BLOCKS = 3
"""Convolutions in a joint of the pyramid."""
_xavier: Any = nn.initializers.xavier_uniform


@dataclass(frozen=True)
class RTDETRConfig(ModelConfig):
    """RT-DETR; the defaults are those with ResNet-50 for COCO."""

    input_shape: Shape = (640, 640, 3)
    """Height, width and channels of an image; 32 divides both sides."""
    classes: Dim = 80
    """Kinds of objects (C)."""
    queries: Dim = 300
    """Most objects of an image (Q)."""
    depths: tuple[Depth, ...] = (3, 4, 6, 3)
    """Blocks of each of the ResNet's four stages."""
    widths: tuple[Dim, ...] = (256, 512, 1024, 2048)
    """Channels that each stage gives."""
    bottleneck: bool = True
    """Whether blocks are 1×1, 3×3 and 1×1 convolutions, or else two 3×3."""
    stem_width: Dim = 64
    """Channels that the stem gives."""
    frozen: bool = True
    """Whether the ResNet's normalizations are constants, as with weights that were trained before."""
    layers: Depth = 1
    """Blocks of attention on the last features."""
    decoder_layers: Depth = 6
    """Blocks of the decoder (L)."""
    heads: Depth = 8
    """Attention heads (H)."""
    width: Dim = 256
    """Channels of the pyramid and size of the decoder's residual stream (D), which 4 divides."""
    mlp_width: Dim = 1024
    """Hidden units of a block's MLP."""
    expansion: Positive = 1.0
    """Channels inside a joint of the pyramid, as a multiple of its width."""
    points: Dim = 4
    """Places of each stride that a head looks at (P)."""
    dropout: Dropped = 0.0
    """Share dropped while training of attention weights, hidden units and what each sublayer adds."""
    dtype: Dtype = "float32"
    """Type of activations and products; parameters stay float32."""
    attention: Attention = "auto"
    """Attention kernel: auto, xla, blockwise, cudnn, splash, tokamax."""
    exclusive: ClassVar[bool] = False
    """Whether a query has one class or none, rather than a probability of each."""
    stacked: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        divide(self, "width", "heads")
        if self.width % 4:
            near = max(round(self.width / 4), 1) * 4
            raise UserError(f"got width {self.width}, expected one that 4 divides, try --model.width {near}")
        if len(self.depths) != 4:
            raise UserError(f"got depths {self.depths}, expected four stages, try --model.depths 3 4 6 3")
        height, width, channels = self.input_shape
        if height % STRIDES[-1] or width % STRIDES[-1]:
            near = [max(round(side / STRIDES[-1]), 1) * STRIDES[-1] for side in (height, width)]
            raise UserError(
                f"got images of {height}x{width}, expected sides that {STRIDES[-1]} divides, "
                f"try --model.input-shape {near[0]} {near[1]} {channels}"
            )
        if self.queries > len(self.anchors_inside()[0]):
            raise UserError(
                f"got {self.queries} queries for {len(self.anchors_inside()[0])} places, expected no more, "
                f"try --model.queries {len(self.anchors_inside()[0])}"
            )
        _ = self.backbone  # which checks depths and widths

    @property
    def backbone(self) -> ResNetConfig:
        return ResNetConfig(
            input_shape=self.input_shape,
            depths=self.depths,
            widths=self.widths,
            bottleneck=self.bottleneck,
            stem_width=self.stem_width,
            variant="d",
            frozen=self.frozen,
            dtype=self.dtype,
        )

    def sides(self) -> list[tuple[int, int]]:
        """Height and width of the features of each stride."""
        return [(self.input_shape[0] // s, self.input_shape[1] // s) for s in STRIDES]

    def anchors_inside(self) -> tuple[np.ndarray, np.ndarray]:
        """Logits of the boxes from which places begin (S, 4), by center and size, and which of them count (S, 1)."""
        found = []
        for i, (height, width) in enumerate(self.sides()):
            y, x = np.divmod(np.arange(height * width), width)
            size = np.full(len(x), SIDE * 2**i)
            found.append(np.stack([(x + 0.5) / width, (y + 0.5) / height, size, size], -1))
        boxes = np.concatenate(found)
        inside = np.asarray(((boxes > EDGE) & (boxes < 1 - EDGE)).all(-1, keepdims=True))
        logits = np.log(boxes / (1 - boxes))
        return np.where(inside, logits, np.finfo(np.float32).max).astype(np.float32), inside


class Unit(nn.Module):
    """A convolution, batch normalization, and SiLU where it is wanted."""

    config: RTDETRConfig
    features: int
    train: bool
    window: int = 1
    stride: int = 1
    active: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        around = (self.window - 1) // 2
        x = layers.Conv(
            self.features,
            (self.window, self.window),
            (self.stride, self.stride),
            ((around, around), (around, around)),
            bias=False,
            initializer=nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),  # PyTorch's
            dtype=self.config.dtype,
            name="conv",
        )(x)
        x = layers.BatchNorm(name="norm")(x, self.train)
        return layers.shard(nn.silu(x) if self.active else x, "batch", None, None, "channels_out")


class Joint(nn.Module):
    """A cross-stage partial block: through convolutions of 3×3 and 1×1 (Ding et al. 2021), and past them."""

    config: RTDETRConfig
    train: bool

    @nn.compact
    def __call__(self, *parts: jax.Array) -> jax.Array:
        c, whole = self.config, jnp.concatenate(parts, -1)
        hidden = int(c.width * c.expansion)
        x = Unit(c, hidden, self.train, name="through")(whole)
        for i in range(BLOCKS):
            wide = Unit(c, hidden, self.train, 3, active=False, name=f"wide{i}")
            x = nn.silu(wide(x) + Unit(c, hidden, self.train, active=False, name=f"narrow{i}")(x))
        x = x + Unit(c, hidden, self.train, name="past")(whole)
        return x if hidden == c.width else Unit(c, c.width, self.train, name="joined")(x)


def places(height: int, width: int, size: int) -> np.ndarray:
    """Sines and cosines of the rows, then of the columns, of a raster: (h · w, size)."""
    frequencies = 10_000.0 ** -(np.arange(size // 4) / (size // 4))
    y, x = np.divmod(np.arange(height * width), width)
    angles = [np.outer(at, frequencies) for at in (y, x)]
    return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], -1).astype(np.float32)


class Within(nn.Module):
    """Self-attention on x (B, T, D) whose queries and keys have places (…, T, D), and a norm behind the sum."""

    config: RTDETRConfig
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array, at: jax.Array) -> jax.Array:
        c = self.config
        attn = MultiHead(
            c.heads,
            c.width // c.heads,
            dropout=c.dropout,
            train=self.train,
            initializers=(_xavier(in_axis=0, out_axis=(1, 2)),) * 3 + (_xavier(in_axis=(0, 1), out_axis=2),),
            dtype=c.dtype,
            kernel=c.attention,
            name="attn",
        )
        at = at.astype(c.dtype)
        y, _ = attn(x, Context(), places=(at, at))
        return layers.LayerNorm(name="attn_norm")(x + layers.Dropout(c.dropout)(y, self.train))


class Hidden(nn.Module):
    """An MLP, and a norm behind the sum."""

    config: RTDETRConfig
    activation: Any
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, init = self.config, (_xavier(), _xavier())
        how = {"dropout": c.dropout, "train": self.train, "initializers": init, "dtype": c.dtype}
        y = layers.MLP(c.mlp_width, self.activation, name="mlp", **how)(x)
        return layers.LayerNorm(name="mlp_norm")(x + layers.Dropout(c.dropout)(y, self.train))


class Mixer(nn.Module):
    """A block of attention and an MLP on one stride's features (B, h, w, D)."""

    config: RTDETRConfig
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        B, h, w, D = x.shape
        x = Within(self.config, self.train, name="within")(x.reshape(B, h * w, D), jnp.asarray(places(h, w, D)))
        return Hidden(self.config, layers.exact_gelu, self.train, name="hidden")(x).reshape(B, h, w, D)


class Pyramid(nn.Module):
    """Fuse features of three strides: first from the coarsest to the finest, then back."""

    config: RTDETRConfig
    train: bool

    @nn.compact
    def __call__(self, *features: jax.Array) -> list[jax.Array]:
        c, train = self.config, self.train
        down = [features[-1]]
        for i, finer in enumerate(features[-2::-1]):
            down[-1] = Unit(c, c.width, train, name=f"lateral{i}")(down[-1])
            down.append(Joint(c, train, name=f"down{i}")(down[-1].repeat(2, 1).repeat(2, 2), finer))
        up = [down.pop()]
        for i, coarser in enumerate(down[::-1]):
            halved = Unit(c, c.width, train, 3, 2, name=f"halved{i}")(up[-1])
            up.append(Joint(c, train, name=f"up{i}")(halved, coarser))
        return up


class Block(nn.Module):
    """Attention of queries to each other and to the features around their boxes, and an MLP."""

    config: RTDETRConfig
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array, at: jax.Array, memory: jax.Array, boxes: jax.Array) -> jax.Array:
        c = self.config
        x = Within(c, self.train, name="within")(x, at)
        cross = Deformable(c.heads, c.points, c.sides(), c.dtype, name="cross")
        y = layers.Dropout(c.dropout)(cross(x + at, memory, boxes), self.train)
        x = layers.LayerNorm(name="cross_norm")(x + y)
        x = Hidden(c, nn.relu, self.train, name="hidden")(x)
        return layers.shard(x, "batch", "seq", None)


class RTDETR(nn.Module):
    """Images (B, H, W, 3) to (B, Q, 4 + C) in float32, or with `every` (1 + L, B, Q, 4 + C) of all steps to them.

    Of each query: a box's center, width and height as shares of the image, and a logit of each class. The first step is
    the choice of the queries, the others are the blocks of the decoder. Published weights take pixels from 0 to 1.
    """

    config: RTDETRConfig

    @nn.compact
    def __call__(self, images: jax.Array, *, every: bool = False, train: bool = False) -> jax.Array:
        c = self.config
        check_shape(images, c.input_shape)
        features = Backbone(c.backbone, train, name="backbone")(images)[1:]

        def level(name: str, features: list[jax.Array]) -> list[jax.Array]:
            return [
                Unit(c, c.width, train, active=False, name=f"{name}{s}")(x)
                for s, x in zip(STRIDES, features, strict=True)
            ]

        features = level("project", features)
        for i in range(c.layers):
            features[-1] = Mixer(c, train, name=f"mixer{i}")(features[-1])
        features = level("memory", Pyramid(c, train, name="pyramid")(*features))
        memory = jnp.concatenate([x.reshape(len(x), -1, c.width) for x in features], 1)
        memory = layers.shard(memory, "batch", None, None)

        anchors, inside = c.anchors_inside()
        project = layers.Linear((c.width,), ("features", "embed"), dtype=c.dtype, name="candidates")
        candidates = project(jnp.asarray(inside, memory.dtype) * memory)
        candidates = layers.LayerNorm(name="candidates_norm")(candidates)
        classes = self.kinds("class", candidates)
        boxes = Boxes(c.dtype, layers.zeros, name="box")(candidates) + anchors
        _, chosen = jax.lax.top_k(classes.max(-1), c.queries)
        x, boxes, classes = (jnp.take_along_axis(each, chosen[..., None], 1) for each in (candidates, boxes, classes))
        x, boxes = jax.lax.stop_gradient(x), jax.nn.sigmoid(boxes)

        found, where = [jnp.concatenate([boxes, classes], -1)], Where(c.width, c.dtype, name="where")
        for i in range(c.decoder_layers):
            boxes = jax.lax.stop_gradient(boxes)
            x = Block(c, train, name=f"block{i}")(x, where(boxes), memory, boxes)
            boxes = jax.nn.sigmoid(Boxes(c.dtype, layers.zeros, name=f"box{i}")(x) + unsigmoid(boxes))
            found.append(jnp.concatenate([boxes, self.kinds(f"class{i}", x)], -1))
        return jnp.stack(found) if every else found[-1]

    def kinds(self, name: str, x: jax.Array) -> jax.Array:
        """The logits of classes, each of which is as rare in the beginning as if they were all alike."""
        rare = nn.initializers.constant(-math.log(self.config.classes))
        axes, count = ("embed", "classes"), (self.config.classes,)
        head = layers.Linear(count, axes, initializer=_xavier(), bias_initializer=rare, name=name)
        return head(x.astype(jnp.float32))


class Where(nn.Module):
    """Two linear layers from boxes (…, 4) to the position embeddings of queries and keys (…, D)."""

    width: int
    dtype: Dtype

    @nn.compact
    def __call__(self, boxes: jax.Array) -> jax.Array:
        first = layers.Linear((2 * self.width,), ("features", "mlp"), dtype=self.dtype, name="0")
        return layers.Linear((self.width,), ("mlp", "embed"), dtype=self.dtype, name="1")(nn.relu(first(boxes)))


def unsigmoid(x: jax.Array) -> jax.Array:
    """The logit of a share, as of one that is neither 0 nor 1."""
    least = 1e-5
    return jnp.log(jnp.maximum(x, least) / jnp.maximum(1 - x, least))


small = RTDETRConfig(bottleneck=False, depths=(2, 2, 2, 2), widths=(64, 128, 256, 512), expansion=0.5, decoder_layers=3)

register(
    Family(
        name="rt_detr",
        config=RTDETRConfig,
        network=RTDETR,
        inputs=image_inputs,
        presets={
            # Zhao et al. 2023, table 2
            "rt-detr-r18": small,
            "rt-detr-r34": dataclasses.replace(small, depths=(3, 4, 6, 3), decoder_layers=4),
            "rt-detr-r50": RTDETRConfig(),
        },
    )
)
