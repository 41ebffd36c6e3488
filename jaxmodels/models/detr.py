"""DETR: a transformer that predicts an image's objects as a set, one for each of its queries (Carion et al. 2020).

A ResNet whose last features an encoder compares with each other, and a decoder whose queries look for one object each.
Dims: B rows, S places of the last features, Q queries, D width, C classes, L layers.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.errors import UserError
from jaxmodels.fields import Depth, Dim, Dropped, Shape
from jaxmodels.models import layers
from jaxmodels.models.checks import check_shape, divide
from jaxmodels.models.config import ModelConfig
from jaxmodels.models.decoding import Context
from jaxmodels.models.families import register
from jaxmodels.models.heads import MultiHead
from jaxmodels.models.inputs import image_inputs
from jaxmodels.models.kernels.kernel import Attention
from jaxmodels.models.model import Dtype, Family, Remat
from jaxmodels.models.resnet import Backbone, ResNetConfig

WAVES = 10_000.0
"""Longest wavelength of a place's sinusoids, in turns of the shortest."""
_xavier: Any = nn.initializers.xavier_uniform
INTO, OUT_OF = _xavier(in_axis=0, out_axis=(1, 2)), _xavier(in_axis=(0, 1), out_axis=2)
"""Initializers of projections to heads, (D, H, K), and back."""


@dataclass(frozen=True)
class DETRConfig(ModelConfig):
    """DETR; the defaults are those with ResNet-50 for COCO."""

    input_shape: Shape = (800, 1066, 3)
    """Height, width and channels of an image."""
    classes: Dim = 91
    """Kinds of objects; a further logit says that there is none."""
    queries: Dim = 100
    """Most objects of an image (Q)."""
    depths: tuple[Depth, ...] = (3, 4, 6, 3)
    """Blocks of each stage of the ResNet."""
    widths: tuple[Dim, ...] = (256, 512, 1024, 2048)
    """Channels that each stage gives."""
    bottleneck: bool = True
    """Whether blocks are 1×1, 3×3 and 1×1 convolutions, or else two 3×3."""
    stem_width: Dim = 64
    """Channels that the stem gives."""
    frozen: bool = True
    """Whether the ResNet's normalizations are constants, as with weights that were trained before."""
    layers: Depth = 6
    """Blocks of the encoder."""
    decoder_layers: Depth = 6
    """Blocks of the decoder (L)."""
    heads: Depth = 8
    """Attention heads."""
    width: Dim = 256
    """Size of the residual stream (D), which 4 divides."""
    mlp_width: Dim = 2048
    """Hidden units of a block's MLP."""
    dropout: Dropped = 0.1
    """Share dropped while training of attention weights, hidden units and what each sublayer adds."""
    dtype: Dtype = "float32"
    """Type of activations and products; parameters stay float32."""
    attention: Attention = "auto"
    """Attention kernel: auto, xla, blockwise, cudnn, splash, tokamax."""
    remat: Remat = "none"
    """What the backward pass recomputes: nothing, all but weight products, or blocks; offload: inputs on the host."""
    unroll: Depth = 1
    """Blocks unrolled in each iteration of a scan over layers."""
    exclusive: ClassVar[bool] = True
    """Whether a query has one class or none, rather than a probability of each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        divide(self, "width", "heads")
        if self.width % 4:
            near = max(round(self.width / 4), 1) * 4
            raise UserError(f"got width {self.width}, expected one that 4 divides, try --model.width {near}")
        _ = self.backbone  # which checks depths and widths

    @property
    def backbone(self) -> ResNetConfig:
        return ResNetConfig(
            input_shape=self.input_shape,
            depths=self.depths,
            widths=self.widths,
            bottleneck=self.bottleneck,
            stem_width=self.stem_width,
            frozen=self.frozen,
            dtype=self.dtype,
            remat="full" if self.remat == "full" else "none",
        )


def waves(at: jax.Array, width: int) -> jax.Array:
    """Numbers (…) as alternating sines and cosines (…, width)."""
    angles = at[..., None] * WAVES ** (-2.0 * np.arange(width // 2, dtype=np.float32) / width)
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], -1).reshape(*at.shape, width)


def places(seen: jax.Array, width: int) -> jax.Array:
    """Sinusoids of the rows and columns of (B, h, w), counted where an image is seen: (B, h · w, width)."""
    found = []
    for axis in (1, 2):
        count = jnp.cumsum(seen.astype(jnp.float32), axis)
        last = jax.lax.slice_in_dim(count, count.shape[axis] - 1, None, axis=axis)
        found.append(waves(count / (last + 1e-6) * 2 * math.pi, width // 2))
    return jnp.concatenate(found, -1).reshape(len(seen), -1, width)


class Shared(NamedTuple):
    """What all blocks of a stack share: places added to queries and keys, and the encoder's output with its masks."""

    places: jax.Array
    """Of what the stack itself holds."""
    ctx: Context
    memory: jax.Array | None = None
    memory_places: jax.Array | None = None


