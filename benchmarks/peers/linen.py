"""A GPT as a plain script writes it: Flax's stock layers, Optax, one jitted step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax


class Block(nn.Module):
    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        B, T, D = x.shape
        y = nn.LayerNorm()(x)
        q, k, v = (part.reshape(B, T, self.heads, -1) for part in jnp.split(nn.Dense(3 * D)(y), 3, axis=-1))
        scores = jnp.einsum("bthd,bshd->bhts", q, k) / (D // self.heads) ** 0.5
        scores = jnp.where(jnp.tril(jnp.ones((T, T), bool)), scores, -jnp.inf)
        y = jnp.einsum("bhts,bshd->bthd", nn.softmax(scores), v).reshape(B, T, D)
        x = x + nn.Dense(D)(y)
        return x + nn.Dense(D)(nn.gelu(nn.Dense(4 * D)(nn.LayerNorm()(x))))


class GPT(nn.Module):
    vocab: int
    layers: int
    heads: int
    width: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = nn.Embed(self.vocab, self.width)
        x = embed(tokens) + nn.Embed(tokens.shape[1], self.width)(jnp.arange(tokens.shape[1]))
        for _ in range(self.layers):
            x = Block(self.heads)(x)
        return embed.attend(nn.LayerNorm()(x))


def make(vocab: int, batch: int, length: int, layers: int, heads: int, width: int) -> Callable[[], Any]:
    model = GPT(vocab, layers, heads, width)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((batch, length), jnp.int32))["params"]
    decayed = jax.tree.map(lambda leaf: leaf.ndim > 1, params)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, 0.9, 0.95, weight_decay=0.1, mask=decayed))
    state = [(params, jax.jit(tx.init)(params))]

    @partial(jax.jit, donate_argnums=0)
    def update(state: Any, tokens: jax.Array, targets: jax.Array) -> Any:
        params, moments = state

        def loss(params: Any) -> jax.Array:
            logits: Any = model.apply({"params": params}, tokens)
            return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, moments = tx.update(grads, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    rows = np.random.default_rng(0).integers(0, vocab, (batch, length + 1)).astype(np.int32)

    def step() -> Any:
        state[0], loss = update(state[0], rows[:, :-1], rows[:, 1:])
        return loss

    return step
