"""How the next token of each row is drawn, with options of its own for each row, on the device.

Dims: B rows, V vocabulary, K tokens whose log-probabilities are reported.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.fields import Range, Section, Seed
from jaxmodels.generate.sample import SMALLEST

TOLD = 20
"""The most tokens whose log-probabilities are reported beside the one that was drawn."""
PENALTIES = ("repetition", "presence", "frequency")
DIVISORS = ("temperature", "repetition_penalty")
"""Options by which logits are divided, so that they would be infinite if these were smaller than `SMALLEST`."""


@dataclass(frozen=True)
class Draw(Section):
    """How a request's tokens are drawn; in the order penalties, temperature, top_k, top_p, min_p."""

    temperature: Annotated[float, Range(0)] = 1.0
    """0 takes the likeliest token."""
    top_k: Annotated[int, Range(0, 2**31 - 1)] = 0
    """Only the k likeliest tokens; 0: all."""
    top_p: Annotated[float, Range(above=0, most=1)] = 1.0
    """Only the likeliest tokens that together have this probability."""
    min_p: Annotated[float, Range(0, 1)] = 0.0
    """Only tokens with this share of the likeliest one's probability."""
    repetition_penalty: Annotated[float, Range(above=0)] = 1.0
    """Divides positive logits of tokens that the text has, the prompt included, and multiplies negative ones."""
    presence_penalty: Annotated[float, Range(-2, 2)] = 0.0
    """Is taken from the logits of tokens that were generated."""
    frequency_penalty: Annotated[float, Range(-2, 2)] = 0.0
    """Is taken from them as often as they were generated."""
    seed: Seed = 0
    told: Annotated[int, Range(-1, TOLD)] = -1
    """How many of the likeliest tokens' log-probabilities are reported beside that of the token; -1: none at all."""

    @functools.cached_property
    def values(self) -> tuple[float, ...]:
        """The options in their order, none of which makes a logit infinite."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        tiny = {name: SMALLEST for name in DIVISORS if 0 < found[name] < SMALLEST}
        return tuple((found | tiny).values())

    @property
    def penalizes(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


GREEDY = Draw(temperature=0.0)


class Draws(NamedTuple):
    """The options of all rows, (B,) each."""

    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    repetition_penalty: Any
    presence_penalty: Any
    frequency_penalty: Any
    seed: Any
    told: Any

    @staticmethod
    def of(rows: Sequence[Draw | None]) -> Draws:
        """The options of these rows; those of a greedy one for a row that is not there."""
        neutral = GREEDY
        columns = zip(*((row or neutral).values for row in rows), strict=True)
        kinds = [np.float32, np.int32, *[np.float32] * 5, np.uint32, np.int32]
        return Draws(*(np.array(column, kind) for column, kind in zip(columns, kinds, strict=True)))


class Drawn(NamedTuple):
    """What was drawn. The log-probabilities are the model's own; they are 0 where no row asks for them."""

    token: jax.Array
    """(B,)."""
    logprob: jax.Array
    """(B,)."""
    likeliest: jax.Array
    """(B, K)."""
    logprobs: jax.Array
    """Those of the likeliest, (B, K)."""


def draw(logits: jax.Array, position: jax.Array, counts: jax.Array, slots: jax.Array, options: Draws) -> Drawn:
    """Draw a token for each row.

    What only some options need is computed only if a row asks for it. A row's draws depend on its seed and the position
    of the token before, as in `sample`, and not on the rows beside it.
    Shapes: logits (B, V), position and slots (B,), counts (2, R, V): how often each token is in the prompt of the row
    in a slot, and behind it.
    """
    asked = (options.repetition_penalty != 1) | (options.presence_penalty != 0) | (options.frequency_penalty != 0)
    shaped = jax.lax.cond(asked.any(), _penalized, lambda logits, *_: logits, logits, counts, slots, options)
    warm = options.temperature > 0
    token = jax.lax.cond(warm.any(), _sampled, lambda shaped, *_: shaped.argmax(-1), shaped, position, options)
    K = min(TOLD, logits.shape[1])

    def tell(logits: jax.Array, token: jax.Array) -> tuple[jax.Array, ...]:
        logprobs = jax.nn.log_softmax(logits)
        most, likeliest = jax.lax.top_k(logprobs, K)
        return jnp.take_along_axis(logprobs, token[:, None], axis=1)[:, 0], likeliest.astype(jnp.int32), most

    def nothing(logits: jax.Array, token: jax.Array) -> tuple[jax.Array, ...]:
        B = len(token)
        return jnp.zeros(B), jnp.zeros((B, K), jnp.int32), jnp.zeros((B, K))

    token = token.astype(jnp.int32)
    return Drawn(token, *jax.lax.cond((options.told >= 0).any(), tell, nothing, logits, token))


def _penalized(logits: jax.Array, counts: jax.Array, slots: jax.Array, options: Draws) -> jax.Array:
    counts = counts.at[:, slots].get(mode="clip")
    repetition, presence, frequency = (getattr(options, f"{name}_penalty")[:, None] for name in PENALTIES)
    changed = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits = jnp.where(counts.sum(0) > 0, changed, logits)
    return logits - presence * (counts[1] > 0) - frequency * counts[1]


def _sampled(logits: jax.Array, position: jax.Array, options: Draws) -> jax.Array:
    warm = options.temperature > 0
    scaled = logits / jnp.where(warm, options.temperature, 1.0)[:, None]
    limited = (options.top_k > 0) | (options.top_p < 1) | (options.min_p > 0)
    scaled = jax.lax.cond((warm & limited).any(), _limited, lambda scaled, _: scaled, scaled, options)
    keys = jax.vmap(lambda seed, at: jax.random.fold_in(jax.random.key(seed), at))(options.seed, position)
    drawn = jax.vmap(jax.random.categorical)(keys, scaled)
    return jnp.where(warm, drawn, logits.argmax(-1))


def _limited(logits: jax.Array, options: Draws) -> jax.Array:
    """The logits with -inf for tokens that top_k, top_p or min_p leave out."""
    V = logits.shape[1]
    ordered = jnp.sort(logits, axis=-1)[:, ::-1]
    last = jnp.where(options.top_k > 0, jnp.minimum(options.top_k, V), V) - 1
    least = jnp.take_along_axis(ordered, last[:, None], axis=1)
    ordered = jnp.where(ordered < least, -jnp.inf, ordered)
    share = jax.nn.softmax(ordered, axis=-1)
    # kept: tokens before which less than top_p has been gathered, so always the first
    kept = jnp.cumsum(share, axis=-1) - share < options.top_p[:, None]
    least = jnp.maximum(least, jnp.where(kept, ordered, jnp.inf).min(-1, keepdims=True))
    least = jnp.maximum(least, ordered[:, :1] + jnp.log(options.min_p)[:, None])
    return jnp.where(logits < least, -jnp.inf, logits)


def seeded(seed: int, number: int) -> int:
    """The seed of one of several continuations of a prompt; the first has the request's own."""
    return (seed + number * 0x9E3779B9) % 2**32
