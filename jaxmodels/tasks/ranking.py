"""How well scores rank the items that users take next, among all that they did not have before."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxmodels.models.model import Model
from jaxmodels.tasks.task import Answers, Batch, Better, Params, Sums, TaskConfig, rows

AT = 10
"""Places of a list that is shown."""
CANDIDATES = 100
"""Places of a list that another model chooses from."""
BETTER: Mapping[str, Better] = dict.fromkeys(
    (f"hr@{AT}", f"ndcg@{AT}", "mrr", f"recall@{AT}", f"recall@{CANDIDATES}"), "max"
)


@dataclass(frozen=True)
class Recommends(TaskConfig):
    """A task whose model scores all items after a history."""

    answers: ClassVar[Answers] = "items"

    @abstractmethod
    def scorer(self, model: Model, names: Sequence[str]) -> Callable[[Params, Params, Batch], jax.Array]:
        """Return `scores(params, stats, batch)`: those of the items that have these names, (B, V), after the histories
        `tokens` and `segment_ids` (B, T)."""


def unseen(scores: jax.Array, seen: jax.Array) -> jax.Array:
    """Return scores (B, V) that are -inf for the items that a user had before, `seen` (B, S) with below 0 for none."""
    return jnp.where(marked(seen, scores.shape[1]), -jnp.inf, scores)


def sums(scores: jax.Array, batch: Batch) -> Sums:
    """Sum over users how their `held` items rank among all that are not `seen`; those without any do not count.

    Of equal scores the item of the lower number comes first. Hit rate: whether any is among the first places. NDCG: the
    sum of 1 / log2(1 + place) over the first places, as a share of the most that it could be (Järvelin & Kekäläinen
    2002, with gains of 0 and 1). MRR: 1 / the place of the first of them. Recall: the share of them that is among the
    first places.
    Shapes: scores (B, V), seen (B, S), held (B, K); below 0 is none.
    """
    scores, wanted = unseen(scores, batch["seen"]), marked(batch["held"], scores.shape[1])
    number = wanted.sum(1)
    counts = (rows(batch) > 0) & (number > 0)
    _, listed = jax.lax.top_k(scores, min(CANDIDATES, scores.shape[1]))
    hits = jnp.take_along_axis(wanted, listed, 1)
    gains = 1 / jnp.log2(2 + jnp.arange(AT))[: hits.shape[1]]
    ideal = jnp.cumsum(gains)[jnp.clip(number, 1, len(gains)) - 1]
    # counted rather than sorted: only the place of the first one is asked for
    first = jnp.where(wanted, scores, -jnp.inf).argmax(1)[:, None]
    best = jnp.take_along_axis(scores, first, 1)
    before = (scores > best) | ((scores == best) & (jnp.arange(scores.shape[1]) < first))
    found = {
        f"hr@{AT}": hits[:, :AT].any(1),
        f"ndcg@{AT}": (hits[:, :AT] * gains).sum(1) / ideal,
        "mrr": 1 / (1 + before.sum(1)),
        **{f"recall@{at}": hits[:, :at].sum(1) / jnp.maximum(number, 1) for at in (AT, CANDIDATES)},
    }
    return {name: (jnp.where(counts, each, 0).sum(), counts.sum()) for name, each in found.items()}


def marked(items: jax.Array, count: int) -> jax.Array:
    """Return which of `count` items are among those of each row, (B, K) with below 0 for none, as (B, count)."""
    each = jnp.arange(len(items))[:, None]
    at = jnp.where(items < 0, count, items)
    return jnp.zeros((len(items), count), bool).at[each, at].set(True, mode="drop")


def held_loss(scores: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Sum over users the mean cross-entropy of their `held` items under the softmax of scores (B, V) of all items."""
    held = batch["held"]
    number = (held >= 0).sum(1)
    counts = (rows(batch) > 0) & (number > 0)
    scores = scores.astype(jnp.float32)
    picked = jnp.where(held >= 0, jnp.take_along_axis(scores, jnp.maximum(held, 0), 1), 0).sum(1)
    loss = jax.nn.logsumexp(scores, 1) - picked / jnp.maximum(number, 1)
    return jnp.where(counts, loss, 0).sum(), counts.sum()
