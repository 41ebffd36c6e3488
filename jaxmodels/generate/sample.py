"""Sampling token by token, as one compiled loop."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.errors import UserError
from jaxmodels.models.functional import Model

How = tuple[float, int | None, float]
"""Temperature, top_k, top_p: known when the loop is compiled."""


def sample(
    model: Model,
    params: Any,
    prompt: np.ndarray,
    tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    cached: bool = True,
) -> np.ndarray:
    """Continue prompts by `tokens` tokens.

    `temperature` 0 takes the likeliest token; `top_k` keeps the k likeliest; `top_p` the smallest set of tokens with
    that much probability (Holtzman et al. 2020). `cached=False` computes all tokens anew for each one, with the
    same result.
    Shapes: prompt (B, P) integers, P ≥ 1; returns (B, P + tokens).

    Raises:
        UserError: an option out of range, or more tokens than the model takes.
    """
    prompt = np.atleast_2d(np.asarray(prompt, np.int32))
    length = prompt.shape[1] + tokens
    if prompt.shape[1] < 1 or tokens < 1:
        raise UserError(f"got a prompt of {prompt.shape[1]} tokens and {tokens} to add, expected at least 1 of each")
    if model.longest is not None and length > model.longest:
        raise UserError(
            f"got a prompt of {prompt.shape[1]} tokens and {tokens} to add, expected at most the model's "
            f"context of {model.longest} in all, try --tokens {max(model.longest - prompt.shape[1], 1)}"
        )
    if temperature < 0 or not 0 < top_p <= 1 or (top_k is not None and top_k < 1):
        raise UserError(
            f"got temperature {temperature}, top_k {top_k}, top_p {top_p}, expected temperature >= 0, "
            "top_k >= 1, 0 < top_p <= 1"
        )
    run = _cached if cached else _uncached
    # lengths are rounded up, so that prompts of similar length share a compiled program
    room = -(-length // 64) * 64 if model.longest is None else min(-(-length // 64) * 64, model.longest)
    padded = np.zeros((prompt.shape[0], room), np.int32)
    padded[:, : prompt.shape[1]] = prompt
    numbers = (jnp.int32(prompt.shape[1]), jnp.int32(length))
    out = run(model, params, jnp.asarray(padded), *numbers, jax.random.key(seed), (temperature, top_k, top_p))
    return np.asarray(out)[:, :length]


def choose(logits: jax.Array, key: jax.Array, temperature: float, top_k: int | None, top_p: float) -> jax.Array:
    """One token a row from logits (B, V)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        smallest = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if top_p < 1:
        ordered = jnp.sort(logits, axis=-1)[:, ::-1]
        share = jax.nn.softmax(ordered, axis=-1)
        # kept: tokens before which less than top_p has been gathered, so always the first
        kept = jnp.cumsum(share, axis=-1) - share < top_p
        smallest = jnp.where(kept, ordered, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    return jax.random.categorical(key, logits)


def _put(tokens: jax.Array, at: Any, logits: jax.Array, key: jax.Array, how: How) -> jax.Array:
    """Tokens with the one behind position `at` drawn from its logits (B, V)."""
    new = choose(logits, jax.random.fold_in(key, at), *how).astype(tokens.dtype)
    return jax.lax.dynamic_update_slice(tokens, new[:, None], (0, at + 1))


@functools.partial(jax.jit, static_argnums=(0, 6))
def _cached(
    model: Model, params: Any, tokens: jax.Array, prompt: Any, length: Any, key: jax.Array, how: How
) -> jax.Array:
    B, room = tokens.shape

    def body(carry: tuple[jax.Array, Any, jax.Array]) -> tuple[jax.Array, Any, jax.Array]:
        tokens, cache, at = carry
        logits, cache = model.apply(params, jax.lax.dynamic_slice(tokens, (0, at), (B, 1)), cache=cache)
        return _put(tokens, at, logits[:, -1], key, how), cache, at + 1

    # The whole row goes through at once. What lies behind the prompt is padding: it leaves a recurrent state as it is,
    # and keys are overwritten before they are ever attended to.
    real = jnp.broadcast_to(jnp.arange(room) < prompt, (B, room)).astype(jnp.int32)
    logits, cache = model.apply(params, tokens, segment_ids=real, cache=model.cache(B, room))
    last = jax.lax.dynamic_index_in_dim(logits, prompt - 1, axis=1, keepdims=False)
    start = (_put(tokens, prompt - 1, last, key, how), {**cache, "length": prompt}, prompt)
    return jax.lax.while_loop(lambda carry: carry[2] + 1 < length, body, start)[0]


@functools.partial(jax.jit, static_argnums=(0, 6))
def _uncached(
    model: Model, params: Any, tokens: jax.Array, prompt: Any, length: Any, key: jax.Array, how: How
) -> jax.Array:
    def body(at: jax.Array, tokens: jax.Array) -> jax.Array:
        logits = jax.lax.dynamic_index_in_dim(model.apply(params, tokens), at, axis=1, keepdims=False)
        return _put(tokens, at, logits, key, how)

    return jax.lax.fori_loop(prompt - 1, length - 1, body, tokens)
