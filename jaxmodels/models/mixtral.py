"""Mixtral: LLaMA with a sparse mixture of experts for its MLP.

Source: Jiang et al. 2024; the losses of the router, Fedus et al. 2021 and Zoph et al. 2022; experts with a capacity,
Lepikhin et al. 2020 (GShard).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmodels.errors import UserError
from jaxmodels.fields import Depth, Dim, Positive, Weight
from jaxmodels.models import experts, layers
from jaxmodels.models.checks import divide
from jaxmodels.models.config import ModelConfig
from jaxmodels.models.decoding import Context, KeyValues, empty_cache
from jaxmodels.models.families import register
from jaxmodels.models.heads import MultiHead
from jaxmodels.models.model import Attention, Dtype, Family, Remat
from jaxmodels.models.rotary import rotary_frequencies
from jaxmodels.parallel import rules

Sums = dict[str, jax.Array]


@dataclass(frozen=True)
class MixtralConfig(ModelConfig):
    """Mixtral; the defaults are Mixtral 8x7B."""

    vocab_size: Dim = 32000
    """Rows of the embedding (V)."""
    context: Dim = 32768
    """Tokens that the published model was trained on at once; rotary positions do not limit it."""
    layers: Depth = 32
    """Blocks."""
    heads: Depth = 32
    """Query heads (H)."""
    kv_heads: Depth | None = 8
    """Key and value heads (G), shared by groups of query heads; as many as `heads` when not given."""
    width: Dim = 4096
    """Size of the residual stream (D)."""
    head_dim: Dim | None = None
    """Size of a head (K); width / heads when not given."""
    mlp_width: Dim = 14336
    """Hidden units of each expert (F)."""
    experts: Depth = 8
    """Experts of a block (E)."""
    experts_per_token: Depth = 2
    """Experts that a token goes through (k), weighted by a softmax over their scores."""
    routing: Literal["dropless", "capacity"] = "dropless"
    """Whether a token goes through all its experts, or through those that have a place left for it."""
    capacity_factor: Positive = 1.25
    """With `capacity`: an expert's places in a row, over those that it needs if all experts are chosen alike."""
    balance_loss: Weight = 0.02
    """Weight of the loss that is least when experts are chosen alike."""
    z_loss: Weight = 0.0
    """Weight of the router's mean squared log partition function."""
    window: Dim | None = None
    """Tokens that each one sees, itself included; None: all before it."""
    rope_theta: Positive = 1e6
    """Base of the rotary wavelengths."""
    norm_eps: Positive = 1e-5
    """Added to the mean square in RMSNorm."""
    tied: bool = False
    """Whether the output layer is the embedding."""
    dtype: Dtype = "float32"
    """Type of activations and products, but for the router's; parameters stay float32."""
    attention: Attention = "auto"
    """Attention kernel: auto, xla, blockwise, cudnn, splash, tokamax, ring, ulysses."""
    remat: Remat = "none"
    """What the backward pass recomputes: nothing, all but weight products, or blocks; offload: inputs on the host."""
    unroll: Depth = 1
    """Blocks unrolled in each iteration of the scan over layers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_dim is None:
            divide(self, "width", "heads")
        if self.kv_heads is not None:
            divide(self, "heads", "kv_heads")
        if self.head_size % 2:
            raise UserError(
                f"got head size {self.head_size}, expected an even number for rotary positions, "
                f"try head_dim {self.head_size + 1}"
            )
        if not 1 <= self.experts_per_token <= self.experts:
            raise UserError(
                f"got experts_per_token {self.experts_per_token}, expected from 1 to all {self.experts} experts, "
                f"try experts_per_token {min(max(self.experts_per_token, 1), self.experts)}"
            )

    @property
    def head_size(self) -> int:
        return self.head_dim or self.width // self.heads

    def capacity(self, tokens: int) -> int:
        """Places that an expert has for so many tokens of a row."""
        return min(tokens, math.ceil(self.capacity_factor * self.experts_per_token * tokens / self.experts))


class MoE(nn.Module):
    """Gated MLPs of which each token goes through k: (B, T, D) to the same, and sums for the router's losses."""

    config: MixtralConfig

    @nn.compact
    def __call__(self, x: jax.Array, segment_ids: jax.Array | None) -> tuple[jax.Array, Sums]:
        c, E, F = self.config, self.config.experts, self.config.mlp_width
        router = layers.Linear((E,), ("embed", "gates"), bias=False, name="router")
        logits = router(x)
        top, chosen = greatest(logits, c.experts_per_token)
        share = jax.nn.softmax(top, -1)
        D = x.shape[-1]
        gate, up = (layers.Experts((E, D, F), experts.WIDE, name=name)() for name in ("gate", "up"))
        weights = gate, up, layers.Experts((E, F, D), experts.NARROW, name="down")()
        real = None if segment_ids is None else segment_ids != 0
        if c.routing == "dropless":
            y = experts.dropless(x, chosen, share, weights, nn.silu)
        else:
            capacity = c.capacity(x.shape[1])
            places = experts.places(chosen, real, E, capacity)
            y = experts.limited(x, places, share, weights, nn.silu, capacity)
        return y, sums(logits, chosen, real)


