"""The encoder-decoder Transformer (Vaswani et al. 2017), BART (Lewis et al. 2019) and T5 (Raffel et al. 2020)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp

from jaxmodels.errors import UserError
from jaxmodels.fields import Depth, Dim, Dropped, Positive
from jaxmodels.models import layers
from jaxmodels.models.checks import divide
from jaxmodels.models.config import ModelConfig
from jaxmodels.models.decoder import output_table
from jaxmodels.models.decoding import Context, KeyValues, empty_cache
from jaxmodels.models.families import register
from jaxmodels.models.heads import MultiHead
from jaxmodels.models.inputs import token_inputs
from jaxmodels.models.kernels.kernel import Attention
from jaxmodels.models.model import Dtype, Family, Remat
from jaxmodels.models.positions import bucket, segment_positions, sinusoids

ACTIVATIONS = {"relu": nn.relu, "gelu": layers.gelu, "gated_gelu": layers.gelu, "exact_gelu": layers.exact_gelu}
UNUSED = 2
"""Rows at the beginning of BART's tables of positions that no position has, but its files."""


@dataclass(frozen=True)
class TransformerConfig(ModelConfig):
    """An encoder and a decoder; the defaults are the base model of Vaswani et al."""

    variant: Literal["original", "bart", "t5"] = "original"
    """original: sinusoids added to scaled embeddings, LayerNorm, biases; bart: the same with learned positions, and
    embeddings that are not scaled but normalized; t5: a learned bias of the scores by distance, RMSNorm, no biases, and
    scores that are not scaled."""
    vocab_size: Dim = 37000
    """Rows of the embedding, shared by encoder and decoder (V)."""
    layers: Depth = 6
    """Blocks of the encoder."""
    decoder_layers: Depth | None = None
    """Blocks of the decoder; as many as `layers` when not given."""
    heads: Depth = 8
    """Attention heads (H)."""
    width: Dim = 512
    """Size of the residual stream (D)."""
    head_dim: Dim | None = None
    """Size of a head (K); width / heads when not given."""
    mlp_width: Dim = 2048
    """Hidden units of a block's MLP (F)."""
    norm: Literal["post", "pre"] = "post"
    """post: after each residual sum; pre: before each sublayer, and once after the last block."""
    norm_eps: Positive = 1e-6
    """Added to the variance, or to the mean square, in a norm."""
    activation: Literal["relu", "gelu", "gated_gelu", "exact_gelu"] = "relu"
    """Activation of the MLP; GELU in its tanh form, or exact."""
    relative_buckets: Dim = 32
    """Buckets of distances, each with a bias (t5); in the encoder half of them for each direction."""
    relative_distance: Dim = 128
    """Distances from this many tokens on share the last bucket (t5)."""
    context: Dim = 1024
    """Learned positions: the most tokens of a source, and of a target (bart)."""
    tied: bool = True
    """Whether the output layer is the embedding."""
    dropout: Dropped = 0.1
    """Share dropped while training of embeddings, attention weights, hidden units and what each sublayer adds."""
    dtype: Dtype = "float32"
    """Type of activations and products; parameters stay float32."""
    attention: Attention = "auto"
    """Attention kernel: auto, xla, blockwise, cudnn, splash, tokamax."""
    remat: Remat = "none"
    """What the backward pass recomputes: nothing, all but weight products, or blocks; offload: inputs on the host."""
    unroll: Depth = 1
    """Blocks unrolled in each iteration of a scan over layers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_dim is None:
            divide(self, "width", "heads")
        if self.relative_buckets < 4 or self.relative_distance <= self.relative_buckets // 2:
            raise UserError(
                f"got relative_buckets {self.relative_buckets} with relative_distance {self.relative_distance}, "
                "expected at least 4 buckets and a distance above half of them, try relative_buckets 32, "
                "relative_distance 128"
            )

    @property
    def head_size(self) -> int:
        return self.head_dim or self.width // self.heads

    @property
    def t5(self) -> bool:
        return self.variant == "t5"

    @property
    def longest(self) -> int | None:
        """The most tokens of a source, and of a target; None: no limit."""
        return self.context if self.variant == "bart" else None


def xavier(inputs: int, outputs: int) -> layers.Init:
    """Uniform with the variance 2 / (inputs + outputs) (Glorot & Bengio 2010)."""
    limit = math.sqrt(6 / (inputs + outputs))
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -limit, limit)


class Initializers(NamedTuple):
    """Initializers of attention's q, k, v and o, and of the MLP's up and down."""

    attn: tuple[layers.Init, ...]
    mlp: tuple[layers.Init, layers.Init]

    @staticmethod
    def of(c: TransformerConfig) -> Initializers:
        """Source: `torch.nn.Transformer`, to which q, k and v are one matrix; for BART and T5, `_init_weights` of
        transformers."""
        D, F, inner = c.width, c.mlp_width, c.heads * c.head_size
        if c.variant == "bart":
            init = layers.normal(0.02)
            return Initializers((init,) * 4, (init, init))
        if not c.t5:
            first = xavier(D, F)
            return Initializers((xavier(D, 3 * inner),) * 3 + (xavier(inner, D),), (first, first))
        q, narrow = layers.normal((D * c.head_size) ** -0.5), layers.normal(D**-0.5)
        return Initializers((q, narrow, narrow, layers.normal(inner**-0.5)), (narrow, layers.normal(F**-0.5)))


def relative_bias(c: TransformerConfig, table: layers.Embed, T: int, S: int, offset: Any, both: bool) -> jax.Array:
    """T5's bias of the scores, in float32, for queries from position `offset` on and keys from 0 on.

    Shapes: offset (), or (B,) where each row has its own; returns (1, H, T, S), or (B, H, T, S).
    """
    far = c.relative_distance
    ahead = jnp.clip(jnp.arange(1 - T, S + 1) - jnp.asarray(offset)[..., None], -far, far)
    line = table(jnp.asarray(bucket(c.relative_buckets, far, both))[ahead + far])
    line = jnp.moveaxis(line, -1, -2)  # (…, H, T + S), one number for each distance
    # row t is line[T-1-t:][:S]: the line is written T times over and read in rows one shorter than it, so that the
    # gradient is a sum and not a scatter of T·S values into a few buckets
    N = T + S - 1
    if jax.export.is_symbolic_dim(N):  # a function to be exported, which has no gradient and cannot reshape such sizes
        return line[..., jnp.arange(T)[::-1, None] + jnp.arange(S)].reshape(-1, c.heads, T, S)
    rows = jnp.tile(line, T)[..., T - 1 : T - 1 + T * N].reshape(-1, c.heads, T, N)
    return layers.shard(rows[..., :S], None if rows.shape[0] == 1 else "batch", "heads", None, None)


class Shared(NamedTuple):
    """The inputs that all blocks of a stack share."""

    ctx: Context
    bias: jax.Array | None = None
    memory: jax.Array | None = None
    """The encoder's output, (B, S, D); None in the encoder, and where the cache holds its keys and values."""
    cross: Context = Context()
    """Masks between targets and sources."""


