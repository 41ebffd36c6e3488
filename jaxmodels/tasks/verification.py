"""Verification: embeddings whose angles tell whether two examples share a class, also one never seen in training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.data import examples
from jaxmodels.data.classes import check_classes
from jaxmodels.data.contract import BatchField
from jaxmodels.data.opening import Opening
from jaxmodels.data.section import DataConfig
from jaxmodels.data.source import Source
from jaxmodels.errors import UserError
from jaxmodels.fields import Positive, Range
from jaxmodels.models.model import Model
from jaxmodels.tasks.losses import Scores, cross_entropy
from jaxmodels.tasks.task import (
    Aux,
    Batch,
    Loss,
    Params,
    Sums,
    Task,
    TaskConfig,
    Whole,
    counted,
    forward,
    normalized,
    numbers,
    rows,
)

FALSE_ACCEPTS = 0.01
"""Share of pairs of two classes that may be taken for one (`tar`)."""


@dataclass(frozen=True)
class Verification(TaskConfig):
    """Train a classifier's features by an additive angular margin (ArcFace), and compare examples by their angle.

    The features before the head and the head's weights, one direction a class, are taken at length 1.
    Source: Deng et al. 2019, equation 3; the logit of an angle that the margin would carry beyond π falls on linearly.
    """

    margin: Annotated[float, Range(0, below=math.pi)] = 0.5
    """Added to the angle between an example and its class, in radians."""
    scale: Positive = 16.0
    """Factor of all cosines, which makes them logits."""
    reads: ClassVar[tuple[str, ...]] = ("mean", "std")

    def examples(self, opening: Opening) -> Source:
        source = examples.labeled(opening, ("image", "array"))
        check_classes(source, opening.num_classes)
        return source

    def build(self, model: Model, data: DataConfig) -> Task:
        classes, inputs = getattr(model.config, "classes", None), model.inputs(1)[0]
        shapes = model.shapes().get("head", {})
        headless = len(getattr(shapes.get("w"), "shape", ())) != 2
        if classes is None or headless or jnp.issubdtype(inputs.dtype, jnp.integer):
            raise UserError(
                f"got task verification with {type(model.config).__name__}, expected a classifier of images or arrays "
                "with a head, try --model resnet"
            )

        def embed(params: Params, stats: Params, batch: Batch, **how: Any) -> tuple[jax.Array, Params]:
            images = normalized(batch["inputs"], data)
            features, stats = forward(("model", model), params, stats, images, head=False, **how)
            return unit(features), stats

        def cosines(params: Params, embeddings: jax.Array) -> jax.Array:
            return embeddings @ unit(params["model"]["head"]["w"].T).T

        def loss(params: Params, stats: Params, batch: Batch, rng: jax.Array, step: Any = 0) -> tuple[jax.Array, Aux]:
            embeddings, stats = embed(params, stats, batch, train=True, rng=rng)
            labels = counted(batch, batch["labels"])
            s = cross_entropy(self.scale * angular(cosines(params, embeddings), labels, self.margin), labels)
            return s.objective, Aux(s.count, {"loss": (s.objective, s.count), "accuracy": (s.correct, s.count)}, stats)

        def score(params: Params, stats: Params, batch: Batch) -> tuple[jax.Array, jax.Array, Scores]:
            embeddings, _ = embed(params, stats, batch)
            labels = counted(batch, batch["labels"])
            each = jax.vmap(cross_entropy)(self.scale * cosines(params, embeddings), labels)
            return embeddings, labels, each

        def metrics(params: Params, stats: Params, batch: Batch) -> Sums:
            embeddings, labels, each = score(params, stats, batch)
            return sums(embeddings, labels, each.loss, each.correct, jnp)

        def keep(params: Params, stats: Params, batch: Batch) -> dict[str, jax.Array]:
            embeddings, labels, each = score(params, stats, batch)
            found = {"embeddings": embeddings, "labels": labels, "loss": each.loss, "correct": each.correct}
            return {**found, "weight": rows(batch)}

        def whole(kept: Mapping[str, np.ndarray], source: Any) -> dict[str, Any]:
            return sums(kept["embeddings"], kept["labels"], kept["loss"], kept["correct"], np)

        return Task(
            {"model": model},
            (Loss("loss", "model", loss),),
            metrics,
            {"inputs": numbers(inputs.shape[1:]), "labels": BatchField((), below=classes)},
            needs="a label of 0 or above",
            whole=Whole(keep, whole),
            better={"accuracy": "max", "auc": "max", "tar": "max"},
            predicts=lambda params, stats, batch: {"embedding": embed(params, stats, batch)[0]},
        )


def unit(x: jax.Array) -> jax.Array:
    """Scale vectors (…, D) to length 1, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-12)


def angular(cosines: jax.Array, labels: jax.Array, margin: float) -> jax.Array:
    """Return cosines (B, C) with that of each example's own class taken at an angle that is larger by the margin.

    Where the angle would be beyond π, the cosine falls on by a constant, so that a larger angle is never better.
    """
    sines = jnp.sqrt(jnp.maximum(1 - jnp.square(cosines), 1e-9))
    moved = cosines * math.cos(margin) - sines * math.sin(margin)
    moved = jnp.where(cosines > math.cos(math.pi - margin), moved, cosines - margin * math.sin(margin))
    own = jnp.arange(cosines.shape[-1]) == labels[:, None]
    return jnp.where(own, moved, cosines)


def sums(embeddings: Any, labels: Any, loss: Any, correct: Any, xp: Any) -> dict[str, Any]:
    """Compute the task's metrics of a set, with NumPy on the host or with jax.numpy.

    Each two examples that count are a pair. `auc`: the share of pairs of one class among those of two classes that are
    less similar; `tar`: the share of pairs of one class that are accepted where `FALSE_ACCEPTS` of the others are.
    Shapes: embeddings (N, D) of length 1, labels (N,), ignored below 0, loss and correct (N,).
    """
    count, counts = len(labels), labels >= 0
    first, second = np.triu_indices(count, 1)  # of a shape that is known
    similar = (embeddings @ embeddings.T)[first, second]
    there = (counts[first] & counts[second]).astype(xp.float32)
    same = (labels[first] == labels[second]) * there
    order = xp.argsort(similar)
    ranked = similar[order]

    def below(weights: Any, side: str) -> Any:
        """The weight of all pairs that are less similar than each, or also of those that are as similar."""
        ends = xp.concatenate([xp.zeros(1, xp.float32), xp.cumsum(weights[order])])
        return ends[xp.searchsorted(ranked, similar, side=side)]

    other = there - same
    positives, negatives = same.sum(), other.sum()
    less, up_to = below(other, "left"), below(other, "right")
    auc = (same * (less + up_to)).sum() / 2 / xp.maximum(negatives, 1)
    few = negatives - less <= FALSE_ACCEPTS * negatives
    accepted = xp.max(xp.where(few, positives - below(same, "left"), 0), initial=0)
    known = xp.where(negatives > 0, positives, 0)
    return {
        "loss": (loss.sum(), counts.sum()),
        "accuracy": (correct.sum(), counts.sum()),
        "auc": (auc, known),
        "tar": (accepted, known),
    }
