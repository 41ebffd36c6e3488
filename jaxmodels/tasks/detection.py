"""Detection: boxes of objects and their classes, by SimOTA."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.data import examples
from jaxmodels.data.classes import check_classes
from jaxmodels.data.contract import BatchField
from jaxmodels.data.marks import Boxes
from jaxmodels.data.opening import Opening
from jaxmodels.data.section import DataConfig
from jaxmodels.data.source import Source
from jaxmodels.errors import UserError
from jaxmodels.fields import Dim, Share, Weight
from jaxmodels.models.model import Model
from jaxmodels.tasks import boxes
from jaxmodels.tasks.average_precision import average_precisions
from jaxmodels.tasks.losses import binary_cross_entropy
from jaxmodels.tasks.metrics import LISTED, unique
from jaxmodels.tasks.task import (
    Answers,
    Aux,
    Batch,
    Loss,
    Params,
    Sums,
    Task,
    TaskConfig,
    Totals,
    Whole,
    divide,
    forward,
    normalized,
    numbers,
    rows,
)

PRECISIONS = ("ap", "ap50", "ap75")
SETS = (*boxes.Found._fields, "truth", "labels", "weight")
"""What precisions are computed from."""


@dataclass(frozen=True)
class Detection(TaskConfig):
    """Find objects in `inputs` (B, H, W, C): their `boxes` (B, G, 4) in pixels and their `classes` (B, G).

    A box is left, top, width and height; a class below 0 says that there is none, so that images have as many. An image
    of which nothing is known has a 0 in `known` (B,).

    Each object is given some of the model's places (`boxes.assign`), which learn its box and its class; all learn
    whether they have one. The loss is divided by the number of places that have one, of which an image without any
    counts as one. Source: Ge et al. 2021.
    """

    objects: Dim = 120
    """Most objects of an image."""
    box_loss: Literal["iou", "giou"] = "iou"
    """What a box learns: 1 - IoU², or 1 - the generalized IoU (Rezatofighi et al. 2019)."""
    box_weight: Weight = 5.0
    """Factor of that loss beside the cross-entropies of objects and classes."""
    score: Share = 0.01
    """Lowest score of a box that is reported."""
    overlap: Share = 0.65
    """Of two boxes of a class whose intersection over union is above this, the one with the lower score is dropped."""
    found: Dim = 100
    """Most boxes that are reported of an image."""
    answers: ClassVar[Answers] = "boxes"
    reads: ClassVar[tuple[str, ...]] = ("mean", "std")

    def examples(self, opening: Opening) -> Source:
        return images(opening, self.objects)

    def build(self, model: Model, data: DataConfig) -> Task:
        if not hasattr(model.config, "anchors"):
            raise UserError(
                f"got task detection with {type(model.config).__name__}, expected a detector that has places of its "
                "own for objects, try --model yolox-nano, or --task set_detection for --model detr"
            )
        anchors, classes = jnp.asarray(model.config.anchors()), model.config.classes
        assign = jax.vmap(boxes.assign, in_axes=(0, 0, 0, None, 0, 0))
        similar = boxes.overlaps if self.box_loss == "iou" else boxes.generalized

        def parts(outputs: jax.Array, batch: Batch) -> dict[str, jax.Array]:
            """The losses of each image (B,), and what they are divided by."""
            predicted, object_logits, class_logits = outputs[..., :4], outputs[..., 4], outputs[..., 5:]
            truth, labels = corners(batch["boxes"]), batch["classes"]
            which, overlap = assign(
                *jax.lax.stop_gradient((predicted, object_logits, class_logits)), anchors, truth, labels
            )
            has, which = (which >= 0).astype(jnp.float32), jnp.maximum(which, 0)
            near = similar(predicted, jnp.take_along_axis(truth, which[..., None], 1))
            name = jnp.take_along_axis(labels, which, 1)
            sure = jax.nn.one_hot(name, classes) * overlap[..., None]
            each = {
                "box": ((1 - (near**2 if self.box_loss == "iou" else near)) * has).sum(1),
                "object": binary_cross_entropy(object_logits, has).sum(1),
                "class": (binary_cross_entropy(class_logits, sure).sum(-1) * has).sum(1),
            }
            loss = self.box_weight * each["box"] + each["object"] + each["class"]
            counts = counted(batch)
            found = {"loss": loss, **{f"{name}_loss": x for name, x in each.items()}}
            return {name: x * counts for name, x in found.items()} | {"count": jnp.maximum(has.sum(1), 1) * counts}

        def sums(found: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
            count = found["count"].sum()
            return {name: (x.sum(), count) for name, x in found.items() if name != "count"}

        def tell(outputs: jax.Array) -> boxes.Found:
            return boxes.tell(outputs, self.overlap, self.score, self.found)

        return finding(model, data, self.objects, Scoring(parts, sums, tell))


class Scoring(NamedTuple):
    """How a detector's outputs are judged: what differs from one kind of detector to another."""

    parts: Callable[[Any, Batch], dict[str, jax.Array]]
    """(outputs, batch) -> what the loss is made of, of each image (B, …); 0 of one that does not count."""
    sums: Callable[[Mapping[str, Any]], dict[str, tuple[Any, Any]]]
    """parts of any number of images -> the loss, and what it is made of, each a sum and what it is divided by."""
    tell: Callable[[Any], boxes.Found]
    """outputs -> each image's detections."""
    how: Mapping[str, Any] = {}
    """What the model is asked beside its outputs."""