def norm(c: TransformerConfig, name: str) -> nn.Module:
    """The variant's norm."""
    return layers.RMSNorm(c.norm_eps, name=name) if c.t5 else layers.LayerNorm(c.norm_eps, name=name)


Caches = dict[str, KeyValues | None]
"""Keys and values of a block, or stacked over all: "attn", of the targets so far; "cross", of the sources."""


class Block(nn.Module):
    config: TransformerConfig
    decoder: bool
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array, kv: Caches | None, shared: Shared) -> tuple[jax.Array, Caches | None]:
        c, init, pre = self.config, Initializers.of(self.config), self.config.norm == "pre"
        drop = layers.Dropout(c.dropout)

        def attention(name: str, causal: bool) -> MultiHead:
            return MultiHead(
                c.heads,
                c.head_size,
                causal=causal,
                scale=1.0 if c.t5 else None,
                bias=not c.t5,
                out_bias=not c.t5,
                dropout=c.dropout,
                train=self.train,
                initializers=init.attn,
                dtype=c.dtype,
                kernel=c.attention,
                name=name,
            )

        def add(name: str, x: jax.Array, sublayer: Any) -> tuple[jax.Array, KeyValues | None]:
            normalize: Any = norm(c, f"{name}_norm")
            y, kv = sublayer(normalize(x) if pre else x)
            x = x + drop(y, self.train)
            return layers.shard(x if pre else normalize(x), "batch", "seq", None), kv

        attn = attention("attn", causal=self.decoder)
        given: Caches = kv or {"attn": None, "cross": None}
        x, now = add("attn", x, lambda y: attn(y, shared.ctx, given["attn"], bias=shared.bias))
        made = None
        if self.decoder:
            cross = attention("cross", causal=False)
            memory = given["cross"] if shared.memory is None else shared.memory
            x, made = add("cross", x, lambda y: cross(y, shared.cross, memory=memory))
        mlp = layers.MLP(
            c.mlp_width,
            ACTIVATIONS[c.activation],
            gated=c.activation == "gated_gelu",
            bias=not c.t5,
            dropout=c.dropout,
            train=self.train,
            initializers=init.mlp,
            dtype=c.dtype,
            name="mlp",
        )
        x, _ = add("mlp", x, lambda y: (mlp(y), None))
        # keys and values that the cache has already are not returned, since a scan over layers would copy them
        return x, None if kv is None else {"attn": now, "cross": None if shared.memory is None else made}