def greatest(scores: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """`jax.lax.top_k` by k maxima: for a sort, XLA's partitioner gathers the scores of all tokens on every device.

    Shapes: scores (…, E), returns values and places (…, k).
    """
    values, places, left = [], [], scores
    for _ in range(k):
        place = jnp.argmax(left, -1)
        own = jax.nn.one_hot(place, scores.shape[-1], dtype=bool)
        values.append(jnp.where(own, scores, 0).sum(-1))
        places.append(place)
        left = jnp.where(own, -jnp.inf, left)
    return jnp.stack(values, -1), jnp.stack(places, -1)


def sums(logits: jax.Array, chosen: jax.Array, real: jax.Array | None) -> Sums:
    """What the losses of the router are means of, over the tokens that are no padding.

    Shapes: logits (B, T, E), chosen (B, T, k), real (B, T).
    """
    counts = jnp.ones(logits.shape[:2]) if real is None else real.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, -1)
    asked = jax.nn.one_hot(chosen, logits.shape[-1]).sum(-2)
    return {
        "tokens": counts.sum(),
        "asked": (asked * counts[..., None]).sum((0, 1)),
        "probability": (jnp.exp(logits - log_z[..., None]) * counts[..., None]).sum((0, 1)),
        "log_z_squared": (jnp.square(log_z) * counts).sum(),
    }


def losses(c: MixtralConfig, sums: Sums) -> dict[str, jax.Array]:
    """The weighted losses of the router from the sums of all layers.

    The balance loss is as that of transformers (`load_balancing_loss_func`): shares over all layers together.
    """
    total = rules.add_replicas(jax.tree.map(lambda x: x.sum(0), sums))
    tokens = jnp.maximum(total["tokens"], 1)
    balance = c.experts * jnp.vdot(total["asked"] / tokens, total["probability"] / tokens)
    return {"balance_loss": c.balance_loss * balance, "router_z_loss": c.z_loss * total["log_z_squared"] / tokens}


class Block(nn.Module):
    config: MixtralConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, kv: KeyValues | None, ctx: Context
    ) -> tuple[jax.Array, tuple[KeyValues | None, Sums]]:
        c = self.config
        attn = MultiHead(
            c.heads,
            c.head_size,
            c.kv_heads,
            causal=True,
            window=c.window,
            bias=False,
            out_bias=False,
            dtype=c.dtype,
            kernel=c.attention,
            name="attn",
        )
        freq = rotary_frequencies(c.head_size, c.rope_theta)
        y, kv = attn(layers.RMSNorm(c.norm_eps, name="attn_norm")(x), ctx, kv, frequencies=freq)
        x = x + y
        y, routed = MoE(c, name="moe")(layers.RMSNorm(c.norm_eps, name="mlp_norm")(x), ctx.segment_ids)
        return layers.shard(x + y, "batch", "residual", None), (kv, routed)


class Mixtral(nn.Module):
    """Tokens (B, T) to logits (B, T, V) in float32, or with `head=False` to features (B, T, D).

    With `auxiliary`, (outputs, {name: weighted loss of the router}). With `capacity`, places are counted in the tokens
    of a call: what is decoded token by token through a cache always finds one.
    """

    config: MixtralConfig

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
        auxiliary: bool = False,
    ) -> Any:
        c = self.config
        ctx = Context.of(tokens, cache, positions, segment_ids)
        embed = layers.Embed(c.vocab_size, c.width, dtype=c.dtype, name="embed")
        output = embed if c.tied else layers.Embed(c.vocab_size, c.width, dtype=c.dtype, name="head")
        x = layers.shard(embed(tokens), "batch", "residual", None)
        blocks = layers.scan_layers(Block, c.layers, c.remat, c.unroll)(c, name="layers")
        x, (kv, routed) = blocks(x, None if cache is None else cache["layers"], ctx)
        x = layers.shard(layers.RMSNorm(c.norm_eps, name="norm")(x), "batch", "seq", None)
        y: Any = output.logits(x) if head else x
        y = (y, losses(c, routed)) if auxiliary else y
        return y if cache is None else (y, {"layers": kv, "length": cache["length"] + tokens.shape[1]})


register(
    Family(
        name="mixtral",
        config=MixtralConfig,
        network=Mixtral,
        inputs=lambda c, batch, length: (jax.ShapeDtypeStruct((batch, length), jnp.int32),),
        cache=lambda c, batch, length: empty_cache(
            c.layers, batch, length, c.kv_heads or c.heads, c.head_size, c.dtype
        ),
        unembedding=lambda c, params: params["embed" if c.tied else "head"]["w"],
        presets={
            "mixtral-8x7b": MixtralConfig(),
            "mixtral-8x22b": MixtralConfig(
                context=65536, layers=56, heads=48, width=6144, mlp_width=16384, balance_loss=0.001
            ),
        },
        auxiliary=True,
    )
)
