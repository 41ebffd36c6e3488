"""Retrieval: bring the vectors of users close to those of the items that they take next."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.data.contract import IGNORED, BatchField
from jaxmodels.data.opening import Opening
from jaxmodels.data.purchases import ANY_USER, Purchases, words_of
from jaxmodels.data.section import DataConfig
from jaxmodels.data.source import Source
from jaxmodels.errors import UserError
from jaxmodels.fields import Positive
from jaxmodels.models.layers import shard
from jaxmodels.models.model import Model
from jaxmodels.tasks import ranking
from jaxmodels.tasks.contrastive import everywhere, first
from jaxmodels.tasks.losses import cross_entropy
from jaxmodels.tasks.task import Aux, Batch, Loss, Params, Sums, Task, Whole, forward, rows, tokens

AT_ONCE = 256
"""Users whose scores are held at once when a whole set is ranked."""


@dataclass(frozen=True)
class Retrieval(ranking.Recommends):
    """Train two towers on users with histories `tokens` (B, T) and the `item` (B,) that each takes next.

    In evaluation all users and all items are there, and every user's `held` (N, K) items are ranked among all but those
    `seen` (N, S).
    """

    objective: Literal["softmax", "bpr"] = "softmax"
    """softmax: an item among those of the global batch, each corrected by how often it is drawn (Yi et al. 2019). bpr:
    an item above one that is drawn with equal chances (Rendle et al. 2009)."""
    half_life: Positive | None = None
    """Days after which an item counts half as often. None: all count."""

    def examples(self, opening: Opening) -> Source:
        words = (opening.fields or {}).get("words")
        if words is None:
            return Purchases(opening, self.half_life, None, 1)
        return Purchases(opening, self.half_life, words.below, (words.shape or (1,))[-1])

    def build(self, model: Model, data: DataConfig) -> Task:
        c = model.config
        if [len(x.shape) for x in model.inputs(1)[:3]] != [1, 2, 1]:
            raise UserError(
                f"got task retrieval with {type(c).__name__}, expected a model of users and items, try TwoTowerConfig"
            )

        def vectors(params: Params, stats: Params, batch: Batch, **how: Any) -> tuple[Any, Params]:
            history = jnp.where(batch["segment_ids"] > 0, batch["tokens"], IGNORED)
            words = [batch["words"]] if c.words is not None else []
            return forward(("model", model), params, stats, batch["user"], history, batch["item"], *words, **how)

        def pairs(users: jax.Array, items: jax.Array, batch: Batch) -> Sums:
            """The cross-entropy of each item among those of the global batch, and how often it ranks first."""
            counts = rows(batch) > 0
            others, item, log_q = (everywhere(x) for x in (counts, batch["item"], batch["log_q"]))
            own = first(len(counts)) + jnp.arange(len(counts))
            logits = users @ everywhere(items).T - log_q
            same = (item == batch["item"][:, None]) & (jnp.arange(len(item)) != own[:, None])
            least = jnp.finfo(logits.dtype).min
            logits = shard(jnp.where(others & ~same, logits, least), "batch", None)
            s = cross_entropy(logits, jnp.where(counts, own, IGNORED))
            return {"loss": (s.loss, s.count), "accuracy": (s.correct, s.count)}

        def above(users: jax.Array, items: jax.Array, others: jax.Array, batch: Batch) -> Sums:
            """BPR's loss: the negative logarithm of the probability that each item ranks above another one."""
            counts = rows(batch) * (batch["item"] != batch["other"])
            margin = (users * (items - others)).sum(-1)
            found = {"loss": jax.nn.softplus(-margin), "accuracy": (margin > 0).astype(margin.dtype)}
            return {name: ((counts * each).sum(), counts.sum()) for name, each in found.items()}

        def loss(params: Params, stats: Params, batch: Batch, rng: jax.Array, step: Any = 0) -> tuple[jax.Array, Aux]:
            (users, items), stats = vectors(params, stats, batch, train=True, rng=rng)
            if self.objective == "softmax":
                found = pairs(users, items, batch)
            else:
                words = [batch["other_words"][:, None]] if c.words is not None else []
                (_, others), _ = forward(
                    ("model", model), params, stats, None, None, batch["other"], *words, train=True
                )
                found = above(users, items, others, batch)
            return found["loss"][0], Aux(found["loss"][1], found, stats)

        def keep(params: Params, stats: Params, batch: Batch) -> dict[str, jax.Array]:
            (users, items), _ = vectors(params, stats, batch)
            none = jnp.full((len(users), 1), IGNORED)  # synthetic batches have none
            kept = {name: batch.get(name, none) for name in ("seen", "held")}
            return {"users": users, "items": items, "item": batch["item"], "weight": rows(batch), **kept}

        def metrics(params: Params, stats: Params, batch: Batch) -> Sums:
            """Compute the metrics of a batch as if it were the whole set."""
            kept = keep(params, stats, batch)
            table = jnp.zeros((c.vocab_size, kept["items"].shape[1]))
            table = table.at[jnp.where(batch["item"] < 0, c.vocab_size, batch["item"])].set(kept["items"], mode="drop")
            return _sums(kept["users"], table, kept)

        size, count = data.seq_len, c.vocab_size
        ids, number, some = tokens(data, count), BatchField((), below=count), BatchField(None, optional=True)
        fields = {
            "user": BatchField((), below=c.users or ANY_USER),
            "tokens": ids,
            "segment_ids": tokens(data, 2),
            "item": number,
            "log_q": BatchField((), np.float32),
            "other": BatchField((), below=count),
            "seen": some,
            "held": some,
        }
        if c.words is not None:
            fields["words"] = BatchField((size + 1, c.name_words), below=c.words)
            fields["other_words"] = BatchField((c.name_words,), below=c.words)
        return Task(
            {"model": model},
            (Loss("loss", "model", loss, compares=self.objective == "softmax"),),
            metrics,
            fields,
            needs="a user with an item to be predicted",
            whole=Whole(keep, ranked),
            better={"accuracy": "max", **ranking.BETTER},
        )

    def scorer(self, model: Model, names: Sequence[str]) -> Callable[[Params, Params, Batch], jax.Array]:
        c, numbers = model.config, jnp.arange(len(names))
        if not c.history:
            raise UserError(
                "got a run that knows users by their numbers alone, expected one that reads histories, "
                "try a model with --model.history True"
            )
        words = None if c.words is None else jnp.asarray(words_of(names, c.words, c.name_words))

        def scores(params: Params, stats: Params, batch: Batch) -> jax.Array:
            history = jnp.where(batch["segment_ids"] > 0, batch["tokens"], IGNORED)
            read = [] if words is None else [jnp.where((history >= 0)[..., None], words[history], IGNORED)]
            listed = [] if words is None else [words[:, None]]
            (users, _), _ = forward(("model", model), params, stats, batch.get("user"), history, None, *read)
            (_, items), _ = forward(("model", model), params, stats, None, None, numbers, *listed)
            return users @ items.T

        return scores


