"""Sampling token by token, as one compiled loop.

Dims: B rows, P tokens of a prompt, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.errors import UserError
from jaxmodels.fields import KVCache
from jaxmodels.models.families import create
from jaxmodels.models.kernels.kernel import kernel_of
from jaxmodels.models.model import Model, quantized, with_kv_cache

SMALLEST = 1e-6
"""A temperature or repetition penalty below this is taken for this: logits divided by less may be infinite."""


class How(NamedTuple):
    """How a token is drawn from logits; static when the loop is compiled."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    repetition_penalty: float = 1.0


class Prompts(NamedTuple):
    """What the loop needs about a batch besides its tokens; arrays, so that no value causes a recompilation."""

    lengths: jax.Array
    """Length of each prompt, (B,)."""
    count: jax.Array
    """Number of tokens to add to each row, ()."""
    ends: jax.Array
    """The ids that end a row."""
    key: jax.Array


def sample(
    model: Model,
    params: Any,
    prompt: Any,
    tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    cached: bool = True,
    kv_cache: KVCache | None = None,
    ends: Sequence[int] = (),
    media: Sequence[Any] = (),
) -> np.ndarray | list[np.ndarray]:
    """Continue prompts by `tokens` tokens, or up to one of the tokens `ends`, which then fills the rest of its row.

    Prompts may differ in length: each continues from its own end, and a list of arrays is returned. `temperature` 0
    takes the likeliest token; `top_k` keeps the k likeliest; `top_p` the smallest set of tokens with that much
    probability (Holtzman et al. 2020). A `repetition_penalty` above 1 makes tokens that a row already has less likely:
    it divides their positive logits and multiplies their negative ones (Keskar et al. 2019, section 4.1).
    `cached=False` recomputes all tokens for each new one, with the same result; `kv_cache="int8"` holds keys and values
    as codes, which is less exact. `media` are what the model takes behind
    the tokens, such as images, a row for each prompt, in which tokens stand for them.
    Shapes: prompt (B, P) integers, P ≥ 1, or B sequences of integers; returns (B, P + tokens), or B arrays.

    Raises:
        UserError: an option out of range, or more tokens than the model takes.
    """
    rows = _rows(prompt)
    lengths = np.array([len(row) for row in rows], np.int32)
    _check_room(model, lengths, tokens)
    if temperature < 0 or not 0 < top_p <= 1 or (top_k is not None and top_k < 1):
        raise UserError(
            f"got temperature {temperature}, top_k {top_k}, top_p {top_p}, expected temperature >= 0, "
            "top_k >= 1, 0 < top_p <= 1, try temperature 0.8, top_k 50, top_p 0.9"
        )
    if not repetition_penalty > 0:
        raise UserError(
            f"got repetition_penalty {repetition_penalty}, expected a number above 0, try 1.2, or 1 for no penalty"
        )
    if media and not cached:  # where a new token that stands for a medium would be read as one
        raise UserError("got media with cached=False, expected them with a cache, try cached=True")
    if kv_cache and not cached:
        raise UserError(f"got kv_cache {kv_cache!r} with cached=False, expected it with a cache, try cached=True")
    longest = int(lengths.max()) + tokens
    model = with_kv_cache(with_cache(model), kv_cache) if cached else model
    # lengths are rounded up, so that prompts of similar length share a compiled program
    room = -(-longest // 64) * 64 if model.longest is None else min(-(-longest // 64) * 64, model.longest)
    padded = np.zeros((len(rows), room), np.int32)
    for line, row in zip(padded, rows, strict=True):
        line[: len(row)] = row
    told = Prompts(jnp.asarray(lengths), jnp.int32(tokens), jnp.asarray(ends, jnp.int32), jax.random.key(seed))
    how = How(temperature and max(temperature, SMALLEST), top_k, top_p, max(repetition_penalty, SMALLEST))
    given = (model, params, jnp.asarray(padded), told, how)
    out = _cached(*given, tuple(media)) if cached else _uncached(*given)
    found = [row[: length + tokens] for row, length in zip(np.array(out), lengths, strict=True)]
    for row, length in zip(found, lengths, strict=True):
        if (stops := np.flatnonzero(np.isin(row[length:], ends))).size:
            row[length + stops[0] :] = row[length + stops[0]]
    return np.stack(found) if (lengths == lengths[0]).all() else found


@functools.lru_cache(maxsize=8)
def with_cache(model: Model) -> Model:
    """The model with an attention kernel that reads a cache: its own or, where that cannot, the one that `auto` takes.

    A model may be trained with a kernel that sees whole sequences alone; what it computes is the same with any other.
    """
    name = getattr(model.config, "attention", "auto")
    if name == "auto" or kernel_of(name).features >= {"segment_ids", "q_offset array", "kv_length"}:
        return model
    made = dataclasses.replace(create(model.config, attention="auto"), cache=model.cache)
    return quantized(made, model.rule) if model.rule else made


def _rows(prompt: Any) -> list[np.ndarray]:
    """Return the prompts as arrays (P,)."""
    if np.ndim(prompt[0] if len(prompt) else 0) == 0:
        prompt = [prompt]
    return [np.asarray(row, np.int32).reshape(-1) for row in prompt]


def _check_room(model: Model, lengths: np.ndarray, tokens: int) -> None:
    """Raise UserError if a prompt is empty, no token is to be added, or the model's context is too short."""
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


def choose(logits: jax.Array, key: jax.Array, how: How) -> jax.Array:
    """Choose one token per row from logits (B, V)."""
    temperature, top_k, top_p, _ = how
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


def penalize(logits: jax.Array, tokens: jax.Array, at: jax.Array, penalty: float) -> jax.Array:
    """Make the tokens that a row has up to its position `at` (B,) less likely in its logits (B, V)."""
    real = jnp.arange(tokens.shape[1]) <= at[:, None]
    had = jnp.zeros(logits.shape, bool).at[jnp.arange(len(tokens))[:, None], tokens].max(real)
    return jnp.where(had, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def _ended(tokens: jax.Array, at: jax.Array, told: Prompts) -> jax.Array:
    """Return which rows (B,) have an end token, after the prompt, at their position `at`."""
    last = jnp.take_along_axis(tokens, at[:, None], axis=1)
    return (at >= told.lengths) & (last == told.ends).any(1)


def _put(tokens: jax.Array, at: jax.Array, logits: jax.Array, step: Any, told: Prompts, how: How) -> jax.Array:
    """Set each row's next token, drawn from the logits (B, V) of its position `at` (B,).

    A row that has ended repeats its end token.
    """
    if how.repetition_penalty != 1:
        logits = penalize(logits, tokens, at, how.repetition_penalty)
    key = jax.random.fold_in(told.key, told.lengths.min() - 1 + step)
    new = choose(logits, key, how).astype(tokens.dtype)
    rows = jnp.arange(len(tokens))
    new = jnp.where(_ended(tokens, at, told), tokens[rows, at], new)
    return tokens.at[rows, at + 1].set(new)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _cached(model: Model, params: Any, tokens: jax.Array, told: Prompts, how: How, media: tuple[Any, ...]) -> jax.Array:
    B, room = tokens.shape

    def goes_on(carry: tuple[jax.Array, Any, jax.Array]) -> jax.Array:
        tokens, _, step = carry
        return (step < told.count) & ~_ended(tokens, told.lengths + step - 1, told).all()

    def body(carry: tuple[jax.Array, Any, jax.Array]) -> tuple[jax.Array, Any, jax.Array]:
        tokens, cache, step = carry
        at = told.lengths + step - 1
        last = jnp.take_along_axis(tokens, at[:, None], axis=1)
        logits, cache = model.apply(params, last, cache=cache)
        return _put(tokens, at, logits[:, -1], step, told, how), cache, step + 1

    # All prompts go through together, each to its own length. What follows is padding: it leaves a recurrent state
    # unchanged, and with the length set back its keys are overwritten before they are ever attended to.
    real = (jnp.arange(room) < told.lengths[:, None]).astype(jnp.int32)
    logits, cache = model.apply(params, tokens, *media, segment_ids=real, cache=model.cache(B, room))
    last = logits[jnp.arange(B), told.lengths - 1]
    tokens = _put(tokens, told.lengths - 1, last, 0, told, how)
    start = (tokens, {**cache, "length": told.lengths}, jnp.int32(1))
    return jax.lax.while_loop(goes_on, body, start)[0]


@functools.partial(jax.jit, static_argnums=(0, 4))
def _uncached(model: Model, params: Any, tokens: jax.Array, told: Prompts, how: How) -> jax.Array:
    def body(step: jax.Array, tokens: jax.Array) -> jax.Array:
        at = told.lengths + step - 1
        logits = model.apply(params, tokens)[jnp.arange(len(tokens)), at]
        return _put(tokens, at, logits, step, told, how)

    return jax.lax.fori_loop(0, told.count, body, tokens)