class Stack(nn.Module):
    """The encoder or the decoder: embeddings (B, T, D) through its blocks."""

    config: TransformerConfig
    depth: int
    decoder: bool
    train: bool

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        ctx: Context,
        kv: Caches | None = None,
        memory: jax.Array | None = None,
        cross: Context | None = None,
    ) -> tuple[jax.Array, Caches | None]:
        c, drop = self.config, layers.Dropout(self.config.dropout)
        bias = None
        if c.t5:
            T = x.shape[1]
            past = None if kv is None else kv["attn"]
            S, offset = (T, 0) if past is None or ctx.offset is None else (past["k"].shape[2], ctx.offset)
            init = layers.normal(c.width**-0.5)
            table = layers.Embed(
                c.relative_buckets, c.heads, ("positions", "heads"), init, before_stack=True, name="relative"
            )
            bias = relative_bias(c, table, T, S, offset, both=not self.decoder)
        elif c.variant == "bart":
            axes, rows = ("positions", "embed"), c.context + UNUSED
            places = layers.Embed(rows, c.width, axes, dtype=c.dtype, before_stack=True, name="positions")
            x = x + places(ctx.positions + UNUSED)
            x = layers.LayerNorm(c.norm_eps, before_stack=True, name="embed_norm")(x)
        else:
            x = x * c.width**0.5 + sinusoids(ctx.positions, c.width).astype(x.dtype)
        x = layers.shard(drop(x, self.train), "batch", "seq", None)
        blocks = layers.scan_layers(Block, self.depth, c.remat, c.unroll)(c, self.decoder, self.train, name="layers")
        x, kv = blocks(x, kv, Shared(ctx, bias, memory, cross or Context()))
        if c.norm == "pre":
            last: Any = norm(c, "norm")
            x = last(x)
        return drop(x, self.train) if c.t5 else x, kv