def ranked(kept: Mapping[str, np.ndarray], source: Source | None = None) -> dict[str, tuple[float, float]]:
    """Rank, for each user of a whole set, all items; `AT_ONCE` users at a time."""
    there = kept["item"] >= 0
    items = np.zeros((int(kept["item"].max()) + 1, kept["items"].shape[1]), np.float32)
    items[kept["item"][there]] = kept["items"][there]
    users = np.flatnonzero((kept["held"] >= 0).any(1))
    if not len(users):
        return {"loss": (0.0, 0.0)}
    totals: list[Sums] = []
    for at in range(0, len(users), AT_ONCE):
        # filled up with the last one, which then does not count, so that one program is compiled
        rows = np.minimum(np.arange(at, at + AT_ONCE), len(users) - 1)
        batch = {name: kept[name][users[rows]] for name in ("seen", "held")}
        batch["weight"] = (np.arange(at, at + AT_ONCE) < len(users)).astype(np.float32)
        totals.append(jax.device_get(_sums(kept["users"][users[rows]], items, batch)))
    return {
        name: (sum(float(each[name][0]) for each in totals), sum(float(each[name][1]) for each in totals))
        for name in totals[0]
    }


@jax.jit
def _sums(users: jax.Array, items: jax.Array, batch: Batch) -> Sums:
    scores = users @ items.T
    return {"loss": ranking.held_loss(scores, batch), **ranking.sums(scores, batch)}
