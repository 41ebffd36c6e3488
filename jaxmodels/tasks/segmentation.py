"""Semantic segmentation: the class of each pixel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.data import examples
from jaxmodels.data.contract import BatchField
from jaxmodels.data.marks import Masks, values_of
from jaxmodels.data.opening import Opening
from jaxmodels.data.section import DataConfig
from jaxmodels.data.source import Source
from jaxmodels.errors import UserError
from jaxmodels.fields import Range, described
from jaxmodels.models.model import Model
from jaxmodels.registry import named
from jaxmodels.tasks.metrics import LISTED, unique
from jaxmodels.tasks.task import (
    Answers,
    Aux,
    Batch,
    Better,
    Loss,
    ModelCall,
    Params,
    ScoredConfig,
    Sums,
    Task,
    Totals,
    counted,
    divide,
    forward,
    normalized,
    numbers,
)

BETTER: dict[str, Better] = {"accuracy": "max", "miou": "max", "iou": "max"}


@dataclass(frozen=True)
class Segmentation(ScoredConfig):
    """Train a model on images (B, H, W, C) and the class of each pixel, `labels` (B, H, W), ignored below 0.

    The loss is the mean cross-entropy of the pixels that count. Logits of a model that predicts fewer pixels than its
    images have are resized, bilinear.
    """

    ignored: tuple[Annotated[int, Range(0, 255)], ...] = ()
    """Values of a mask whose pixels do not count, such as 255; the others, in order, are the classes 0, 1, …"""
    answers: ClassVar[Answers] = "mask"
    reads: ClassVar[tuple[str, ...]] = ("mean", "std")

    def examples(self, opening: Opening) -> Source:
        classes = opening.num_classes
        assert classes is not None and opening.inputs_shape is not None, "build refuses such a model"
        source = examples.marked(opening, "mask", lambda field: Masks(field, classes, self.ignored))
        source.num_classes = classes
        if source.class_names and len(source.class_names) != classes:
            raise UserError(
                f"got {len(source.class_names)} names of classes for a model of {classes} classes, expected one each, "
                f"try --model.classes {len(source.class_names)}"
            )
        return source

    def build(self, model: Model, data: DataConfig) -> Task:
        classes, (inputs, *_) = getattr(model.config, "classes", None), model.inputs(1)
        if classes is None or len(inputs.shape) != 4:
            raise UserError(
                f"got task segmentation with {type(model.config).__name__}, expected a model of images and classes, "
                "try --model unet"
            )
        if len(known := values_of(classes, self.ignored)) < classes:
            raise UserError(
                f"got model.classes {classes} with {len(self.ignored)} values ignored, expected at most {len(known)}, "
                "since a mask's values are from 0 to 255"
            )

        def apply(params: Params, stats: Params, images: jax.Array, **how: Any) -> tuple[jax.Array, Params]:
            logits, stats = forward(("model", model), params, stats, images, **how)
            if len(getattr(logits, "shape", ())) != 4 or logits.shape[::3] != (len(images), classes):
                raise UserError(
                    f"got a model {named(type(model.config))} that gives {described(logits)} for {len(images)} images, "
                    f"expected logits of each pixel, ({len(images)}, height, width, {classes}), try --model unet"
                )
            return resized(logits, images.shape[1:3]), stats

        def ask(batch: Batch, rng: jax.Array | None) -> ModelCall:
            return ModelCall((normalized(batch["inputs"], data),), {}, counted(batch, batch["labels"]), self.score, rng)

        def loss(params: Params, stats: Params, batch: Batch, rng: jax.Array, step: Any = 0) -> tuple[jax.Array, Aux]:
            call = ask(batch, rng)
            logits, stats = apply(params, stats, *call.inputs, train=True, rng=call.rng)
            s = self.score(logits, call.targets)
            return s.objective, Aux(s.count, {"loss": (s.objective, s.count), "accuracy": (s.correct, s.count)}, stats)

        def metrics(params: Params, stats: Params, batch: Batch) -> Sums:
            logits, _ = apply(params, stats, normalized(batch["inputs"], data))
            labels = counted(batch, batch["labels"])
            s = self.score(logits, labels)
            matrix = confusion(logits, labels)
            return {"loss": (s.loss, s.count), "accuracy": (s.correct, s.count), "confusion": (matrix, s.count)}

        image = tuple(inputs.shape[1:])
        return Task(
            {"model": model},
            (Loss("loss", "model", loss),),
            metrics,
            {"inputs": numbers(image), "labels": BatchField(image[:2], below=classes, stored=np.int16)},
            needs="a pixel that is not ignored",
            summarize=summarize,
            ask=ask,
            better=BETTER,
            outputs=lambda params, stats, batch: apply(params, stats, normalized(batch["inputs"], data))[0],
        )


def resized(logits: jax.Array, size: Sequence[int]) -> jax.Array:
    """Enlarge logits (B, h, w, C) to a size, bilinear between the centers of pixels; unchanged if they have it."""
    if logits.shape[1:3] == tuple(size):
        return logits
    return jax.image.resize(logits, (len(logits), *size, logits.shape[-1]), "bilinear")


def confusion(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Count the pixels of each class (rows) that are predicted as each class (columns), int32 (C, C).

    Shapes: logits (…, C), labels (…), ignored below 0.
    """
    classes, seen = logits.shape[-1], labels >= 0
    places = jnp.where(seen, labels, 0).astype(jnp.int32) * classes + logits.argmax(-1).astype(jnp.int32)
    counts = jnp.bincount(places.ravel(), seen.ravel().astype(jnp.int32), length=classes * classes)
    return counts.reshape(classes, classes)


def summarize(totals: Totals, classes: Sequence[str] = ()) -> dict[str, float]:
    """Compute the IoU of each class that occurs or was predicted, and their mean, from a confusion matrix.

    Source: Everingham et al. 2015, section 4.2; the mean is scikit-learn's `jaccard_score` with the average macro.
    """
    found = divide({name: total for name, total in totals.items() if name != "confusion"})
    each = intersection_over_union(np.asarray(totals["confusion"][0], np.float64))
    occurs = np.isfinite(each)
    if occurs.any():
        found["miou"] = float(each[occurs].mean())
    if len(each) <= LISTED:
        names = unique([*classes, *map(str, range(len(classes), len(each)))])
        found |= {f"iou/{names[k]}": float(each[k]) for k in np.flatnonzero(occurs)}
    return found


def intersection_over_union(matrix: np.ndarray) -> np.ndarray:
    """Return each class's true positives among its true and its predicted pixels, (C,); NaN where there are none."""
    hits = np.diagonal(matrix)
    union = matrix.sum(0) + matrix.sum(1) - hits
    return np.where(union > 0, hits / np.maximum(union, 1), np.nan)