class Transformer(nn.Module):
    """Sources (B, S) and the targets so far (B, T) to logits (B, T, V) in float32.

    With `head=False` it returns features (B, T, D); without targets the encoder's output (B, S, D), which a call
    without sources takes as `memory`. `segment_ids` belong to the sources, `target_segment_ids` to the targets; where
    only one of the two is given, the other is all ones. A target attends to sources of its own id. A call with a cache
    stores what the decoder needs of the sources ("cross" and "segment_ids"): later calls take the new targets alone.
    """

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        inputs: jax.Array | None,
        targets: jax.Array | None,
        *,
        segment_ids: jax.Array | None = None,
        target_segment_ids: jax.Array | None = None,
        memory: jax.Array | None = None,
        cache: dict[str, Any] | None = None,
        train: bool = False,
        head: bool = True,
    ) -> Any:
        c = self.config
        cached = cache is not None and "cross" in cache and inputs is None and memory is None
        if (inputs is None) == (memory is None) and not cached:
            given = "neither inputs nor memory" if memory is None else "inputs and memory"
            raise UserError(f"got {given}, expected one of them, try memory=model.apply(params, inputs, None)")
        if cache is not None and target_segment_ids is not None:
            raise UserError(
                "got target_segment_ids with a cache, expected one of them, try segment_ids for the sources"
            )
        if cached and segment_ids is not None:
            raise UserError(
                "got segment_ids and no sources, expected those that came with the sources, try leaving them out"
            )
        init = layers.normal({"original": c.width**-0.5, "bart": 0.02, "t5": 1.0}[c.variant])
        embed = layers.Embed(c.vocab_size, c.width, initializer=init, dtype=c.dtype, before_stack=True, name="embed")

        def begin(tokens: jax.Array, ids: jax.Array | None, cache: Any = None) -> tuple[jax.Array, Context]:
            positions = None if ids is None or c.t5 else segment_positions(ids)
            return embed(tokens), Context.of(tokens, cache, positions, ids, c.longest)

        if inputs is not None:
            memory, _ = Stack(c, c.layers, False, train, name="encoder")(*begin(inputs, segment_ids))
        if targets is None:
            return memory
        sources: Any = memory
        if cache is not None and cached:
            segment_ids, sources = cache["segment_ids"], cache["cross"]["k"][0]
        pair = None
        if segment_ids is not None or target_segment_ids is not None:
            ones = [jnp.ones(x.shape[:2], jnp.int32) for x in (targets, sources)]
            given = (target_segment_ids, segment_ids)
            pair = tuple(one if ids is None else ids for ids, one in zip(given, ones, strict=True))
        decoder = Stack(c, c.decoder_layers or c.layers, True, train, name="decoder")
        x, ctx = begin(targets, target_segment_ids, cache)
        kv = None if cache is None else {"attn": cache["layers"], "cross": cache["cross"] if cached else None}
        x, kv = decoder(x, ctx, kv, memory, Context(segment_ids=pair))
        output = embed
        if not c.tied:
            output = layers.Embed(c.vocab_size, c.width, initializer=init, dtype=c.dtype, name="head")
        elif c.t5:  # as published, where the output layer is the embedding
            x = x * c.width**-0.5
        y = output.logits(x) if head else x
        if cache is None or kv is None:
            return y
        cross = cache["cross"] if cached else kv["cross"]
        length = cache["length"] + targets.shape[1]
        return y, {"layers": kv["attn"], "cross": cross, "segment_ids": segment_ids, "length": length}


base = TransformerConfig()


def t5(layers: int, heads: int, width: int, mlp_width: int, head_dim: int = 64, **more: Any) -> TransformerConfig:
    """A size of T5; version 1.1 has a gated MLP and an output layer of its own."""
    sizes = {"layers": layers, "heads": heads, "width": width, "head_dim": head_dim, "mlp_width": mlp_width}
    return TransformerConfig(variant="t5", vocab_size=32128, norm="pre", **sizes, **more)


def bart(layers: int, heads: int, width: int, vocab_size: int) -> TransformerConfig:
    """A size of BART."""
    sizes = {"layers": layers, "heads": heads, "width": width, "mlp_width": 4 * width, "vocab_size": vocab_size}
    return TransformerConfig(variant="bart", activation="exact_gelu", norm_eps=1e-5, **sizes)  # type: ignore[arg-type]


later = {"activation": "gated_gelu", "tied": False}

register(
    Family(
        name="transformer",
        config=TransformerConfig,
        network=Transformer,
        inputs=lambda c, batch, length: token_inputs(c, batch, length) * 2,
        cache=lambda c, batch, length: empty_cache(
            c.decoder_layers or c.layers, batch, length, c.heads, c.head_size, c.dtype
        ),
        unembedding=output_table,
        longest=lambda c: c.longest,
        presets={
            # Vaswani et al. 2017, table 3
            "transformer-base": base,
            "transformer-big": dataclasses.replace(base, heads=16, width=1024, mlp_width=4096, dropout=0.3),
            "bart-base": bart(6, 12, 768, 50265),
            "bart-large": bart(12, 16, 1024, 50265),
            "bart-large-cnn": bart(12, 16, 1024, 50264),
            "t5-small": t5(6, 8, 512, 2048),
            "t5-base": t5(12, 12, 768, 3072),
            "t5-large": t5(24, 16, 1024, 4096),
            "t5-3b": t5(24, 32, 1024, 16384, 128),
            "t5-11b": t5(24, 128, 1024, 65536, 128),
            "t5-v1.1-small": t5(8, 6, 512, 1024, **later),
            "t5-v1.1-base": t5(12, 12, 768, 2048, **later),
            "t5-v1.1-large": t5(24, 16, 1024, 2816, **later),
            "t5-v1.1-xl": t5(24, 32, 2048, 5120, **later),
            "t5-v1.1-xxl": t5(24, 64, 4096, 10240, **later),
        },
    )
)
