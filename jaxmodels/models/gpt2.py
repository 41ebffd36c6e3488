"""GPT-2 and GPT-3: a decoder with learned positions and pre-normalization (Radford et al. 2019, Brown et al. 2020).

GPT-3 is computed with dense attention in every layer; the paper alternates dense and banded sparse layers.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax

from jaxmodels.fields import Depth, Dim, Dropped
from jaxmodels.models import layers
from jaxmodels.models.checks import divide
from jaxmodels.models.config import ModelConfig
from jaxmodels.models.decoder import BlockDecoder
from jaxmodels.models.decoding import Context, KeyValues, empty_cache
from jaxmodels.models.families import register
from jaxmodels.models.heads import MultiHead
from jaxmodels.models.inputs import context_inputs
from jaxmodels.models.kernels.kernel import Attention
from jaxmodels.models.model import Dtype, Family, Remat


@dataclass(frozen=True)
class GPT2Config(ModelConfig):
    """GPT-2; the defaults are GPT-2 small (124M)."""

    vocab_size: Dim = 50257
    """Rows of the embedding, which is also the output layer (V)."""
    context: Dim = 1024
    """Learned positions: the most tokens the model sees at once."""
    layers: Depth = 12
    """Blocks."""
    heads: Depth = 12
    """Attention heads (H); must divide `width`."""
    width: Dim = 768
    """Size of the residual stream (D)."""
    mlp_width: Dim | None = None
    """Hidden units of a block's MLP (F); 4 * width when not given."""
    dropout: Dropped = 0.0
    """Share dropped after embeddings, attention and MLP while training, and of attention weights."""
    embed_dropout: Dropped | None = None
    """Share dropped after embeddings; that of `dropout` when not given."""
    attention_dropout: Dropped | None = None
    """Share of attention weights dropped; that of `dropout` when not given."""
    dtype: Dtype = "float32"
    """Type of activations and products; parameters stay float32."""
    attention: Attention = "auto"
    """Attention kernel: auto, xla, blockwise, cudnn, splash, tokamax, ring, ulysses."""
    remat: Remat = "none"
    """What the backward pass recomputes: nothing, all but weight products, or blocks; offload: inputs on the host."""
    unroll: Depth = 1
    """Blocks unrolled in each iteration of the scan over layers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        divide(self, "width", "heads")


class Block(nn.Module):
    config: GPT2Config
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array, kv: KeyValues | None, ctx: Context) -> Any:
        c = self.config
        drop, init = layers.Dropout(c.dropout), layers.normal(0.02)
        residual = layers.normal(0.02 / (2 * c.layers) ** 0.5)
        attn = MultiHead(
            c.heads,
            c.width // c.heads,
            causal=True,
            dropout=c.dropout if c.attention_dropout is None else c.attention_dropout,
            train=self.train,
            initializers=(init, init, init, residual),
            dtype=c.dtype,
            kernel=c.attention,
            name="attn",
        )
        mlp = layers.MLP(
            c.mlp_width or 4 * c.width, layers.gelu, initializers=(init, residual), dtype=c.dtype, name="mlp"
        )
        y, kv = attn(layers.LayerNorm(name="attn_norm")(x), ctx, kv)
        x = x + drop(y, self.train)
        x = x + drop(mlp(layers.LayerNorm(name="mlp_norm")(x)), self.train)
        return layers.shard(x, "batch", "residual", None), (kv, None)


class GPT2(BlockDecoder):
    """A decoder with learned positions, whose output layer is the embedding."""

    config: GPT2Config

    def longest(self) -> int:
        return self.config.context

    def output(self, embed: layers.Embed) -> layers.Embed:
        return embed

    def enter(self, x: jax.Array, ctx: Context, train: bool) -> jax.Array:
        c, axes = self.config, ("positions", "embed")
        places = layers.Embed(c.context, c.width, axes, dtype=c.dtype, before_stack=True, name="positions")
        x = layers.shard(x + places(ctx.positions), "batch", "residual", None)
        return layers.Dropout(c.dropout if c.embed_dropout is None else c.embed_dropout)(x, train)

    def blocks(self, train: bool) -> tuple[Any, ...]:
        return Block, train

    def norm(self) -> layers.LayerNorm:
        return layers.LayerNorm(name="norm")


small = GPT2Config()
medium = dataclasses.replace(small, layers=24, heads=16, width=1024)
large = dataclasses.replace(small, layers=36, heads=20, width=1280)
xl = dataclasses.replace(small, layers=48, heads=25, width=1600)
gpt3 = GPT2Config(context=2048)

register(
    Family(
        name="gpt2",
        config=GPT2Config,
        network=GPT2,
        inputs=context_inputs,
        cache=lambda c, batch, length: empty_cache(c.layers, batch, length, c.heads, c.width // c.heads, c.dtype),
        unembedding=lambda c, params: params["embed"]["w"],
        longest=lambda c: c.context,
        presets={
            "gpt2-small": small,
            "gpt2-medium": medium,
            "gpt2-large": large,
            "gpt2-xl": xl,
            # Brown et al. 2020, table 2.1; 13B has 40 heads of 128
            "gpt3-125m": gpt3,
            "gpt3-350m": dataclasses.replace(gpt3, layers=24, heads=16, width=1024),
            "gpt3-760m": dataclasses.replace(gpt3, layers=24, heads=16, width=1536),
            "gpt3-1.3b": dataclasses.replace(gpt3, layers=24, heads=16, width=2048),
            "gpt3-2.7b": dataclasses.replace(gpt3, layers=32, heads=32, width=2560),
            "gpt3-6.7b": dataclasses.replace(gpt3, layers=32, heads=32, width=4096),
            "gpt3-13b": dataclasses.replace(gpt3, layers=40, heads=40, width=5120),
            "gpt3-175b": dataclasses.replace(gpt3, layers=96, heads=96, width=12288),
        },
    )
)
