"""SegFormer: a hierarchy of transformers on overlapping patches, and a decoder of linear layers (Xie et al. 2021)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmodels.errors import UserError
from jaxmodels.fields import Depth, Dim, Dropped, Shape
from jaxmodels.models import layers
from jaxmodels.models.checks import check_shape
from jaxmodels.models.config import ModelConfig
from jaxmodels.models.decoding import Context
from jaxmodels.models.families import register
from jaxmodels.models.heads import MultiHead
from jaxmodels.models.inputs import image_inputs
from jaxmodels.models.kernels.convolution import depthwise
from jaxmodels.models.kernels.kernel import Attention
from jaxmodels.models.model import Dtype, Family, Remat
from jaxmodels.models.parameters import parameter, weight


@dataclass(frozen=True)
class SegFormerConfig(ModelConfig):
    """SegFormer; the defaults are B0 for the 150 classes of ADE20K."""

    input_shape: Shape = (512, 512, 3)
    """Height, width and channels of an image."""
    classes: Dim = 150
    """Classes of a pixel; logits are given for each `strides[0]`-th pixel in either direction."""
    depths: tuple[Depth, ...] = (2, 2, 2, 2)
    """Blocks of each stage."""
    widths: tuple[Dim, ...] = (32, 64, 160, 256)
    """Size of the residual stream of each stage."""
    heads: tuple[Depth, ...] = (1, 2, 5, 8)
    """Attention heads of each stage; each divides its width."""
    reductions: tuple[Dim, ...] = (8, 4, 2, 1)
    """Side of the squares of tokens that are merged into one key and value, of each stage."""
    windows: tuple[Dim, ...] = (7, 3, 3, 3)
    """Side of the overlapping patches from which each stage begins."""
    strides: tuple[Dim, ...] = (4, 2, 2, 2)
    """Distance of their centers."""
    mlp_ratio: Dim = 4
    """Hidden units of a block's MLP, as a multiple of its width."""
    decoder_width: Dim = 256
    """Channels of the decoder."""
    dropout: Dropped = 0.1
    """Share of the decoder's channels dropped while training."""
    stochastic_depth: Dropped = 0.1
    """Share of examples that skip the last block while training; earlier blocks in proportion, the first none."""
    dtype: Dtype = "float32"
    """Type of activations and products; parameters stay float32."""
    attention: Attention = "auto"
    """Attention kernel: auto, xla, blockwise, cudnn, splash, tokamax."""
    remat: Remat = "none"
    """What the backward pass recomputes: nothing, all but weight products, or blocks; offload: inputs on the host."""
    unroll: Depth = 1
    """Blocks unrolled in each iteration of the scan over a stage's blocks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        each = ("depths", "widths", "heads", "reductions", "windows", "strides")
        if wrong := [name for name in each if len(getattr(self, name)) != len(self.depths) or not self.depths]:
            raise UserError(
                f"got {wrong[0]} {getattr(self, wrong[0])} for depths {self.depths}, expected one of each for a stage"
            )
        for width, heads in zip(self.widths, self.heads, strict=True):
            if width % heads:
                raise UserError(f"got widths {self.widths} with heads {self.heads}, expected each to divide its width")
        size = self.input_shape[:2]
        for window, stride, reduction in zip(self.windows, self.strides, self.reductions, strict=True):
            size = tuple((n + 2 * (window // 2) - window) // stride + 1 for n in size)
            if min(size) < reduction:
                raise UserError(
                    f"got images of {self.input_shape[0]}×{self.input_shape[1]}, which leave {size[0]}×{size[1]} "
                    f"tokens to a stage that merges {reduction}×{reduction} of them, expected as many at least, "
                    f"try --model.input-shape {math.prod(self.strides)} {math.prod(self.strides)} {self.input_shape[2]}"
                )


class Depthwise(nn.Module):
    """A 3×3 convolution of each channel by itself, of (B, H, W, C) by w[3, 3, C].

    Shifted products, which fuse: on a CPU a convolution in as many groups as channels took 5 to 19 times as long.
    """

    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        axes, init = ("window", "window", "mlp"), layers.normal(math.sqrt(2 / 9))
        w: Any = weight(self, "w", init, axes, (3, 3, channels), self.dtype, "matrix")
        b = parameter(self, "b", nn.initializers.zeros, ("mlp",), (channels,), "bias")
        return depthwise(x, w[:, :, None], (1, 1), "SAME") + b.astype(self.dtype)


class MixMLP(nn.Module):
    """down(gelu(mix(up(x)))), where `mix` sees neighbors, and with them positions."""

    hidden: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = layers.Linear((self.hidden,), ("embed", "mlp"), dtype=self.dtype, name="up")(x)
        y = Depthwise(self.dtype, name="mix")(layers.shard(y, "batch", None, None, "mlp"))
        y = layers.shard(layers.exact_gelu(y), "batch", None, None, "mlp")
        return layers.Linear(x.shape[-1:], ("mlp", "embed"), dtype=self.dtype, name="down")(y)


class Block(nn.Module):
    """Attention to merged tokens and an MLP on (B, H, W, D), each with a normalization and a residual around it."""

    config: SegFormerConfig
    stage: int
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array, rate: Any, ctx: Context) -> tuple[jax.Array, None]:
        c, skip = self.config, layers.StochasticDepth()
        B, H, W, D = x.shape
        heads, reduction = c.heads[self.stage], c.reductions[self.stage]
        rate = 0.0 if rate is None else rate
        y, memory = layers.LayerNorm(name="attn_norm")(x), None
        if reduction > 1:
            window = (reduction, reduction)
            merge = layers.Conv(D, window, window, "VALID", dtype=c.dtype, name="merge")
            memory = layers.LayerNorm(name="merge_norm")(merge(y)).reshape(B, -1, D)
        attn = MultiHead(heads, D // heads, dtype=c.dtype, kernel=c.attention, name="attn")
        y, _ = attn(y.reshape(B, H * W, D), ctx, memory=memory)
        x = x + skip(y.reshape(x.shape), rate, self.train)
        mlp = MixMLP(c.mlp_ratio * D, c.dtype, name="mlp")
        x = x + skip(mlp(layers.LayerNorm(name="mlp_norm")(x)), rate, self.train)
        return layers.shard(x, "batch", None, None, None), None


class Stage(nn.Module):
    """Overlapping patches of (B, H, W, C), and blocks on them."""

    config: SegFormerConfig
    index: int
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c, i = self.config, self.index
        window, stride, around = c.windows[i], c.strides[i], c.windows[i] // 2
        x = layers.Conv(
            c.widths[i],
            (window, window),
            (stride, stride),
            ((around, around), (around, around)),
            axes=("features" if not i else "channels_in", "channels_out"),
            dtype=c.dtype,
            name="patches",
        )(x)
        x = layers.LayerNorm(name="patches_norm")(x)
        first, total = sum(c.depths[:i]), max(sum(c.depths) - 1, 1)
        rates = c.stochastic_depth * jnp.arange(first, first + c.depths[i]) / total if c.stochastic_depth else None
        blocks = layers.scan_layers(Block, c.depths[i], c.remat, c.unroll)(c, i, self.train, name="layers")
        x, _ = blocks(layers.shard(x, "batch", None, None, None), rates, Context())
        return layers.LayerNorm(name="norm")(x)


class SegFormer(nn.Module):
    """Images (B, H, W, C) to logits (B, H / 4, W / 4, classes) in float32.

    The decoder's product over the joined stages is a sum of one product for each, and products and enlargements
    commute: so each stage is multiplied at its own resolution.
    """

    config: SegFormerConfig

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        c, x, decoded = self.config, images, []
        check_shape(images, c.input_shape)
        for i in range(len(c.depths)):
            x = Stage(c, i, train, name=f"stage{i}")(x)
            y = layers.Linear((c.decoder_width,), ("embed", "mlp"), dtype=c.dtype, name=f"decode{i}")(x)
            y = layers.Linear((c.decoder_width,), ("mlp", "embed"), bias=False, dtype=c.dtype, name=f"fuse{i}")(y)
            first = decoded[0].shape if decoded else y.shape
            decoded.append(jax.image.resize(y, first, "bilinear"))
        y = nn.relu(layers.BatchNorm(name="fuse_norm")(sum(decoded[1:], decoded[0]), train))
        y = layers.Dropout(c.dropout)(layers.shard(y, "batch", None, None, "channels_out"), train)
        return layers.Linear((c.classes,), ("channels_in", "classes"), name="head")(y.astype(jnp.float32))


def preset(depths: tuple[int, ...], widths: tuple[int, ...] = (64, 128, 320, 512), decoder: int = 768) -> Any:
    return dataclasses.replace(SegFormerConfig(), depths=depths, widths=widths, decoder_width=decoder)


register(
    Family(
        name="segformer",
        config=SegFormerConfig,
        network=SegFormer,
        inputs=image_inputs,
        presets={
            # Xie et al. 2021, table 6; the decoder of B1 has 256 channels as B0's
            "segformer-b0": SegFormerConfig(),
            "segformer-b1": preset((2, 2, 2, 2), decoder=256),
            "segformer-b2": preset((3, 4, 6, 3)),
            "segformer-b3": preset((3, 4, 18, 3)),
            "segformer-b4": preset((3, 8, 27, 3)),
            "segformer-b5": preset((3, 6, 40, 3)),
        },
    )
)
