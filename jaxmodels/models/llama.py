"""LLaMA 1, 2, 3: RMSNorm, rotary positions, SwiGLU, grouped-query attention (Touvron et al. 2023, Llama team 2024)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmodels.errors import UserError
from jaxmodels.models import layers
from jaxmodels.models.attention import attention
from jaxmodels.models.decoding import Context, KeyValues, empty_cache, update
from jaxmodels.models.functional import Dtype, Family, Remat, divide, register


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretch of slow rotations, as published in its reference code (`apply_scaling`)."""

    factor: float = 1.0
    """Low frequencies are divided by this; 1 leaves them as they are."""
    low_freq_factor: float = 1.0
    """Wavelengths above `original_context` / this are scaled in full."""
    high_freq_factor: float = 4.0
    """Wavelengths below `original_context` / this are left alone."""
    original_context: int = 8192
    """The context of pre-training before the stretch."""


@dataclass(frozen=True)
class LlamaConfig:
    """LLaMA; the defaults are LLaMA 7B."""

    vocab_size: int = 32000
    """Rows of the embedding (V)."""
    context: int = 2048
    """Tokens that the published model was trained on at once; rotary positions do not limit it."""
    layers: int = 32
    """Blocks."""
    heads: int = 32
    """Query heads (H)."""
    kv_heads: int | None = None
    """Key and value heads (G), shared by groups of query heads; as many as `heads` when not given."""
    width: int = 4096
    """Size of the residual stream (D)."""
    head_dim: int | None = None
    """Size of a head (K); width / heads when not given."""
    mlp_width: int = 11008
    """Hidden units of the gated MLP (F)."""
    rope_theta: float = 10_000.0
    """Base of the rotary wavelengths."""
    rope_scaling: RopeScaling = RopeScaling()
    """Llama 3.1's scaling; none with a factor of 1."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    tied: bool = False
    """Whether the output layer is the embedding."""
    dtype: Dtype = "float32"
    """Type of activations and products; parameters stay float32."""
    attention: str = "auto"
    """Attention kernel: auto, xla, blockwise, cudnn, splash, tokamax."""
    remat: Remat = "none"
    """What the backward pass recomputes: nothing, all but weight products, or whole blocks."""
    unroll: int = 1
    """Blocks unrolled in each iteration of the scan over layers."""

    def __post_init__(self) -> None:
        if self.head_dim is None:
            divide(self, "width", "heads")
        if self.kv_heads is not None:
            divide(self, "heads", "kv_heads")
        if self.head_size % 2:
            raise UserError(
                f"got head size {self.head_size}, expected an even number for rotary positions, "
                f"try head_dim {self.head_size + 1}"
            )

    @property
    def head_size(self) -> int:
        return self.head_dim or self.width // self.heads


def frequencies(size: int, theta: float, scaling: RopeScaling) -> jax.Array:
    """Angle per position of each pair of dimensions, (K/2,) float32."""
    freq = theta ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    if scaling.factor == 1.0:
        return freq
    turns = scaling.original_context * freq / (2 * math.pi)  # rotations within the original context
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = jnp.clip(smooth, 0.0, 1.0)
    return smooth * freq + (1 - smooth) * freq / scaling.factor


def rotate(x: jax.Array, positions: jax.Array, freq: jax.Array) -> jax.Array:
    """Rotary positions (Su et al. 2021) on x (B, T, H, K), pairing dimension i with i + K/2."""
    angle = positions[:, :, None, None].astype(jnp.float32) * freq
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class Attention(nn.Module):
    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array, kv: KeyValues | None, ctx: Context) -> tuple[jax.Array, KeyValues | None]:
        c = self.config

        def project(name: str, heads: int, axis: str) -> jax.Array:
            axes = ("embed", axis, "head_dim")
            y = layers.Linear((heads, c.head_size), axes, bias=False, dtype=c.dtype, name=name)(x)
            return layers.shard(y, "batch", "seq", axis, None)

        freq = frequencies(c.head_size, c.rope_theta, c.rope_scaling)
        q = rotate(project("q", c.heads, "heads"), ctx.positions, freq)
        k = rotate(project("k", c.kv_heads or c.heads, "kv_heads"), ctx.positions, freq)
        v = project("v", c.kv_heads or c.heads, "kv_heads")
        k, v, kv = update(kv, k, v, ctx)
        y = attention(q, k, v, causal=True, kernel=c.attention, **ctx.masks())
        out = layers.Linear((c.width,), ("heads", "head_dim", "embed"), bias=False, dtype=c.dtype, name="o")
        return out(y), kv


class MLP(nn.Module):
    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config

        def hidden(name: str) -> jax.Array:
            y = layers.Linear((c.mlp_width,), ("embed", "mlp"), bias=False, dtype=c.dtype, name=name)(x)
            return layers.shard(y, "batch", "seq", "mlp")

        y = nn.silu(hidden("gate")) * hidden("up")
        return layers.Linear((c.width,), ("mlp", "embed"), bias=False, dtype=c.dtype, name="down")(y)


class Block(nn.Module):
    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array, kv: KeyValues | None, ctx: Context) -> tuple[jax.Array, KeyValues | None]:
        c = self.config
        y, kv = Attention(c, name="attn")(layers.RMSNorm(c.norm_eps, name="attn_norm")(x), kv, ctx)
        x = x + y
        x = x + MLP(c, name="mlp")(layers.RMSNorm(c.norm_eps, name="mlp_norm")(x))
        return layers.shard(x, "batch", "seq", None), kv


class Llama(nn.Module):
    """Tokens (B, T) to logits (B, T, V) in float32, or with `head=False` to features (B, T, D)."""

    config: LlamaConfig

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        *,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        cache: dict[str, Any] | None = None,
        train: bool = False,
        head: bool = True,
    ) -> Any:
        c = self.config
        ctx = Context.of(tokens, cache, positions, segment_ids)
        embed = layers.Embed(c.vocab_size, c.width, dtype=c.dtype, name="embed")
        output = embed if c.tied else layers.Embed(c.vocab_size, c.width, dtype=c.dtype, name="head")
        x = layers.shard(embed(tokens), "batch", "seq", None)
        blocks = layers.scan_layers(Block, c.layers, c.remat, c.unroll)(c, name="layers")
        x, kv = blocks(x, None if cache is None else cache["layers"], ctx)
        x = layers.RMSNorm(c.norm_eps, name="norm")(x)
        y = output.logits(x) if head else x
        return y if cache is None else (y, {"layers": kv, "length": cache["length"] + tokens.shape[1]})


base = LlamaConfig(norm_eps=1e-6)
second = LlamaConfig(context=4096)
third = LlamaConfig(vocab_size=128256, context=8192, kv_heads=8, mlp_width=14336, rope_theta=500_000.0)
extended = dataclasses.replace(third, context=131072, rope_scaling=RopeScaling(factor=8.0))
compact = dataclasses.replace(extended, rope_scaling=RopeScaling(factor=32.0), tied=True, mlp_width=8192)

register(
    Family(
        name="llama",
        config=LlamaConfig,
        network=Llama,
        inputs=lambda c, batch: (jax.ShapeDtypeStruct((batch, 8), jnp.int32),),
        cache=lambda c, batch, length: empty_cache(
            c.layers, batch, length, c.kv_heads or c.heads, c.head_size, c.dtype
        ),
        unembedding=lambda c, params: params["embed" if c.tied else "head"]["w"],
        presets={
            "llama-7b": base,
            "llama-13b": dataclasses.replace(base, layers=40, heads=40, width=5120, mlp_width=13824),
            "llama-33b": dataclasses.replace(base, layers=60, heads=52, width=6656, mlp_width=17920),
            "llama-65b": dataclasses.replace(base, layers=80, heads=64, width=8192, mlp_width=22016),
            "llama2-7b": second,
            "llama2-13b": dataclasses.replace(second, layers=40, heads=40, width=5120, mlp_width=13824),
            "llama2-70b": dataclasses.replace(second, layers=80, heads=64, kv_heads=8, width=8192, mlp_width=28672),
            "llama3-8b": third,
            "llama3-70b": dataclasses.replace(third, layers=80, heads=64, width=8192, mlp_width=28672),
            "llama3.1-8b": extended,
            "llama3.1-70b": dataclasses.replace(extended, layers=80, heads=64, width=8192, mlp_width=28672),
            "llama3.1-405b": dataclasses.replace(extended, layers=126, heads=128, width=16384, mlp_width=53248),
            "llama3.2-1b": dataclasses.replace(compact, layers=16, heads=32, width=2048),
            "llama3.2-3b": dataclasses.replace(compact, layers=28, heads=24, width=3072),
        },
    )
)
