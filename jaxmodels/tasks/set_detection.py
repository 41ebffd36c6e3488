"""Detection as a set: each object is found by one query, and all other queries find nothing (Carion et al. 2020)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxmodels.data.opening import Opening
from jaxmodels.data.section import DataConfig, default
from jaxmodels.data.source import Source
from jaxmodels.errors import UserError
from jaxmodels.fields import Dim, Share, Weight
from jaxmodels.models.model import Model
from jaxmodels.tasks import boxes
from jaxmodels.tasks.detection import Scoring, counted, finding, images
from jaxmodels.tasks.losses import binary_cross_entropy
from jaxmodels.tasks.task import Answers, Batch, Task, TaskConfig

QUERIES = 100
"""Most objects of an image where no model says how many queries it has."""


@dataclass(frozen=True)
class SetDetection(TaskConfig):
    """Find objects in `inputs` (B, H, W, C): their `boxes` (B, G, 4) in pixels and their `classes` (B, G).

    A box is left, top, width and height; a class below 0 says that there is none, so that images have as many. An image
    of which nothing is known has a 0 in `known` (B,).

    Each object is given the query with which all of them cost least (`boxes.pairs`): of its class, of the distance
    between boxes and of their overlap. These are also what is learned. Where a query has one class or none, the
    cross-entropy of queries without an object counts `nothing` (DETR); where each class has a probability, that of an
    object's is to be the overlap (varifocal loss; Zhang et al. 2020, as RT-DETR is trained, but without its denoising).
    """

    objects: Dim | None = None
    """Most objects of an image; as many as the model has queries when not given, and no more."""
    box_weight: Weight = 5.0
    """Factor of the distance between boxes, as shares of the image, in the loss and in what a pair costs."""
    overlap_weight: Weight = 2.0
    """Factor of 1 - the generalized intersection over union, in the loss and in what a pair costs."""
    nothing: Weight = 0.1
    """Weight of the cross-entropy of a query that has no object, where it has one class or none."""
    auxiliary: bool = True
    """Whether every block of the decoder learns, rather than the last alone."""
    score: Share = 0.01
    """Lowest score of a box that is reported."""
    found: Dim = 100
    """Most boxes that are reported of an image."""
    answers: ClassVar[Answers] = "boxes"
    reads: ClassVar[tuple[str, ...]] = ("mean", "std")

    def examples(self, opening: Opening) -> Source:
        shape = opening.fields["boxes"].shape if opening.fields else None
        return images(opening, shape[0] if shape else self.objects or QUERIES)

    def build(self, model: Model, data: DataConfig) -> Task:
        c = model.config
        if not hasattr(c, "exclusive"):
            raise UserError(
                f"got task set_detection with {type(c).__name__}, expected a detector with queries, "
                "try --model detr, or --task detection for --model yolox"
            )
        if not c.exclusive and self.nothing != (usual := default(self, "nothing")):
            raise UserError(
                f"got task.nothing {self.nothing} with {type(c).__name__}, each of whose classes has a probability, "
                f"expected a detector that learns of queries without an object, try --task.nothing {usual}"
            )
        most = c.queries if c.exclusive else c.queries * c.classes
        if self.found > most and self.found != default(self, "found"):
            raise UserError(
                f"got task.found {self.found} for {c.queries} queries, expected at most the {most} objects that these "
                f"can find, try --task.found {most}"
            )
        objects = self.objects or c.queries
        if objects > c.queries:
            raise UserError(
                f"got up to {objects} objects of an image for {c.queries} queries, expected no more, "
                f"try --task.objects {c.queries}"
            )
        scale = jnp.array([c.input_shape[1], c.input_shape[0]] * 2, jnp.float32)

        def one(outputs: jax.Array, truth: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
            """What the outputs of one block (Q, 4 + …) cost for one image with objects (G, 4)."""
            predicted, logits, real = outputs[:, :4], outputs[:, 4:], labels >= 0
            apart, overlap = compared(predicted[:, None], truth)
            unlike = -jax.nn.softmax(logits)[:, labels] if c.exclusive else focal(logits)[:, labels]
            costs = unlike + self.box_weight * apart - self.overlap_weight * overlap
            query = boxes.pairs(jax.lax.stop_gradient(costs), real)
            mine = predicted[query]
            apart, overlap = compared(mine, truth)
            if c.exclusive:
                name = jnp.full(len(outputs), c.classes).at[query].set(jnp.where(real, labels, c.classes))
                weight = jnp.where(name == c.classes, self.nothing, 1.0)
                each = -weight * jnp.take_along_axis(jax.nn.log_softmax(logits), name[:, None], 1)[:, 0]
            else:
                right = boxes.overlaps(corners_of(jax.lax.stop_gradient(mine)), corners_of(truth))
                each, weight = varifocal(logits, query, jnp.where(real, labels, -1), right), real
            return {
                "class": each.sum(),
                "share": weight.sum(),
                "box": (apart * real).sum(),
                "giou": ((1 - overlap) * real).sum(),
            }

        def parts(outputs: jax.Array, batch: Batch) -> dict[str, jax.Array]:
            """What the blocks' outputs cost (B, L), and how many images and objects there are (B,)."""
            outputs = outputs if self.auxiliary else outputs[None]
            counts, labels = counted(batch), batch["classes"]
            of_images = jax.vmap(one)
            found = jax.vmap(of_images, (0, None, None), 1)(outputs, centered(batch["boxes"] / scale), labels)
            found = {name: x * counts[:, None] for name, x in found.items()}
            return found | {"objects": (labels >= 0).sum(1) * counts, "images": counts}

        def sums(found: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
            """The loss, of all blocks, and its parts, of the last one."""
            of = {name: x.sum(0) for name, x in found.items()}
            share, objects = (x + (x == 0) for x in (of["share"], of["objects"]))
            near = self.box_weight * of["box"] + self.overlap_weight * of["giou"]
            mean = (of["class"] / share + near / objects).sum()
            return {
                "loss": (mean * of["images"], of["images"]),
                "class_loss": (of["class"][-1], share[-1]),
                "box_loss": (of["box"][-1], objects),
                "giou_loss": (of["giou"][-1], objects),
            }

        def tell(outputs: jax.Array) -> boxes.Found:
            outputs = outputs[-1] if self.auxiliary else outputs
            sure = jax.nn.softmax(outputs[..., 4:])[..., :-1] if c.exclusive else jax.nn.sigmoid(outputs[..., 4:])
            of_image = functools.partial(detections, least=self.score, most=self.found, exclusive=c.exclusive)
            return jax.vmap(of_image)(corners_of(outputs[..., :4]) * scale, sure)

        return finding(model, data, objects, Scoring(parts, sums, tell, {"every": self.auxiliary}))


def centered(boxes: jax.Array) -> jax.Array:
    """Turn left, top, width and height into center, width and height, (…, 4)."""
    return jnp.concatenate([boxes[..., :2] + boxes[..., 2:] / 2, boxes[..., 2:]], -1)


def corners_of(boxes: jax.Array) -> jax.Array:
    """Turn center, width and height into left, top, right and bottom, (…, 4)."""
    middle, half = boxes[..., :2], boxes[..., 2:] / 2
    return jnp.concatenate([middle - half, middle + half], -1)


def compared(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums of differences, and generalized intersections over unions, of boxes by center and size."""
    return jnp.abs(a - b).sum(-1), boxes.generalized(corners_of(a), corners_of(b))


def focal(logits: jax.Array) -> jax.Array:
    """The cost of matching an object of each class with a query, from the query's class probabilities."""
    p = jax.nn.sigmoid(logits)
    found, other = 0.25 * (1 - p) ** 2 * -jnp.log(p + 1e-8), 0.75 * p**2 * -jnp.log(1 - p + 1e-8)
    return 2 * (found - other)


def varifocal(logits: jax.Array, query: jax.Array, labels: jax.Array, overlap: jax.Array) -> jax.Array:
    """The cross-entropy with overlaps of the classes of queries that have an object, (Q, C).

    That of other classes counts as far as they are believed. Source: Zhang et al. 2020, equation 2, α = 0.75, γ = 2.
    """
    real = (labels >= 0).astype(logits.dtype)
    right = jnp.zeros_like(logits).at[query, labels].set(real)
    score = jnp.zeros_like(logits).at[query, labels].set(overlap * real)
    weight = score + 0.75 * jax.nn.sigmoid(jax.lax.stop_gradient(logits)) ** 2 * (1 - right)
    return weight * binary_cross_entropy(logits, score)


def detections(predicted: jax.Array, sure: jax.Array, least: float, most: int, exclusive: bool) -> boxes.Found:
    """Return an image's detections, from its boxes (Q, 4) and their class probabilities (Q, C).

    A query tells of its likeliest class where it can have one alone, and of each class otherwise.
    """
    count = sure.shape[1]
    if exclusive:
        scores, classes, which = sure.max(-1), sure.argmax(-1), jnp.arange(len(sure))
    else:
        scores, (which, classes) = sure.reshape(-1), jnp.divmod(jnp.arange(sure.size), count)
    scores, order = boxes.first(jnp.where(scores >= least, scores, 0.0), most)
    return boxes.Found(predicted[which[order]], scores, jnp.where(scores > 0, classes[order], -1))
