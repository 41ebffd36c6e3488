"""Whisper: an encoder of log-mel frames and a decoder of text (Radford et al. 2022)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.errors import UserError
from jaxmodels.fields import Depth, Dim, Dropped
from jaxmodels.models import layers
from jaxmodels.models.checks import divide
from jaxmodels.models.config import ModelConfig
from jaxmodels.models.decoding import Context, KeyValues, empty_cache
from jaxmodels.models.families import register
from jaxmodels.models.heads import MultiHead
from jaxmodels.models.kernels.kernel import Attention
from jaxmodels.models.model import Dtype, Family, Inputs, Remat
from jaxmodels.models.parameters import parameter
from jaxmodels.models.spectrogram import hop, log_mel
from jaxmodels.parallel.rules import gather

Array = jax.Array
_LONGEST_WAVE = 10_000.0


@dataclass(frozen=True)
class WhisperConfig(ModelConfig):
    """Whisper; the defaults are those of tiny."""

    vocab_size: Dim = 51865
    """Rows of the embedding, which is also the output layer (V)."""
    context: Dim = 448
    """Learned positions of the decoder: the most tokens of a text."""
    sample_rate: Dim = 16000
    """Samples a second of the sounds."""
    mels: Dim = 80
    """Bands of the log-mel frames, one every 10 ms, that the encoder reads (M)."""
    places: Dim = 1500
    """The most places of an encoded sound (S), one for two frames: 1500 are 30 seconds."""
    layers: Depth = 4
    """Blocks of the encoder."""
    decoder_layers: Depth | None = None
    """Blocks of the decoder; as many as `layers` when not given."""
    heads: Depth = 6
    """Attention heads (H); must divide `width`."""
    width: Dim = 384
    """Size of the residual stream (D)."""
    mlp_width: Dim | None = None
    """Hidden units of a block's MLP (F); 4 * width when not given."""
    dropout: Dropped = 0.0
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
        divide(self, "width", "heads")
        if self.width % 2 or self.width < 4:
            raise UserError(
                f"got width {self.width}, expected an even number of at least 4, for a sine and a cosine of each "
                f"wavelength, try width {max(4, self.width + self.width % 2)}"
            )

    @property
    def longest_sound(self) -> int:
        """The most samples of a sound."""
        return 2 * self.places * hop(self.sample_rate)


