"""SASRec: which item comes next, by self-attention over those before it (Kang & McAuley 2018).

Blocks are x + Dropout(g(LayerNorm(x))), as in the paper's section 3.2; heads are joined by an output projection, as in
its later implementations. Items are the vocabulary, and their embeddings score what comes next.
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
class SASRecConfig(ModelConfig):
    """SASRec; the defaults are the paper's for MovieLens-1M."""

    vocab_size: Dim = 3416
    """Items (V): rows of the embedding, which is also the output layer."""
    context: Dim = 200
    """Learned positions: the most items of a history that the model sees, its last ones."""
    layers: Depth = 2
    """Blocks."""
    heads: Depth = 1
    """Attention heads (H); must divide `width`."""
    width: Dim = 50
    """Size of the residual stream (D)."""
    mlp_width: Dim | None = None
    """Hidden units of a block's feed-forward network (F); as many as `width` when not given."""
    dropout: Dropped = 0.2
    """Share dropped after embeddings, attention and in the feed-forward network while training, and of attention
    weights."""
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
    config: SASRecConfig
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array, kv: KeyValues | None, ctx: Context) -> Any:
        c, drop = self.config, layers.Dropout(self.config.dropout)
        init = nn.initializers.xavier_uniform()
        projection = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform", in_axis=0, out_axis=(1, 2))
        back = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform", in_axis=(0, 1), out_axis=2)
        attn = MultiHead(
            c.heads,
            c.width // c.heads,
            causal=True,
            bias=False,
            out_bias=False,
            dropout=c.dropout,
            train=self.train,
            initializers=(projection, projection, projection, back),
            dtype=c.dtype,
            kernel=c.attention,
            name="attn",
        )
        mlp = layers.MLP(
            c.mlp_width or c.width,
            nn.relu,
            dropout=c.dropout,
            train=self.train,
            initializers=(init, init),
            dtype=c.dtype,
            name="mlp",
        )
        y, kv = attn(layers.LayerNorm(name="attn_norm")(x), ctx, kv)
        x = x + drop(y, self.train)
        x = x + drop(mlp(layers.LayerNorm(name="mlp_norm")(x)), self.train)
        return layers.shard(x, "batch", "residual", None), (kv, None)


class SASRec(BlockDecoder):
    """A decoder of items with learned positions, whose output layer is the embedding."""

    config: SASRecConfig

    def longest(self) -> int:
        return self.config.context

    def output(self, embed: layers.Embed) -> layers.Embed:
        return embed

    def enter(self, x: jax.Array, ctx: Context, train: bool) -> jax.Array:
        c, axes = self.config, ("positions", "embed")
        places = layers.Embed(c.context, c.width, axes, dtype=c.dtype, before_stack=True, name="positions")
        x = layers.shard(x + places(ctx.positions), "batch", "residual", None)
        return layers.Dropout(c.dropout)(x, train)

    def blocks(self, train: bool) -> tuple[Any, ...]:
        return Block, train

    def norm(self) -> layers.LayerNorm:
        return layers.LayerNorm(name="norm")


movielens = SASRecConfig()
sparse = dataclasses.replace(movielens, context=50, dropout=0.5)

register(
    Family(
        name="sasrec",
        config=SASRecConfig,
        network=SASRec,
        inputs=context_inputs,
        cache=lambda c, batch, length: empty_cache(c.layers, batch, length, c.heads, c.width // c.heads, c.dtype),
        unembedding=lambda c, params: params["embed"]["w"],
        longest=lambda c: c.context,
        presets={  # Kang & McAuley 2018, table 2 and section 4.4
            "sasrec-ml-1m": movielens,
            "sasrec-beauty": dataclasses.replace(sparse, vocab_size=57_289),
            "sasrec-games": dataclasses.replace(sparse, vocab_size=23_715),
            "sasrec-steam": dataclasses.replace(sparse, vocab_size=13_047),
        },
    )
)
