"""Sampling token by token, as one compiled loop."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.errors import UserError
from jaxmodels.models.model import Model

How = tuple[float, int | None, float]
"""Temperature, top_k, top_p: known when the loop is compiled."""


def sample(
    model: Model,
    params: Any,
    prompt: Any,
    tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    cached: bool = True,
    ends: Sequence[int] = (),
) -> np.ndarray | list[np.ndarray]:
    """Continue prompts by `tokens` tokens, or up to one of the tokens `ends`, which then fills the rest of its row.

    Prompts may differ in length: each then goes on as it would alone, and a list of arrays comes back. `temperature` 0
    takes the likeliest token; `top_k` keeps the k likeliest; `top_p` the smallest set of tokens with that much
    probability (Holtzman et al. 2020). `cached=False` computes all tokens anew for each one, with the same result.
    Shapes: prompt (B, P) integers, P ≥ 1, or B sequences of integers; returns (B, P + tokens), or B arrays.

    Raises:
        UserError: an option out of range, or more tokens than the model takes.
    """
    rows = _rows(prompt)
    lengths = np.array([len(row) for row in rows], np.int32)
    _check(model, lengths, tokens)
    if temperature < 0 or not 0 < top_p <= 1 or (top_k is not None and top_k < 1):
        raise UserError(
            f"got temperature {temperature}, top_k {top_k}, top_p {top_p}, expected temperature >= 0, "
            "top_k >= 1, 0 < top_p <= 1, try temperature 0.8, top_k 50, top_p 0.9"
        )
    run, longest = _cached if cached else _uncached, int(lengths.max()) + tokens
    # lengths are rounded up, so that prompts of similar length share a compiled program
    room = -(-longest // 64) * 64 if model.longest is None else min(-(-longest // 64) * 64, model.longest)
    padded = np.zeros((len(rows), room), np.int32)
    for place, row in zip(padded, rows, strict=True):
        place[: len(row)] = row
    numbers = (jnp.asarray(lengths), jnp.int32(longest), jnp.asarray(ends, jnp.int32))
    out = run(model, params, jnp.asarray(padded), *numbers, jax.random.key(seed), (temperature, top_k, top_p))
    found = [row[: length + tokens] for row, length in zip(np.array(out), lengths, strict=True)]
    for row, length in zip(found, lengths, strict=True):
        if (stops := np.flatnonzero(np.isin(row[length:], ends))).size:
            row[length + stops[0] :] = row[length + stops[0]]
    return np.stack(found) if (lengths == lengths[0]).all() else found


def _rows(prompt: Any) -> list[np.ndarray]:
    """The prompts, each (P,)."""
    if np.ndim(prompt[0] if len(prompt) else 0) == 0:
        prompt = [prompt]
    return [np.asarray(row, np.int32).reshape(-1) for row in prompt]


def _check(model: Model, lengths: np.ndarray, tokens: int) -> None:
    """Raises UserError where a prompt has no token, none is to be added, or the model does not take so many."""
    if lengths.min() < 1 or tokens < 1:
        raise UserError(
            f"got a prompt of {lengths.min()} tokens and {tokens} to add, expected at least 1 of each, "
            f"try {'--tokens 1' if lengths.min() else 'a prompt of a word'}"
        )
    longest = int(lengths.max())
    if model.longest is not None and longest + tokens > model.longest:
        room = model.longest - longest
        hint = f"--tokens {room}" if room > 0 else f"a prompt of at most {model.longest - tokens} tokens"
        if room <= 0 and tokens >= model.longest:
            hint = f"a prompt of at most {model.longest - 1} tokens and --tokens 1"
        raise UserError(
            f"got a prompt of {longest} tokens and {tokens} to add, expected at most the model's "
            f"context of {model.longest} in all, try {hint}"
        )


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


def _ended(tokens: jax.Array, at: Any, prompts: jax.Array, ends: jax.Array) -> jax.Array:
    """Rows (B,) that have an end at position `at`, behind their prompt."""
    last = jax.lax.dynamic_index_in_dim(tokens, at, axis=1, keepdims=False)
    return (at >= prompts) & (last[:, None] == ends).any(1)


def _put(
    tokens: jax.Array, at: Any, logits: jax.Array, prompts: jax.Array, ends: jax.Array, key: jax.Array, how: How
) -> jax.Array:
    """Tokens with the one behind position `at` drawn from its logits (B, V).

    A row whose prompt has it keeps it, and one that has ended has its end again.
    """
    new = choose(logits, jax.random.fold_in(key, at), *how).astype(tokens.dtype)
    last, own = (jax.lax.dynamic_index_in_dim(tokens, i, axis=1, keepdims=False) for i in (at, at + 1))
    new = jnp.where(at + 1 < prompts, own, jnp.where(_ended(tokens, at, prompts, ends), last, new))
    return jax.lax.dynamic_update_slice(tokens, new[:, None], (0, at + 1))


@functools.partial(jax.jit, static_argnums=(0, 7))
def _cached(
    model: Model,
    params: Any,
    tokens: jax.Array,
    prompts: jax.Array,
    length: Any,
    ends: jax.Array,
    key: jax.Array,
    how: How,
) -> jax.Array:
    B, room = tokens.shape
    first = prompts.min()

    def body(carry: tuple[jax.Array, Any, jax.Array]) -> tuple[jax.Array, Any, jax.Array]:
        tokens, cache, at = carry
        logits, cache = model.apply(params, jax.lax.dynamic_slice(tokens, (0, at), (B, 1)), cache=cache)
        return _put(tokens, at, logits[:, -1], prompts, ends, key, how), cache, at + 1

    # What all prompts have goes through at once, the rest of the longer ones token by token. What lies behind is
    # padding here: it leaves a recurrent state as it is, and keys are overwritten before they are ever attended to.
    real = jnp.broadcast_to(jnp.arange(room) < first, (B, room)).astype(jnp.int32)
    logits, cache = model.apply(params, tokens, segment_ids=real, cache=model.cache(B, room))
    last = jax.lax.dynamic_index_in_dim(logits, first - 1, axis=1, keepdims=False)
    start = (_put(tokens, first - 1, last, prompts, ends, key, how), {**cache, "length": first}, first)

    def goes_on(carry: tuple[jax.Array, Any, jax.Array]) -> jax.Array:
        tokens, _, at = carry
        return (at + 1 < length) & ~_ended(tokens, at, prompts, ends).all()

    return jax.lax.while_loop(goes_on, body, start)[0]


@functools.partial(jax.jit, static_argnums=(0, 7))
def _uncached(
    model: Model,
    params: Any,
    tokens: jax.Array,
    prompts: jax.Array,
    length: Any,
    ends: jax.Array,
    key: jax.Array,
    how: How,
) -> jax.Array:
    def body(at: jax.Array, tokens: jax.Array) -> jax.Array:
        logits = jax.lax.dynamic_index_in_dim(model.apply(params, tokens), at, axis=1, keepdims=False)
        return _put(tokens, at, logits, prompts, ends, key, how)

    return jax.lax.fori_loop(prompts.min() - 1, length - 1, body, tokens)
