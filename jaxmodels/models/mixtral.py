"""Mixtral: LLaMA with a sparse mixture of experts for its MLP.

Source: Jiang et al. 2024; the losses of the router, Fedus et al. 2021 and Zoph et al. 2022; experts with a capacity,
Lepikhin et al. 2020 (GShard).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmodels.errors import UserError
from jaxmodels.fields import Depth, Dim, Positive, Weight
from jaxmodels.models import experts, layers
from jaxmodels.models.decoder import BlockDecoder, RotaryConfig, output_table
from jaxmodels.models.decoding import Context, KeyValues, empty_cache
from jaxmodels.models.families import register
from jaxmodels.models.heads import MultiHead
from jaxmodels.models.inputs import token_inputs
from jaxmodels.models.model import Family
from jaxmodels.models.rotary import rotary_frequencies
from jaxmodels.parallel import rules

Sums = dict[str, jax.Array]


@dataclass(frozen=True)
class MixtralConfig(RotaryConfig):
    """Mixtral; the defaults are Mixtral 8x7B."""

    context: Dim = 32768
    kv_heads: Depth | None = 8
    mlp_width: Dim = 14336
    rope_theta: Positive = 1e6
    experts: Depth = 8
    """Experts of a block (E)."""
    experts_per_token: Depth = 2
    """Experts of a token (k), weighted by a softmax over their scores."""
    routing: Literal["dropless", "capacity"] = "dropless"
    """dropless: a token goes through all its experts; capacity: through those that have a place left for it."""
    capacity_factor: Positive = 1.25
    """With `capacity`: an expert's places for a row, as a multiple of what it needs if all are chosen equally often."""
    balance_loss: Weight = 0.02
    """Weight of the loss that is least when all experts are chosen equally often."""
    z_loss: Weight = 0.0
    """Weight of the router's mean squared log partition function."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.experts_per_token <= self.experts:
            raise UserError(
                f"got experts_per_token {self.experts_per_token}, expected from 1 to all {self.experts} experts, "
                f"try experts_per_token {min(max(self.experts_per_token, 1), self.experts)}"
            )

    def capacity(self, tokens: int) -> int:
        """The places that an expert has for this many tokens of a row."""
        return min(tokens, math.ceil(self.capacity_factor * self.experts_per_token * tokens / self.experts))

    def plain(self) -> MixtralConfig:
        return dataclasses.replace(super().plain(), routing="dropless")

    def indivisible(self) -> str:
        return "" if self.routing == "dropless" else f"routing {self.routing}"

    def dispatched(self) -> float:
        return self.experts_per_token * (self.capacity_factor if self.routing == "capacity" else experts.SLACK)


class MoE(nn.Module):
    """Gated MLPs, of which each token uses k: (B, T, D) to the same, and sums for the router's losses."""

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
            places = experts.assign_places(chosen, real, E, capacity)
            y = experts.limited(x, places, share, weights, nn.silu, capacity)
        return y, router_sums(logits, chosen, real)


def greatest(scores: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """`jax.lax.top_k` as k maxima: to sort, XLA's partitioner would gather the scores of all tokens on every device.

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


def router_sums(logits: jax.Array, chosen: jax.Array, real: jax.Array | None) -> Sums:
    """The sums over real tokens from which the losses of the router are computed.

    Shapes: logits (B, T, E), chosen (B, T, k), real (B, T).
    """
    counts = jnp.ones(logits.shape[:2]) if real is None else real.astype(jnp.float32)
    log_z = jax.nn.logsumexp(logits, -1)
    per_expert = jax.nn.one_hot(chosen, logits.shape[-1]).sum(-2)
    return {
        "tokens": counts.sum(),
        "asked": (per_expert * counts[..., None]).sum((0, 1)),
        "probability": (jnp.exp(logits - log_z[..., None]) * counts[..., None]).sum((0, 1)),
        "log_z_squared": (jnp.square(log_z) * counts).sum(),
    }


def router_losses(c: MixtralConfig, sums: Sums) -> dict[str, jax.Array]:
    """The weighted losses of the router, from the sums of all layers.

    The balance loss is that of transformers (`load_balancing_loss_func`), over all layers together.
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


class Mixtral(BlockDecoder):
    """A decoder whose blocks have experts; with `auxiliary` it gives the router's weighted losses beside its outputs.

    With `capacity`, places are counted in the tokens of a call: what is decoded token by token through a cache always
    finds one.
    """

    config: MixtralConfig

    def blocks(self, train: bool) -> tuple[Any, ...]:
        return (Block,)

    def losses(self, sums: Sums) -> dict[str, jax.Array]:
        return router_losses(self.config, sums)


register(
    Family(
        name="mixtral",
        config=MixtralConfig,
        network=Mixtral,
        inputs=token_inputs,
        cache=lambda c, batch, length: empty_cache(
            c.layers, batch, length, c.kv_heads or c.heads, c.head_size, c.dtype
        ),
        unembedding=output_table,
        presets={
            "mixtral-8x7b": MixtralConfig(),
            "mixtral-8x22b": MixtralConfig(
                context=65536, layers=56, heads=48, width=6144, mlp_width=16384, balance_loss=0.001
            ),
        },
        auxiliary=True,
    )
)
