"""Contrastive training: which text belongs to which image of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.data import examples
from jaxmodels.data.contract import IGNORED, BatchField
from jaxmodels.data.opening import Opening
from jaxmodels.data.section import DataConfig
from jaxmodels.data.source import Source
from jaxmodels.errors import UserError
from jaxmodels.models.layers import shard
from jaxmodels.models.model import Model
from jaxmodels.parallel.rules import REPLICAS
from jaxmodels.tasks.losses import Scores, cross_entropy
from jaxmodels.tasks.task import (
    Answers,
    Aux,
    Batch,
    Loss,
    Params,
    Sums,
    Task,
    TaskConfig,
    Whole,
    forward,
    normalized,
    numbers,
    rows,
    tokens,
)

LARGEST = 100.0
"""Upper bound of the scale of similarities (Radford et al. 2021, section 2.5)."""


@dataclass(frozen=True)
class Contrastive(TaskConfig):
    """Train two towers on `images` (B, H, W, C) and their `tokens` (B, T); pairs with a label below 0 are ignored.

    The loss is the mean of two cross-entropies: of each image over the texts of the global batch, and of each text over
    its images. A batch may have `classes` (B,): pairs of the same class then match each other too, with the target
    spread evenly over them (Yang et al. 2022, section 3.2), and choosing any of them is correct. With train.accumulate
    above 1 the candidates are those of a microbatch; in evaluation they are the whole set, so that the loss, which
    depends on their number, is higher there. A batch may have `segment_ids` (B, T).
    """

    answers: ClassVar[Answers] = "caption"
    reads: ClassVar[tuple[str, ...]] = ("mean", "std")

    def examples(self, opening: Opening) -> Source:
        return examples.captioned(opening)

    def build(self, model: Model, data: DataConfig) -> Task:
        if [len(x.shape) for x in model.inputs(1)] != [4, 2]:
            raise UserError(
                f"got task contrastive with {type(model.config).__name__}, expected a model of images and texts, "
                "try CLIPConfig or another --task"
            )
        if data.seq_len > model.config.context:
            raise UserError(
                f"got data.seq_len {data.seq_len}, expected at most model.context {model.config.context}, "
                f"try --data.seq-len {model.config.context}"
            )

        def embed(params: Params, stats: Params, batch: Batch, **how: Any) -> tuple[Any, Params]:
            images, texts = normalized(batch["images"], data), batch["tokens"]
            packed = {"segment_ids": batch["segment_ids"]} if "segment_ids" in batch else {}
            return forward(("model", model), params, stats, images, texts, **packed, **how)

        def score(params: Params, stats: Params, batch: Batch, **how: Any) -> tuple[Scores, Scores, Params]:
            (seen, read, scale), stats = embed(params, stats, batch, **how)
            counts = rows(batch) > 0
            others, own = everywhere(counts), first(len(counts)) + jnp.arange(len(counts))
            targets = jnp.where(counts, own, IGNORED)
            classes = batch.get("classes")
            same = None if classes is None else others & (classes[:, None] == everywhere(classes)[None])

            def choose(mine: jax.Array, all_of_theirs: jax.Array) -> Scores:
                logits = jnp.minimum(scale, LARGEST) * mine @ all_of_theirs.T
                least = jnp.finfo(logits.dtype).min
                logits = shard(jnp.where(others, logits, least), "batch", None)
                return cross_entropy(logits, targets) if same is None else any_of(logits, same & counts[:, None])

            return choose(seen, everywhere(read)), choose(read, everywhere(seen)), stats

        def sums(image: Scores, text: Scores) -> Sums:
            return {
                "loss": ((image.loss + text.loss) / 2, image.count),
                "image_to_text": (image.correct, image.count),
                "text_to_image": (text.correct, text.count),
            }

        def loss(params: Params, stats: Params, batch: Batch, rng: jax.Array, step: Any = 0) -> tuple[jax.Array, Aux]:
            image, text, stats = score(params, stats, batch, train=True, rng=rng)
            found = sums(image, text)
            return found["loss"][0], Aux(image.count, found, stats)

        def metrics(params: Params, stats: Params, batch: Batch) -> Sums:
            return sums(*score(params, stats, batch)[:2])

        def keep(params: Params, stats: Params, batch: Batch) -> dict[str, jax.Array]:
            (seen, read, scale), _ = embed(params, stats, batch)
            own = {"classes": batch["classes"]} if "classes" in batch else {}
            return {"images": jnp.minimum(scale, LARGEST) * seen, "texts": read, "weight": rows(batch), **own}

        label = BatchField((), optional=True, usual=True)
        fields = {
            "images": numbers(model.config.input_shape),
            "tokens": tokens(data, model.config.vocab_size),
            "segment_ids": tokens(data, optional=True, usual=True),
            "labels": label,
            "classes": label,
        }
        return Task(
            {"model": model},
            (Loss("loss", "model", loss, compares=True),),
            metrics,
            fields,
            needs="a pair, with a label of 0 or above if it has one",
            whole=Whole(keep, lambda kept, source: retrieval(kept)),
            better={"image_to_text": "max", "text_to_image": "max"},
        )


def retrieval(kept: Mapping[str, np.ndarray], rows: int = 1024) -> dict[str, tuple[float, float]]:
    """Compute the task's metrics of a whole set on the host, each image among all texts and each text among all images.

    Shapes: images and texts (N, K), whose products are logits; classes (N,), whose equal members match each other. The
    logits of `rows` rows are held at a time.
    """
    count = len(kept["images"])
    classes = kept.get("classes", np.arange(count))
    loss, correct = [], []
    for mine, theirs in ((kept["images"], kept["texts"]), (kept["texts"], kept["images"])):
        total, right = 0.0, 0
        for at in range(0, count, rows):
            logits = (mine[at : at + rows].astype(np.float32) @ theirs.T.astype(np.float32)).astype(np.float64)
            same = classes[at : at + rows, None] == classes[None]
            top = logits.max(1)
            log_z = top + np.log(np.exp(logits - top[:, None]).sum(1))
            total += float((log_z - (logits * same).sum(1) / same.sum(1)).sum())
            right += int(np.take_along_axis(same, logits.argmax(1)[:, None], 1).sum())
        loss.append(total)
        correct.append(right)
    return {
        "loss": (sum(loss) / 2, float(count)),
        "image_to_text": (correct[0], float(count)),
        "text_to_image": (correct[1], float(count)),
    }


def any_of(logits: jax.Array, same: jax.Array) -> Scores:
    """Cross-entropy with the even distribution over all matches, booleans (B, N); rows without any are ignored."""
    logits = logits.astype(jnp.float32)
    counts, number = same.any(-1), same.sum(-1)
    picked = jnp.where(same, logits, 0).sum(-1) / jnp.maximum(number, 1)
    loss = jnp.where(counts, jax.nn.logsumexp(logits, -1) - picked, 0.0).sum()
    best = jnp.take_along_axis(same, logits.argmax(-1)[:, None], -1)[:, 0]
    return Scores(loss, loss, (counts & best).sum(), counts.sum())


def everywhere(x: jax.Array) -> jax.Array:
    """Gather the rows of all replicas; without replicas x already has them all."""
    try:
        return jax.lax.all_gather(x, REPLICAS, tiled=True)
    except NameError:
        return x


def first(count: int) -> int | jax.Array:
    """Return the index, among the rows of all replicas, at which this replica's `count` rows begin."""
    try:
        return jax.lax.axis_index(REPLICAS) * count
    except NameError:
        return 0
