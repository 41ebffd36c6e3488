"""Detect objects in images with a saved run: boxes in the images' own pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxmodels.data import pixels, transforms
from jaxmodels.data.section import Augment
from jaxmodels.generate.classes import class_names
from jaxmodels.generate.prepare import Answer, Predictor, images, shape_of
from jaxmodels.train.saved import Run


def detector(run: Run) -> Predictor:
    """Return the function that prepares an image, and the one that finds the boxes in a batch of them.

    Boxes are as in COCO's results: left, top, width and height, by falling score.
    """
    predicts, names, prepared = run.task.predicts, class_names(run), images(run)
    assert predicts is not None
    height, width, _ = shape_of(run)
    crop, library = Augment(crop=run.config.augment.crop), run.config.data.pixels
    found = jax.jit(predicts)

    def ready(value: Any) -> Any:
        inputs = prepared(value)
        size = pixels.size_of(pixels.decode(value, library))
        # where the pixels of the model's image come from says where its boxes go to
        return inputs | {"size": size, "matrix": transforms.affine(crop, size, (height, width), None)}

    def answers(given: Sequence[Any]) -> list[Answer]:
        batch = {"inputs": np.stack([each["inputs"] for each in given])}
        told = {name: np.asarray(x) for name, x in found(run.params, run.stats, batch).items()}
        boxes, scores, classes = told["boxes"], told["scores"], told["classes"]
        return [one(each, *parts) for each, *parts in zip(given, boxes, scores, classes, strict=True)]

    def one(each: Any, boxes: np.ndarray, scores: np.ndarray, classes: np.ndarray) -> Answer:
        if not np.isfinite(scores).all():
            return {"error": "the model's scores are no finite numbers"}
        told = classes >= 0
        a, _, c, _, e, f = each["matrix"]
        corners = boxes[told].astype(np.float64) * (a, e, a, e) + (c, f, c, f)
        corners = np.clip(corners, 0, [*each["size"], *each["size"]])
        listed = zip(corners, scores[told], classes[told], strict=True)
        return {
            "boxes": [
                {
                    "label": names[label],
                    "score": round(float(score), 6),
                    "bbox": [round(float(x), 2) for x in (*box[:2], *(box[2:] - box[:2]))],
                }
                for box, score, label in listed
            ]
        }

    return ready, answers
