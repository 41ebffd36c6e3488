"""Connectionist temporal classification (Graves et al. 2006): the loss, greedy decoding, alignment and edit distances.

Dims: B rows, T frames, V characters with the blank, U characters of a text, S = 2U + 1 places: blanks around them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.data.contract import IGNORED

Array = jax.Array
_NEVER = -1e30
"""The logarithm of a probability of 0. It is finite, so that gradients are numbers."""
_FACTORS = (16777619, 2654435761)


def ctc_loss(logits: Array, frames: Array, targets: Array, blank: int) -> Array:
    """Compute the nats of each text, over all alignments with its frames, (B,); inf if it has too few of them.

    Shapes: logits (B, T, V), of which row b has frames[b]; targets (B, U), IGNORED behind a text's end.
    Source: Graves et al. 2006, equations 6 to 8.
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    places, skips = spread(targets, blank)
    count = (targets >= 0).sum(1)
    # a product rather than a look-up, whose gradient is a scatter that accelerators cannot fuse
    chosen = jax.nn.one_hot(places, logits.shape[-1])
    log_p = jnp.einsum("btv,bsv->tbs", log_p, chosen, precision=jax.lax.Precision.HIGHEST)
    first = jnp.where(jnp.arange(places.shape[1]) < 2, log_p[0], _NEVER)

    def advance(alpha: Array, step: Any) -> tuple[Array, None]:
        log_p, at = step
        stay, one, two = (
            jnp.pad(alpha, ((0, 0), (k, 0)), constant_values=_NEVER)[:, : alpha.shape[1]] for k in range(3)
        )
        found = jnp.logaddexp(jnp.logaddexp(stay, one), jnp.where(skips, two, _NEVER)) + log_p
        return jnp.where(at < frames[:, None], found, alpha), None

    alpha, _ = jax.lax.scan(advance, first, (log_p[1:], jnp.arange(1, logits.shape[1])))
    last = jnp.take_along_axis(alpha, jnp.stack([2 * count, jnp.maximum(2 * count - 1, 0)], 1), 1)
    total = jnp.logaddexp(last[:, 0], jnp.where(count > 0, last[:, 1], _NEVER))
    # rounding may make a probability of 1 larger than that
    return jnp.where(fits(frames, targets), jnp.maximum(-total, 0.0), jnp.inf)


def spread(targets: Any, blank: int) -> tuple[Array, Array]:
    """Put blanks around the characters of texts (B, U): places (B, S), and which may follow the last but one."""
    text = jnp.where(targets >= 0, targets, blank)
    places = jnp.full((len(text), 2 * text.shape[1] + 1), blank, text.dtype).at[:, 1::2].set(text)
    before = jnp.pad(places, ((0, 0), (2, 0)), constant_values=blank)[:, : places.shape[1]]
    return places, (places != blank) & (places != before)


def fits(frames: Array, targets: Array) -> Array:
    """Whether texts have enough frames, (B,): one a character, and a blank between two equal ones."""
    again = (targets[:, 1:] >= 0) & (targets[:, 1:] == targets[:, :-1])
    return jnp.maximum((targets >= 0).sum(1) + again.sum(1), 1) <= frames


def greedy(logits: Array, frames: Array, blank: int) -> Array:
    """Read the likeliest character of each frame, repeated ones once and without blanks, (B, T), IGNORED at the end."""
    best = logits.argmax(-1).astype(jnp.int32)
    before = jnp.pad(best, ((0, 0), (1, 0)), constant_values=blank)[:, :-1]
    there = jnp.arange(best.shape[1]) < frames[:, None]
    return compact(best, there & (best != blank) & (best != before))


def compact(x: Array, keep: Array) -> Array:
    """Move what is kept of each row (B, T) to its beginning; IGNORED behind it."""
    at = jnp.where(keep, jnp.cumsum(keep, 1) - 1, x.shape[1])
    return jax.vmap(lambda row, at: jnp.full_like(row, IGNORED).at[at].set(row, mode="drop"))(x, at)