class Block(nn.Module):
    """Attention, in the decoder also to the encoder's output, and an MLP; each with a norm after its residual sum."""

    config: Any
    decoder: bool
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array, _: None, shared: Shared) -> tuple[jax.Array, jax.Array | None]:
        c, drop = self.config, layers.Dropout(self.config.dropout)

        def attention(name: str) -> MultiHead:
            return MultiHead(
                c.heads,
                c.width // c.heads,
                dropout=c.dropout,
                train=self.train,
                initializers=(INTO, INTO, INTO, OUT_OF),
                dtype=c.dtype,
                kernel=c.attention,
                name=name,
            )

        def add(name: str, x: jax.Array, y: jax.Array) -> jax.Array:
            return layers.shard(layers.LayerNorm(name=f"{name}_norm")(x + drop(y, self.train)), "batch", "seq", None)

        own = shared.places, shared.places
        ctx = Context() if self.decoder else shared.ctx  # every query of a decoder counts
        x = add("attn", x, attention("attn")(x, ctx, places=own)[0])
        if self.decoder:
            assert shared.memory_places is not None
            across = shared.places, shared.memory_places
            x = add("cross", x, attention("cross")(x, shared.ctx, memory=shared.memory, places=across)[0])
        mlp = layers.MLP(
            c.mlp_width,
            nn.relu,
            dropout=c.dropout,
            train=self.train,
            initializers=(_xavier(), _xavier()),
            dtype=c.dtype,
            name="mlp",
        )
        x = add("mlp", x, mlp(x))
        return x, x if self.decoder else None


class Boxes(nn.Module):
    """Three linear layers from (…, D) to the logits of a box's center and size (…, 4)."""

    dtype: Dtype
    last: layers.Init = _xavier()
    """Initializer of the last one."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(2):
            axes = ("embed", "mlp") if not i else ("mlp", "embed")
            x = nn.relu(layers.Linear(x.shape[-1:], axes, initializer=_xavier(), dtype=self.dtype, name=str(i))(x))
        return layers.Linear((4,), ("embed", "classes"), initializer=self.last, name="2")(x.astype(jnp.float32))


class DETR(nn.Module):
    """Images (B, H, W, 3) to (B, Q, 4 + C + 1) in float32, or with `every` those of all L decoder blocks before it.

    Of each query: a box's center, width and height as shares of the image, logits of its classes, and the logit of no
    object. `pixel_mask` (B, H, W) is 0 where an image is padded, which nothing then looks at.
    """

    config: DETRConfig

    @nn.compact
    def __call__(
        self, images: jax.Array, *, pixel_mask: jax.Array | None = None, every: bool = False, train: bool = False
    ) -> jax.Array:
        c = self.config
        check_shape(images, c.input_shape)
        x = Backbone(c.backbone, train, name="backbone")(images)[-1]
        B, h, w, _ = x.shape
        x = layers.Linear((c.width,), ("features", "embed"), dtype=c.dtype, before_stack=True, name="project")(x)
        ctx, seen = Context(), jnp.ones((1, h, w), bool)
        if pixel_mask is not None:
            rows, columns = (np.arange(n) * side // n for n, side in zip((h, w), c.input_shape, strict=False))
            seen = pixel_mask[:, rows][:, :, columns] > 0
        at = places(seen, c.width).astype(c.dtype)

        def masks(count: int) -> Context:
            """What `count` queries of an image attend to."""
            if pixel_mask is None:
                return ctx
            return Context(segment_ids=(jnp.ones((B, count), jnp.int32), seen.reshape(B, -1).astype(jnp.int32)))

        x = layers.Dropout(c.dropout)(layers.shard(x.reshape(B, h * w, -1), "batch", "seq", None), train)
        stack = layers.scan_layers(Block, c.layers, c.remat, c.unroll)(c, False, train, name="encoder")
        memory, _ = stack(x, None, Shared(at, masks(h * w)))

        axes = ("positions", "embed")
        queries = layers.parameter(self, "queries", layers.normal(1.0), axes, (c.queries, c.width), "embedding", True)
        queries = queries.astype(c.dtype)[None]
        stack = layers.scan_layers(Block, c.decoder_layers, c.remat, c.unroll)(c, True, train, name="decoder")
        x = jnp.zeros((B, c.queries, c.width), memory.dtype)
        last, found = stack(x, None, Shared(queries, masks(c.queries), memory, at))

        x = layers.LayerNorm(name="norm")(found if every else last)
        boxes = jax.nn.sigmoid(Boxes(c.dtype, name="box")(x))
        head = layers.Linear((c.classes + 1,), ("embed", "classes"), name="class")
        return jnp.concatenate([boxes, head(x.astype(jnp.float32))], -1)


base = DETRConfig()

register(
    Family(
        name="detr",
        config=DETRConfig,
        network=DETR,
        inputs=image_inputs,
        presets={
            # Carion et al. 2020, table 1
            "detr-resnet-50": base,
            "detr-resnet-101": dataclasses.replace(base, depths=(3, 4, 23, 3)),
        },
    )
)