def sinusoids(places: int, width: int) -> np.ndarray:
    """Positions as sines and then cosines of wavelengths from 2π to 10000·2π, (places, width) float32."""
    rate = np.exp(-math.log(_LONGEST_WAVE) / (width // 2 - 1) * np.arange(width // 2, dtype=np.float32))
    angle = np.arange(places, dtype=np.float32)[:, None] * rate
    return np.concatenate([np.sin(angle), np.cos(angle)], 1).astype(np.float32)


class Shared(NamedTuple):
    """The inputs that all blocks of a stack share."""

    ctx: Context
    memory: Array | None = None
    """The encoder's output, (B, S, D); None in the encoder, and where the cache holds its keys and values."""


Caches = dict[str, KeyValues | None]
"""Keys and values of a block, or stacked over all: "attn", of the text so far; "cross", of the sound."""


class Block(nn.Module):
    config: WhisperConfig
    decoder: bool
    train: bool

    @nn.compact
    def __call__(self, x: Array, kv: Caches | None, shared: Shared) -> tuple[Array, Caches | None]:
        c, drop = self.config, layers.Dropout(self.config.dropout)
        how: dict[str, Any] = {"dropout": c.dropout, "train": self.train, "dtype": c.dtype}
        heads: dict[str, Any] = {"key_bias": False, "kernel": c.attention, **how}
        given: Caches = kv or {"attn": None, "cross": None}

        def add(name: str, x: Array, sublayer: Any) -> tuple[Array, KeyValues | None]:
            y, kv = sublayer(layers.LayerNorm(name=f"{name}_norm")(x))
            return layers.shard(x + drop(y, self.train), "batch", "seq", None), kv

        attn = MultiHead(c.heads, c.width // c.heads, causal=self.decoder, name="attn", **heads)
        x, now = add("attn", x, lambda y: attn(y, shared.ctx, given["attn"]))
        made = None
        if self.decoder:
            cross = MultiHead(c.heads, c.width // c.heads, name="cross", **heads)
            memory = given["cross"] if shared.memory is None else shared.memory
            x, made = add("cross", x, lambda y: cross(y, Context(), memory=memory))
        mlp = layers.MLP(c.mlp_width or 4 * c.width, layers.exact_gelu, name="mlp", **how)
        x, _ = add("mlp", x, lambda y: (mlp(y), None))
        # keys and values that the cache has already are not returned, since a scan over layers would copy them
        return x, None if kv is None else {"attn": now, "cross": None if shared.memory is None else made}


class Encoder(nn.Module):
    """Log-mel frames (B, T, M) to features (B, S, D), S = ceil(T / 2).

    With `pooled`, each feature is the mean of so many places. `real` (B, S) says which places are attended to; Whisper
    itself attends to all of them, silence included.
    """

    config: WhisperConfig
    train: bool
    pooled: int = 1

    @nn.compact
    def __call__(self, frames: Array, real: Array | None = None) -> Array:
        c = self.config
        x = layers.shard(frames.astype(c.dtype), "batch", None, None)
        for i, axis in enumerate(("features", "channels_in")):
            how: dict[str, Any] = {"axes": (axis, "channels_out"), "initializer": layers.normal(0.02)}
            conv = layers.Conv(c.width, (3,), (1 + i,), [(1, 1)], dtype=c.dtype, name=f"conv{i}", **how)
            x = layers.exact_gelu(conv(x))
        if x.shape[1] > c.places:
            raise UserError(
                f"got sounds of {frames.shape[1]} frames, expected at most {2 * c.places}, "
                f"{c.longest_sound / c.sample_rate:g} seconds, try parts of them"
            )
        # a parameter, because published ones are rounded to 16 bits, but none that is learned
        axes, shape = ("positions", "embed"), (c.places, c.width)
        table = parameter(self, "positions", lambda key, shape, dtype=None: jnp.asarray(sinusoids(*shape)),
                          axes, shape, "bias", before_stack=True)  # fmt: skip
        table = jnp.asarray(gather(jax.lax.stop_gradient(table), axes))
        x = x + table[: x.shape[1]].astype(x.dtype)
        x = layers.shard(layers.Dropout(c.dropout)(x, self.train), "batch", "seq", None)
        ctx = Context(segment_ids=None if real is None else real.astype(jnp.int32))
        blocks = layers.scan_layers(Block, c.layers, c.remat, c.unroll)(c, False, self.train, name="layers")
        x, _ = blocks(x, None, Shared(ctx))
        if self.pooled > 1:
            whole = x.shape[1] // self.pooled
            x = x[:, : whole * self.pooled].reshape(len(x), whole, self.pooled, -1).mean(2)
        return layers.LayerNorm(name="norm")(x)


class Decoder(nn.Module):
    """Tokens (B, T) and the encoder's output, or a cache with its keys and values, to features (B, T, D)."""

    config: WhisperConfig
    train: bool

    @nn.compact
    def __call__(self, x: Array, ctx: Context, kv: Caches | None, memory: Array | None) -> tuple[Array, Caches | None]:
        c = self.config
        axes = ("positions", "embed")
        places = layers.Embed(c.context, c.width, axes, dtype=c.dtype, before_stack=True, name="positions")
        x = layers.Dropout(c.dropout)(x + places(ctx.positions), self.train)
        depth = c.decoder_layers or c.layers
        blocks = layers.scan_layers(Block, depth, c.remat, c.unroll)(c, True, self.train, name="layers")
        x, kv = blocks(layers.shard(x, "batch", "seq", None), kv, Shared(ctx, memory))
        return layers.LayerNorm(name="norm")(x), kv


class Whisper(nn.Module):
    """Sounds (B, N) in [-1, 1] and the text so far (B, T) to logits (B, T, V) in float32.

    With `head=False` it returns features (B, T, D); without a text the encoder's output (B, S, D), which a call without
    sounds takes as `memory`. A call with a cache stores what the decoder needs of the sounds ("cross"): later calls
    take the new tokens alone. Published weights know sounds of 30 seconds, padded with silence.
    """

    config: WhisperConfig

    @nn.compact
    def __call__(
        self,
        inputs: Array | None,
        targets: Array | None,
        *,
        memory: Array | None = None,
        cache: dict[str, Any] | None = None,
        train: bool = False,
        head: bool = True,
    ) -> Any:
        c = self.config
        cached = cache is not None and "cross" in cache and inputs is None and memory is None
        if (inputs is None) == (memory is None) and not cached:
            given = "neither sounds nor memory" if memory is None else "sounds and memory"
            raise UserError(f"got {given}, expected one of them, try memory=model.apply(params, sounds, None)")
        if inputs is not None:
            memory = Encoder(c, train, name="encoder")(log_mel(inputs, c.sample_rate, c.mels))
        if targets is None:
            return memory
        embed = layers.Embed(c.vocab_size, c.width, dtype=c.dtype, before_stack=True, name="embed")
        ctx = Context.of(targets, cache, None, None, longest=c.context)
        kv = None if cache is None else {"attn": cache["layers"], "cross": cache["cross"] if cached else None}
        x, kv = Decoder(c, train, name="decoder")(embed(targets), ctx, kv, memory)
        y = embed.logits(x) if head else x
        if cache is None or kv is None:
            return y
        cross = cache["cross"] if cached else kv["cross"]
        return y, {"layers": kv["attn"], "cross": cross, "length": cache["length"] + targets.shape[1]}


def sound_and_text(c: WhisperConfig, batch: int, length: int) -> Inputs:
    """Sounds (B, N) that become `length` places, and tokens (B, T) as many."""
    samples = 2 * min(length, c.places) * hop(c.sample_rate)
    tokens = jax.ShapeDtypeStruct((batch, min(length, c.context)), jnp.int32)
    return jax.ShapeDtypeStruct((batch, samples), jnp.float32), tokens


tiny = WhisperConfig()
base = dataclasses.replace(tiny, layers=6, heads=8, width=512)
small = dataclasses.replace(tiny, layers=12, heads=12, width=768)
medium = dataclasses.replace(tiny, layers=24, heads=16, width=1024)
large = dataclasses.replace(tiny, layers=32, heads=20, width=1280)
v3 = dataclasses.replace(large, mels=128, vocab_size=51866)

register(
    Family(
        name="whisper",
        config=WhisperConfig,
        network=Whisper,
        inputs=sound_and_text,
        cache=lambda c, batch, length: empty_cache(
            c.decoder_layers or c.layers, batch, length, c.heads, c.width // c.heads, c.dtype
        ),
        unembedding=lambda c, params: params["embed"]["w"],
        longest=lambda c: c.context,
        presets={
            # Radford et al. 2022, table 1; those of English alone have one token less
            "whisper-tiny": tiny,
            "whisper-base": base,
            "whisper-small": small,
            "whisper-medium": medium,
            "whisper-large-v2": large,
            "whisper-large-v3": v3,
            "whisper-large-v3-turbo": dataclasses.replace(v3, decoder_layers=4),
            **{
                f"whisper-{name}.en": dataclasses.replace(size, vocab_size=51864)
                for name, size in {"tiny": tiny, "base": base, "small": small, "medium": medium}.items()
            },
        },
    )
)