def stripped(ids: Array, space: int | None) -> Array:
    """Remove the spaces before and behind texts (B, U)."""
    if space is None:
        return ids
    letter = (ids >= 0) & (ids != space)
    inside = (jnp.cumsum(letter, 1) > 0) & (jnp.cumsum(letter[:, ::-1], 1)[:, ::-1] > 0)
    return compact(ids, inside)


def words(ids: Array, space: int) -> Array:
    """Return two hashes of 32 bits for each word of texts (B, U), (B, U, 2) int32, IGNORED behind the last word."""
    letter = (ids >= 0) & (ids != space)
    factors = jnp.array(_FACTORS, jnp.uint32)

    def advance(state: Array, step: Any) -> tuple[Array, Array]:
        letter, value = step
        state = jnp.where(letter[:, None], (state ^ value[:, None].astype(jnp.uint32)) * factors, factors)
        return state, state

    _, found = jax.lax.scan(advance, jnp.broadcast_to(factors, (len(ids), 2)), (letter.T, (ids + 1).T))
    ends = letter & ~jnp.pad(letter, ((0, 0), (0, 1)))[:, 1:]
    hashes = (found >> 1).astype(jnp.int32)  # IGNORED is below 0, and no hash is
    return jnp.stack([compact(hashes[..., k].T, ends) for k in range(2)], -1)


def edits(found: Array, wanted: Array) -> Array:
    """Count the insertions, deletions and substitutions that make each row of one the other, (B,).

    Shapes: (B, N) and (B, M), or (B, N, K) and (B, M, K) whose members are equal if all K numbers are; IGNORED at the
    end. Source: Wagner & Fischer 1974.
    """
    found, wanted = (x if x.ndim == 3 else x[..., None] for x in (found, wanted))
    lengths = [(x[..., 0] >= 0).sum(1) for x in (found, wanted)]
    at = jnp.arange(wanted.shape[1] + 1)

    def advance(row: Array, step: Any) -> tuple[Array, None]:
        member, i = step
        other = (member[:, None] != wanted).any(-1)
        best = jnp.minimum(row[:, :-1] + other, row[:, 1:] + 1)
        best = jnp.concatenate([row[:, :1] + 1, best], 1)
        best = jax.lax.cummin(best - at, 1) + at  # what is inserted: one more for each place to the right
        return jnp.where((i < lengths[0])[:, None], best, row), None

    first = jnp.broadcast_to(at, (len(found), len(at)))
    row, _ = jax.lax.scan(advance, first, (found.swapaxes(0, 1), jnp.arange(found.shape[1])))
    return jnp.take_along_axis(row, lengths[1][:, None], 1)[:, 0]


def align(log_p: np.ndarray, text: np.ndarray, blank: int) -> np.ndarray:
    """Find the likeliest alignment of a text (U,) with its frames: the place in the text of each, (T,), -1 of a blank.

    Shapes: log_p (T, V), T no fewer than the text needs.
    """
    places, skips = (np.asarray(x)[0] for x in spread(jnp.asarray(text)[None], blank))
    never = np.array([_NEVER, _NEVER], np.float64)
    score, back = np.where(np.arange(len(places)) < 2, log_p[0, places], _NEVER), []
    for row in log_p[1:]:
        paths = np.stack([score, np.append(never[:1], score[:-1]), np.append(never, score)[: len(score)]])
        paths[2, ~skips] = _NEVER
        back.append(paths.argmax(0))
        score = paths.max(0) + row[places]
    at = len(places) - 1 - int(len(places) > 1 and score[-2] > score[-1])
    path = [at]
    for steps in reversed(back):
        at -= int(steps[at])
        path.append(at)
    return np.array([at // 2 if at % 2 else -1 for at in reversed(path)])
