"""Greedy and beam search for the targets of an encoder-decoder, as one compiled loop.

Dims: B sources, S their length, K beams, T the most tokens of a target, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.errors import UserError
from jaxmodels.generate.sample import with_cache
from jaxmodels.models.model import Model

EarlyStopping = bool | Literal["never"]
"""What transformers calls `early_stopping`: whether a row is done with as many ended targets as there are beams (True),
when its best beam, divided as if it ended now, is no better than the worst of those (False), or divided as if it took
all of the limit ("never")."""


class Decoded(NamedTuple):
    """The best target of each source."""

    tokens: np.ndarray
    """(B, T): each row up to its end token; the first of the ends fills the rest of it."""
    scores: np.ndarray
    """(B,): the log-probability of the tokens and their end, in nats."""


def decode(
    model: Model,
    params: Any,
    sources: Any,
    *,
    end: int | Sequence[int],
    limit: Any,
    start: int | Sequence[int] | None = None,
    segment_ids: Any = None,
    beams: int = 1,
    alpha: float = 1.0,
    early_stopping: EarlyStopping | None = None,
    never: Sequence[int] = (),
    not_first: Sequence[int] = (),
) -> Decoded:
    """Find the target with the highest log-probability / ((5 + length) / 6)^alpha by beam search.

    A target follows the token `start`, or several that are given and not chosen (`end` when not given), ends with
    `end`, or with any of several, and has at most `limit` tokens, the last of which is forced to be an end.
    A row is done when as many targets have ended as there are beams, or when no beam can overtake the best of those;
    with one beam the search is greedy. With the paper's alpha of 0.6, a model trained with label smoothing, which gives
    each token some probability, ends the targets of long sources at once; an alpha of 1 nearly divides by the length.
    With `early_stopping` the search is that of transformers: the divisor is length^alpha, where all tokens behind the
    first given one count, alpha may be negative, and a row is done when `EarlyStopping` says.
    A source whose `segment_ids` are all 0 is padding of the batch, and gets only end tokens. Tokens in `never` are not
    chosen, and those in `not_first` do not begin a target.
    Shapes: sources and segment_ids (B, S) integers, 0 for padding, or sounds (B, N); limit () or (B,).
    Source: Wu et al. 2016, section 7 (without the coverage penalty).

    Raises:
        UserError: an option out of range, or more tokens than the model takes.
    """
    sources = np.asarray(sources)
    ids = None
    if not np.issubdtype(sources.dtype, np.floating):  # and no sounds
        sources = sources.astype(np.int32)
        ids = np.ones_like(sources) if segment_ids is None else np.asarray(segment_ids, np.int32)
    limits = np.broadcast_to(np.asarray(limit, np.int32), len(sources))
    if beams < 1 or (alpha < 0 and early_stopping is None) or limits.min(initial=1) < 1:
        raise UserError(
            f"got beams {beams}, alpha {alpha}, limit {limits.min(initial=1)}, expected beams >= 1, alpha >= 0, "
            "limit >= 1, try beams 4, alpha 1"
        )
    room = -(-int(limits.max(initial=1)) // 16) * 16  # rounded up, so that similar limits share a compiled program
    ends = jnp.atleast_1d(jnp.asarray(end, jnp.int32))
    begin = jnp.atleast_1d(jnp.asarray(ends[0] if start is None else start, jnp.int32))
    most = len(begin) + int(limits.max(initial=1)) - 1
    if model.longest is not None and most > model.longest:
        raise UserError(
            f"got targets of up to {most} tokens, expected at most the model's context of {model.longest}, "
            "try a smaller limit"
        )
    marks = (begin, ends)
    how = (jnp.float32(alpha), room, beams, refusals(model, never, not_first), early_stopping)
    found = search(with_cache(model), params, sources, ids, limits, *marks, *how)
    return Decoded(*jax.tree.map(np.asarray, found))


def refusals(model: Model, never: Sequence[int], not_first: Sequence[int]) -> np.ndarray | None:
    """Return which tokens are not the first of a target, and no later one, (2, V); None if all may be."""
    if not (never or not_first):
        return None
    refused = np.zeros((2, model.config.vocab_size), bool)
    refused[:, [*never]], refused[0, [*not_first]] = True, True
    return refused


class Search(NamedTuple):
    """The state of a search after `at` tokens."""

    at: jax.Array
    tokens: jax.Array
    """The beams that continue, (B, K, T)."""
    scores: jax.Array
    """Their log-probabilities, (B, K); -inf for an empty beam."""
    best: jax.Array
    """The best target that has ended, (B, T)."""
    best_score: jax.Array
    """Its log-probability, (B,)."""
    ranks: jax.Array
    """The scores, after the length penalty, of the best targets that have ended, in falling order, (B, K)."""
    ended: jax.Array
    """How many targets have ended, (B,)."""
    done: jax.Array
    """Rows that are done, (B,)."""


class Lengths(NamedTuple):
    """How targets of different lengths compare, and when a row is done."""

    alpha: jax.Array
    early_stopping: EarlyStopping | None
    given: int
    """Tokens behind the first that each target begins with."""

    def penalty(self, length: Any) -> jax.Array:
        """Return the divisor of the log-probability of a target of so many chosen tokens."""
        if self.early_stopping is None:
            return ((5 + length) / 6) ** self.alpha
        return (jnp.asarray(length, jnp.float32) + self.given) ** self.alpha

    def done(self, s: Search, limits: jax.Array) -> jax.Array:
        """Return the rows that need no further tokens, (B,)."""
        full, best = s.ended >= s.scores.shape[1], s.scores[:, 0]
        if self.early_stopping is None:
            # a log-probability only falls, and the longest target is divided by most
            return full | (s.ranks[:, 0] >= best / self.penalty(limits))
        if self.early_stopping is True:
            return full
        length = jnp.where(self.alpha > 0, limits, s.at) if self.early_stopping == "never" else s.at
        return full & (s.ranks[:, -1] >= best / self.penalty(length))


def grow(
    s: Search,
    logits: jax.Array,
    ends: jax.Array,
    limits: jax.Array,
    lengths: Lengths,
    refused: jax.Array | None = None,
) -> tuple[Search, jax.Array]:
    """Extend each beam by one token that is not `refused` (V,), from logits (B, K, V).

    Also returns the parents of the new beams, (B, K).
    """
    (B, K, V), count = logits.shape, s.at + 1
    last = (count >= limits)[:, None, None] & ~jnp.isin(jnp.arange(V), ends)
    last = last if refused is None else last | refused
    # a beam can end in as many ways as there are ends, so this many candidates include K that continue
    most = K * (1 + len(ends))
    width = min(most, V)
    kept, token = jax.lax.top_k(jnp.where(last, -jnp.inf, logits), width)
    total = s.scores[..., None] + kept - jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    score, index = jax.lax.top_k(total.reshape(B, -1), min(most, K * width))
    parent, token = index // width, jnp.take_along_axis(token.reshape(B, -1), index, axis=1)
    tokens = jnp.take_along_axis(s.tokens, parent[..., None], axis=1).at[:, :, s.at].set(token)
    over = jnp.isin(token, ends)

    # an end counts only among the K best candidates, or one beam would not be greedy
    counts = over & (jnp.arange(score.shape[1]) < K) & jnp.isfinite(score)
    rank = jnp.where(counts & ~s.done[:, None], score / lengths.penalty(count), -jnp.inf)
    top = rank.argmax(1, keepdims=True)
    better = rank.max(1) > s.ranks[:, 0]
    best = jnp.where(better[:, None], jnp.take_along_axis(tokens, top[..., None], axis=1)[:, 0], s.best)
    best_score = jnp.where(better, jnp.take_along_axis(score, top, axis=1)[:, 0], s.best_score)
    ranks = jax.lax.top_k(jnp.concatenate([s.ranks, rank], axis=1), K)[0]
    ended = s.ended + counts.sum(1)

    scores, order = jax.lax.top_k(jnp.where(over, -jnp.inf, score), K)
    tokens = jnp.take_along_axis(tokens, order[..., None], axis=1)
    grown = Search(count, tokens, scores, best, best_score, ranks, ended, s.done)
    grown = grown._replace(done=s.done | lengths.done(grown, limits) | (count >= limits))
    return grown, jnp.take_along_axis(parent, order, axis=1)


@functools.partial(jax.jit, static_argnums=(0, 8, 9, 11))
def search(
    model: Model,
    params: Any,
    sources: jax.Array,
    ids: jax.Array | None,
    limits: jax.Array,
    begin: jax.Array,
    ends: jax.Array,
    alpha: jax.Array,
    T: int,
    K: int,
    refused: jax.Array | None = None,
    early_stopping: EarlyStopping | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`decode` for arrays alone: the best targets (B, T) of K beams, and their log-probabilities (B,).

    Shapes: begin (P,), the tokens before each target; refused (2, V), those that are not its first one, and no later
    one; ids are None where sources are sounds.
    """
    lengths = Lengths(alpha, early_stopping, begin.shape[0] - 1)
    B = sources.shape[0]  # `len` would want a number, where the number of rows may be known later

    def step(carry: tuple[Search, Any]) -> tuple[Search, Any]:
        s, cache = carry
        new = jax.lax.dynamic_index_in_dim(s.tokens, s.at - 1, axis=2, keepdims=False)
        logits, cache = model.apply(params, None, new.reshape(B * K, 1), cache=cache)
        s, parents = grow(s, logits.reshape(B, K, -1), ends, limits, lengths, None if refused is None else refused[1])
        if K > 1:
            rows = (jnp.arange(B)[:, None] * K + parents).reshape(-1)
            moved = jax.tree.map(lambda leaf: leaf.at[:, rows].get(mode="promise_in_bounds"), cache["layers"])
            cache = {**cache, "layers": moved}
        return s, cache

    first = jnp.broadcast_to(begin, (B, len(begin)))
    marks: dict[str, Any] = {} if ids is None else {"segment_ids": ids}
    logits, cache = model.apply(params, sources, first, **marks, cache=model.cache(B, T + len(begin) - 1))
    repeat = functools.partial(jnp.repeat, repeats=K)
    stacked = {name: jax.tree.map(lambda leaf: repeat(leaf, axis=1), cache[name]) for name in ("layers", "cross")}
    cache = stacked | {name: repeat(each, axis=0) for name, each in cache.items() if name not in stacked}
    none = jnp.full((B,), -jnp.inf)
    s = Search(
        at=jnp.int32(0),
        tokens=jnp.full((B, K, T), ends[0]),
        scores=jnp.full((B, K), -jnp.inf).at[:, 0].set(0.0),  # all beams are the same so far
        best=jnp.full((B, T), ends[0]),
        best_score=none,
        ranks=jnp.full((B, K), -jnp.inf),
        ended=jnp.zeros((B,), jnp.int32),
        done=jnp.zeros((B,), bool) if ids is None else ~ids.any(1),
    )
    s, _ = grow(s, repeat(logits[:, -1:], axis=1), ends, limits, lengths, None if refused is None else refused[0])
    s, _ = jax.lax.while_loop(lambda carry: ~carry[0].done.all(), step, (s, cache))
    return s.best, s.best_score
