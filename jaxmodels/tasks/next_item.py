"""Sequential recommendation: predict which item a user takes next from those before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.data.contract import IGNORED, BatchField
from jaxmodels.data.histories import Sequences
from jaxmodels.data.opening import Opening
from jaxmodels.data.section import DataConfig
from jaxmodels.data.source import Source
from jaxmodels.errors import UserError
from jaxmodels.fields import Dim, Natural, Positive
from jaxmodels.models.model import Model
from jaxmodels.parallel.rules import gather
from jaxmodels.tasks import ranking
from jaxmodels.tasks.losses import Scores, cross_entropy, language_cross_entropy, logits_of
from jaxmodels.tasks.task import (
    Aux,
    Batch,
    Loss,
    Params,
    Sums,
    Task,
    counted,
    forward,
    tokens,
)


@dataclass(frozen=True)
class NextItem(ranking.Recommends):
    """Train a decoder on histories `tokens` (B, T) that end at the right, with `targets` (B, T), below 0 ignored.

    In evaluation, the scores at the last place rank all items but those in `seen` (B, S), and the metrics say where
    those in `held` (B, K) come; the loss is their mean cross-entropy, averaged over users.
    """

    negatives: Natural = 0
    """Items, drawn for each batch, that a target is compared with. 0: all items."""
    horizon: Natural = 0
    """How many items that follow a basket a target is drawn from, anew in each epoch (Pancha et al. 2022, section 4.1).
    0: the item that follows."""
    half_life: Positive | None = None
    """Days after which a target counts half as often. None: all count."""
    places: Dim | None = None
    """Places of a row whose targets count, drawn among those that do, anew in each epoch. None: all of them."""

    def examples(self, opening: Opening) -> Source:
        return Sequences(opening, self.horizon, self.half_life, self.places)

    def build(self, model: Model, data: DataConfig) -> Task:
        unembedding = model.unembedding
        if unembedding is None or len(model.inputs(1)) != 1:
            raise UserError(
                f"got task next_item with {type(model.config).__name__}, expected a decoder of items, try SASRecConfig"
            )
        if model.longest is not None and data.seq_len > model.longest:
            raise UserError(
                f"got data.seq_len {data.seq_len}, expected at most model.context {model.longest}, "
                f"try --model.context {data.seq_len}"
            )
        if self.negatives >= model.config.vocab_size:
            raise UserError(
                f"got task.negatives {self.negatives} of {model.config.vocab_size} items, expected fewer, "
                "try --task.negatives 0, which compares with all of them"
            )

        def chosen(x: jax.Array, batch: Batch) -> jax.Array:
            return x if self.places is None else jnp.take_along_axis(x, batch["at"][..., None], 1)

        def loss(params: Params, stats: Params, batch: Batch, rng: jax.Array, step: Any = 0) -> tuple[jax.Array, Aux]:
            rng, own = jax.random.split(rng)
            x, stats = features(model, params, stats, batch, train=True, rng=rng)
            x, table, targets = chosen(x, batch), unembedding(params["model"]), counted(batch, batch["targets"])
            if self.negatives:
                s = sampled(own, x, table, targets, self.negatives)
            else:
                s = all_items(x, table, targets, few=self.places is not None)
            return s.objective, Aux(s.count, {"loss": (s.objective, s.count)}, stats)

        scores = self.scorer(model, ())

        def metrics(params: Params, stats: Params, batch: Batch) -> Sums:
            if "held" in batch:
                found = scores(params, stats, batch)
                return {"loss": ranking.held_loss(found, batch), **ranking.sums(found, batch)}
            x, _ = features(model, params, stats, batch)
            table, targets = unembedding(params["model"]), counted(batch, batch["targets"])
            s = all_items(chosen(x, batch), table, targets, few=self.places is not None)
            return {"loss": (s.loss, s.count)}

        ids, places = tokens(data, model.config.vocab_size), self.places
        if places is not None and places > data.seq_len:
            raise UserError(
                f"got task.places {places} of rows of {data.seq_len}, expected at most all of them, "
                "try --task.places None"
            )
        predicted = ids if places is None else BatchField((places,), np.int32, (None,), model.config.vocab_size)
        at = {} if places is None else {"at": BatchField((places,), np.int32, (None,), data.seq_len)}
        some = BatchField(None, optional=True)
        segments = tokens(data, optional=True, usual=True)
        fields = {"tokens": ids, "targets": predicted, **at, "segment_ids": segments, "seen": some, "held": some}
        return Task(
            {"model": model},
            (Loss("loss", "model", loss),),
            metrics,
            fields,
            unit="tokens",
            needs="a user with an item to be predicted",
            better=ranking.BETTER,
            outputs=scores,
        )

    def scorer(self, model: Model, names: Sequence[str]) -> Callable[[Params, Params, Batch], jax.Array]:
        table = model.unembedding
        assert table is not None

        def scores(params: Params, stats: Params, batch: Batch) -> jax.Array:
            x, _ = features(model, params, stats, batch)
            return logits_of(x[:, -1:], table(params["model"]).astype(x.dtype))[:, 0]

        return scores


def features(model: Model, params: Params, stats: Params, batch: Batch, **how: Any) -> tuple[Any, Params]:
    """Return the features (B, T, D) behind the model's blocks at each position of the histories, and the statistics."""
    rows = {"segment_ids": batch["segment_ids"]} if "segment_ids" in batch else {}
    return forward(("model", model), params, stats, batch["tokens"], **rows, head=False, **how)


def all_items(x: jax.Array, table: jax.Array, targets: jax.Array, few: bool = False) -> Scores:
    """Sum the cross-entropy of targets among all items; with `few` of them, all logits are held at once.

    Shapes: x (B, T, D), table (V, D), targets (B, T).
    """
    if not few:
        return language_cross_entropy(x, table, targets)
    return cross_entropy(logits_of(x, gather(table.astype(x.dtype), ("vocab", "embed"))), targets)


def sampled(key: jax.Array, x: jax.Array, table: jax.Array, targets: jax.Array, count: int) -> Scores:
    """Sum the cross-entropy of targets among themselves and `count` items, drawn for the batch with equal chances.

    The logits of those drawn are corrected by the logarithm of how often each is expected among them, so that the sum
    over them estimates that over all items; one that is the target itself is left out.
    Shapes: x (B, T, D), table (V, D), targets (B, T).
    Source: Bengio & Senécal 2008; the correction as in Yi et al. 2019, section 4.1.
    """
    drawn = jax.random.randint(key, (count,), 0, len(table))
    table = table.astype(x.dtype)
    own = jnp.einsum("btd,btd->bt", x, table[jnp.maximum(targets, 0)], preferred_element_type=jnp.float32)
    others = logits_of(x, table[drawn]) - jnp.log(count / len(table))
    others = jnp.where(drawn == targets[..., None], -jnp.inf, others)
    return cross_entropy(jnp.concatenate([own[..., None], others], -1), jnp.where(targets < 0, IGNORED, 0))