def images(opening: Opening, objects: int) -> Source:
    """Make examples of images with up to so many objects."""
    source = examples.marked(opening, "boxes", lambda field: Boxes(field, objects))
    check_classes(source, opening.num_classes)
    return source


def finding(model: Model, data: DataConfig, objects: int, scoring: Scoring) -> Task:
    """Join a detector with its losses, with precisions over the whole set, and with what it predicts."""
    classes, (parts, sums, tell, how) = model.config.classes, scoring

    def apply(params: Params, stats: Params, batch: Batch, **more: Any) -> tuple[Any, Params]:
        return forward(("model", model), params, stats, normalized(batch["inputs"], data), **how, **more)

    def loss(params: Params, stats: Params, batch: Batch, rng: jax.Array, step: Any = 0) -> tuple[jax.Array, Aux]:
        outputs, stats = apply(params, stats, batch, train=True, rng=rng)
        found = sums(parts(outputs, batch))
        total, count = found["loss"]
        return total, Aux(count, found, stats)

    def metrics(params: Params, stats: Params, batch: Batch) -> Sums:
        return sums(parts(apply(params, stats, batch)[0], batch))

    def predicts(params: Params, stats: Params, batch: Batch) -> dict[str, jax.Array]:
        return tell(apply(params, stats, batch)[0])._asdict()

    def keep(params: Params, stats: Params, batch: Batch) -> dict[str, jax.Array]:
        outputs, _ = apply(params, stats, batch)
        own = {"truth": corners(batch["boxes"]), "labels": batch["classes"], "weight": counted(batch)}
        return {**parts(outputs, batch), **tell(outputs)._asdict(), **own}

    def measured(kept: Mapping[str, np.ndarray], source: Source) -> dict[str, tuple[Any, float]]:
        found = {name: x.astype(np.float64) for name, x in kept.items() if name not in SETS}
        return {**sums(found), "precisions": (average_precisions(kept, classes), 1.0)}

    fields = {
        "inputs": numbers(model.config.input_shape),
        "boxes": BatchField((objects, 4), np.float32),
        "classes": BatchField((objects,), below=classes),
        "known": BatchField((), below=2, optional=True, usual=True),
    }
    return Task(
        {"model": model},
        (Loss("loss", "model", loss),),
        metrics,
        fields,
        needs="an image",
        summarize=summarize,
        whole=Whole(keep, measured, PRECISIONS),
        predicts=predicts,
        better=dict.fromkeys(PRECISIONS, "max"),
    )


def counted(batch: Batch) -> jax.Array:
    """Return 1 for each image that counts, and 0 for others, (B,)."""
    return rows(batch) * batch["known"] if "known" in batch else rows(batch)


def corners(boxes: jax.Array) -> jax.Array:
    """Turn left, top, width and height into left, top, right and bottom, (…, 4)."""
    return jnp.concatenate([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], -1)


def summarize(totals: Totals, classes: Sequence[str] = ()) -> dict[str, float]:
    """Average the precisions over classes that occur: over ten overlaps (`ap`), at 0.5 and 0.75, and each class's.

    Where no class occurs, there is no precision to report.
    """
    found = divide({name: total for name, total in totals.items() if name != "precisions"})
    if "precisions" not in totals:  # of a batch
        return found
    every, _ = totals["precisions"]
    there = ~np.isnan(every[:, 0])
    of = {"ap": every.mean(1), "ap50": every[:, 0], "ap75": every[:, 5]}
    found |= {name: float(values[there].mean()) for name, values in of.items() if there.any()}
    if len(every) <= LISTED:
        names = unique([*classes, *map(str, range(len(classes), len(every)))])
        found |= {f"{name}/{names[i]}": float(of[name][i]) for name in ("ap", "ap50") for i in np.flatnonzero(there)}
    return found
