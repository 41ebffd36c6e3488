"""Vision Transformer: an encoder of image patches with pre-normalization (Dosovitskiy et al. 2020)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmodels.fields import Depth, Dim, Dropped, Positive, Shape
from jaxmodels.models import layers
from jaxmodels.models.checks import check_patches, check_shape, divide
from jaxmodels.models.config import ModelConfig
from jaxmodels.models.decoding import Context
from jaxmodels.models.families import register
from jaxmodels.models.heads import MultiHead
from jaxmodels.models.inputs import image_inputs
from jaxmodels.models.kernels.kernel import Attention
from jaxmodels.models.model import Dtype, Family, Remat
from jaxmodels.models.patches import embed_patches


@dataclass(frozen=True)
class ViTConfig(ModelConfig):
    """ViT; the defaults are ViT-B/16."""

    input_shape: Shape = (224, 224, 3)
    """Height, width and channels of an image."""
    patch: Dim = 16
    """Side of a square patch; must divide height and width."""
    classes: Dim = 1000
    """Outputs."""
    layers: Depth = 12
    """Blocks."""
    heads: Depth = 12
    """Attention heads (H); must divide `width`."""
    width: Dim = 768
    """Size of the residual stream (D)."""
    mlp_width: Dim = 3072
    """Hidden units of a block's MLP (F)."""
    pool: Literal["class", "mean"] = "class"
    """class: the head sees a learned token before the patches; mean: the mean over patches, without such a token."""
    norm_eps: Positive = 1e-6
    """Added to the variance in LayerNorm."""
    dropout: Dropped = 0.0
    """Share dropped while training of embeddings, hidden units and what each sublayer adds."""
    stochastic_depth: Dropped = 0.0
    """Share of examples that skip the last block while training; earlier blocks in proportion (Huang et al. 2016)."""
    dtype: Dtype = "float32"
    """Type of activations and products; parameters stay float32."""
    attention: Attention = "auto"
    """Attention kernel: auto, xla, blockwise, cudnn, splash, tokamax."""
    remat: Remat = "none"
    """What the backward pass recomputes: nothing, all but weight products, or blocks; offload: inputs on the host."""
    unroll: Depth = 1
    """Blocks unrolled in each iteration of the scan over layers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        divide(self, "width", "heads")
        check_patches(self.input_shape, self.patch)


class Block(nn.Module):
    config: ViTConfig
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array, rate: Any, ctx: Context) -> tuple[jax.Array, None]:
        c, drop, skip = self.config, layers.Dropout(self.config.dropout), layers.StochasticDepth()
        rate = 0.0 if rate is None else rate
        attn = MultiHead(c.heads, c.width // c.heads, dtype=c.dtype, kernel=c.attention, name="attn")
        mlp = layers.MLP(c.mlp_width, layers.exact_gelu, dropout=c.dropout, train=self.train, dtype=c.dtype, name="mlp")
        y, _ = attn(layers.LayerNorm(c.norm_eps, name="attn_norm")(x), ctx)
        x = x + skip(drop(y, self.train), rate, self.train)
        y = mlp(layers.LayerNorm(c.norm_eps, name="mlp_norm")(x))
        x = x + skip(drop(y, self.train), rate, self.train)
        return layers.shard(x, "batch", "seq", None), None


class ViT(nn.Module):
    """Images (B, H, W, C) to logits (B, classes) in float32, or with `head=False` to pooled features (B, D).

    Source: mean pooling as in Google's big_vision: over normalized patches, with no class token.
    """

    config: ViTConfig

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False, head: bool = True) -> jax.Array:
        c = self.config
        token = layers.normal(0.02) if c.pool == "class" else None
        check_shape(images, c.input_shape)
        x = embed_patches(images, c.patch, c.width, token=token, dtype=c.dtype)
        x = layers.Dropout(c.dropout)(x, train)
        blocks = layers.scan_layers(Block, c.layers, c.remat, c.unroll)(c, train, name="layers")
        x, _ = blocks(x, depths(c.stochastic_depth, c.layers) if c.stochastic_depth else None, Context())
        norm = layers.LayerNorm(c.norm_eps, name="norm")
        x = norm(x[:, 0]) if c.pool == "class" else norm(x).mean(1)
        if not head:
            return x
        return layers.Linear((c.classes,), ("embed", "classes"), dtype=c.dtype, name="head")(x).astype(jnp.float32)


def depths(most: float, layers: int) -> jax.Array:
    """The share of examples that skip each block, (L,): it grows linearly with the depth, up to `most`."""
    return most * jnp.arange(1, layers + 1) / layers


base = ViTConfig()
sizes = {
    # Touvron et al. 2020, table 1 (Ti and S); Dosovitskiy et al. 2020, table 1 (B and L)
    "ti": dataclasses.replace(base, heads=3, width=192, mlp_width=768),
    "s": dataclasses.replace(base, heads=6, width=384, mlp_width=1536),
    "b": base,
    "l": dataclasses.replace(base, layers=24, heads=16, width=1024, mlp_width=4096),
}

register(
    Family(
        name="vit",
        config=ViTConfig,
        network=ViT,
        inputs=image_inputs,
        presets={
            f"vit-{size}{patch}": dataclasses.replace(config, patch=patch)
            for patch in (16, 32)
            for size, config in sizes.items()
        },
    )
)
