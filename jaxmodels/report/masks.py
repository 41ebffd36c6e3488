"""Masks over photographs: the best and the worst of a segmentation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.generate.masks import COLORS
from jaxmodels.report.pieces import Picture, Piece, grid, pixels, show
from jaxmodels.tasks.segmentation import confusion, intersection_over_union, resized
from jaxmodels.train.saved import Evaluation

SHOWN = 8
LISTED = 20
"""With more classes than this, none is named beside the pictures."""


def pieces(evaluation: Evaluation) -> list[Piece]:
    """Draw the images of the highest and of the lowest mean IoU: the photograph, its mask, and what is predicted."""
    run = evaluation.run
    if run.config.task.answers != "mask":
        return []
    ious, chosen = scores(evaluation)
    order = np.argsort(-np.nan_to_num(ious, nan=-1.0), kind="stable")
    order = order[np.isfinite(ious[order])]
    if not len(order):
        return []
    best, worst = order[:SHOWN], order[::-1][: min(SHOWN, max(len(order) - SHOWN, 0))]
    names = ", ".join(
        f"{evaluation.class_name(i)} {color}"
        for i, color in zip(range(run.model.config.classes), NAMES, strict=False)
        if run.model.config.classes <= min(LISTED, len(NAMES))
    )
    key = f" {names}; what does not count is left as it is." if names else ""
    found: list[Piece] = [
        picture("best", evaluation, best, ious, chosen, "The masks that agree most." + key),
    ]
    if len(worst):
        found.append(picture("worst", evaluation, worst, ious, chosen, "The masks that agree least." + key))
    return found


NAMES = ("blue", "orange", "green", "purple", "ocher", "teal", "pink", "gray", "light green", "brown")


def scores(evaluation: Evaluation) -> tuple[np.ndarray, np.ndarray]:
    """Return each image's mean IoU over the classes that it has or that are predicted, (N,), NaN where nothing counts;
    and the predicted classes (N, H, W)."""
    run = evaluation.run

    @jax.jit
    def predict(params: Any, inputs: Any, labels: Any) -> tuple[jax.Array, jax.Array]:
        logits = resized(run.apply(inputs, params=params).astype(jnp.float32), labels.shape[1:])
        return jax.vmap(confusion)(logits, labels), logits.argmax(-1).astype(jnp.uint8)

    matrices, chosen = [], []
    for batch in evaluation.batches():
        inputs, _ = run.inputs({"inputs": batch["inputs"]})
        found = jax.device_get(predict(run.params["model"], inputs, batch["labels"]))
        matrices.append(found[0])
        chosen.append(found[1])
    each = [intersection_over_union(matrix.astype(np.float64)) for matrix in np.concatenate(matrices)]
    means = [float(np.nanmean(iou)) if np.isfinite(iou).any() else float("nan") for iou in each]
    return np.array(means), np.concatenate(chosen)


def picture(
    name: str, evaluation: Evaluation, which: np.ndarray, ious: np.ndarray, chosen: np.ndarray, caption: str
) -> Picture:
    """Draw images at these indices: a row of photographs, one with their masks, one with the predictions."""
    batch = evaluation.source.batch(which, np.zeros_like(which))
    images, labels = pixels(batch["inputs"]), batch["labels"]
    whole, axes = grid(3, len(which), 1.5, 1.6)
    for column, index in enumerate(which.tolist()):
        show(axes[0, column], images[column])
        show(axes[1, column], over(images[column], labels[column]))
        show(axes[2, column], over(images[column], np.where(labels[column] < 0, -1, chosen[index])))
        axes[0, column].set_title(f"IoU {ious[index]:.2f}", fontsize=8.5)
    for row, title in enumerate(("image", "mask", "predicted")):
        axes[row, 0].set_ylabel(title, fontsize=8.5)
    return Picture(name, whole, f"{caption} Above each image: its mean IoU.")


def over(image: np.ndarray, labels: np.ndarray, opacity: float = 0.55) -> np.ndarray:
    """Lay the colors of classes (H, W) over an image (H, W, C) in [0, 1]; below 0 it shows as it is."""
    gray = image.mean(-1, keepdims=True) if image.shape[-1] != 3 else image
    colors = np.array(COLORS, np.float32)[np.maximum(labels, 0) % len(COLORS)] / 255
    share = np.where(labels >= 0, opacity, 0.0)[..., None]
    return (1 - share) * np.broadcast_to(gray, colors.shape) + share * colors
