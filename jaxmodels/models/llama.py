"""LLaMA 1, 2, 3 and its kin: RMSNorm, rotary positions, SwiGLU, grouped-query attention.

Source: Touvron et al. 2023, Llama team 2024; Mistral's sliding window (Jiang et al. 2023), Qwen2's biases (Yang et al.
2024) and Qwen3's QK-norm (Qwen team 2025) are fields.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax

from jaxmodels.models import layers
from jaxmodels.models.decoder import BlockDecoder, RotaryConfig, output_table
from jaxmodels.models.decoding import Context, KeyValues, empty_cache
from jaxmodels.models.families import register
from jaxmodels.models.heads import MultiHead
from jaxmodels.models.inputs import token_inputs
from jaxmodels.models.model import Family
from jaxmodels.models.rotary import RopeScaling, rotary_frequencies


@dataclass(frozen=True)
class LlamaConfig(RotaryConfig):
    """LLaMA; the defaults are LLaMA 7B."""

    rope_scaling: RopeScaling = RopeScaling()
    """Llama 3.1's scaling; none with a factor of 1."""
    qkv_bias: bool = False
    """Whether the projections of queries, keys and values have biases (Qwen2)."""
    qk_norm: bool = False
    """Whether each head's queries and keys go through RMSNorm (Qwen3)."""


class Block(nn.Module):
    config: LlamaConfig

    @nn.compact
    def __call__(self, x: jax.Array, kv: KeyValues | None, ctx: Context) -> Any:
        c = self.config
        attn = MultiHead(
            c.heads,
            c.head_size,
            c.kv_heads,
            causal=True,
            window=c.window,
            bias=c.qkv_bias,
            out_bias=False,
            norm_eps=c.norm_eps if c.qk_norm else None,
            dtype=c.dtype,
            kernel=c.attention,
            name="attn",
        )
        mlp = layers.MLP(c.mlp_width, nn.silu, gated=True, bias=False, dtype=c.dtype, name="mlp")
        freq = rotary_frequencies(c.head_size, c.rope_theta, c.rope_scaling)
        y, kv = attn(layers.RMSNorm(c.norm_eps, name="attn_norm")(x), ctx, kv, frequencies=freq)
        x = x + y
        x = x + mlp(layers.RMSNorm(c.norm_eps, name="mlp_norm")(x))
        return layers.shard(x, "batch", "residual", None), (kv, None)


class Llama(BlockDecoder):
    """A decoder with rotary positions."""

    config: LlamaConfig

    def blocks(self, train: bool) -> tuple[Any, ...]:
        return (Block,)


base = LlamaConfig(norm_eps=1e-6)
second = LlamaConfig(context=4096)
third = LlamaConfig(vocab_size=128256, context=8192, kv_heads=8, mlp_width=14336, rope_theta=500_000.0)
extended = dataclasses.replace(third, context=131072, rope_scaling=RopeScaling(factor=8.0))
compact = dataclasses.replace(extended, rope_scaling=RopeScaling(factor=32.0), tied=True, mlp_width=8192)
mistral = LlamaConfig(context=32768, kv_heads=8, mlp_width=14336)


def qwen2(layers: int, heads: int, kv_heads: int, width: int, mlp_width: int, **more: Any) -> LlamaConfig:
    """A size of Qwen2 or Qwen2.5."""
    base = LlamaConfig(vocab_size=151936, context=32768, rope_theta=1e6, norm_eps=1e-6, qkv_bias=True)
    return dataclasses.replace(
        base, layers=layers, heads=heads, kv_heads=kv_heads, width=width, mlp_width=mlp_width, **more
    )


def qwen3(layers: int, heads: int, width: int, mlp_width: int, tied: bool = False) -> LlamaConfig:
    """A size of Qwen3: 8 key and value heads, all heads of 128."""
    base = LlamaConfig(vocab_size=151936, context=40960, rope_theta=1e6, norm_eps=1e-6, qk_norm=True, tied=tied)
    return dataclasses.replace(
        base, layers=layers, heads=heads, kv_heads=8, head_dim=128, width=width, mlp_width=mlp_width
    )


register(
    Family(
        name="llama",
        config=LlamaConfig,
        network=Llama,
        inputs=token_inputs,
        cache=lambda c, batch, length: empty_cache(
            c.layers, batch, length, c.kv_heads or c.heads, c.head_size, c.dtype
        ),
        unembedding=output_table,
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
            "mistral-7b": dataclasses.replace(mistral, window=4096),
            "mistral-7b-v0.3": dataclasses.replace(mistral, vocab_size=32768, rope_theta=1e6),
            "qwen2-0.5b": qwen2(24, 14, 2, 896, 4864, tied=True),
            "qwen2-1.5b": qwen2(28, 12, 2, 1536, 8960, tied=True),
            "qwen2-7b": qwen2(28, 28, 4, 3584, 18944, vocab_size=152064),
            "qwen2-72b": qwen2(80, 64, 8, 8192, 29568, vocab_size=152064),
            "qwen2.5-3b": qwen2(36, 16, 2, 2048, 11008, tied=True),
            "qwen2.5-14b": qwen2(48, 40, 8, 5120, 13824, vocab_size=152064),
            "qwen2.5-32b": qwen2(64, 40, 8, 5120, 27648, vocab_size=152064),
            "qwen3-0.6b": qwen3(28, 16, 1024, 3072, tied=True),
            "qwen3-1.7b": qwen3(28, 16, 2048, 6144, tied=True),
            "qwen3-4b": qwen3(36, 32, 2560, 9728, tied=True),
            "qwen3-8b": qwen3(36, 32, 4096, 12288),
            "qwen3-14b": qwen3(40, 40, 5120, 17408),
            "qwen3-32b": qwen3(64, 64, 5120, 25600),
        },
    )
)
