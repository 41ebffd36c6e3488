"""A classifier's confusion matrix and its worst mistakes."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from jaxmodels.report.pieces import Picture, Piece, Table, figure, grid, pixels, show
from jaxmodels.train.saved import Evaluation

WORST = 24
LISTED = 40
"""With more classes than this, cells have no numbers and axes no names."""


def pieces(evaluation: Evaluation) -> list[Piece]:
    """Draw the confusion matrix of a single-label classifier, and its most confident mistakes."""
    run = evaluation.run
    if run.config.task.answers != "class":
        return []
    labels, predicted, confidence = predictions(evaluation)
    classes = run.model.config.classes
    found: list[Piece] = [
        Picture(
            "confusion",
            draw(counts(labels, predicted, classes), [evaluation.class_name(i) for i in range(classes)]),
            f"Each row holds the examples of one class, by predicted class. {len(labels):,} examples, "
            f"{np.mean(labels == predicted):.2%} of them right; shades are shares of a row.",
        )
    ]
    wrong = np.flatnonzero((labels != predicted) & (labels >= 0))
    worst = wrong[np.argsort(-confidence[wrong], kind="stable")][:WORST]
    return [*found, mistakes(evaluation, worst, labels, predicted, confidence)] if len(worst) else found


def predictions(evaluation: Evaluation) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return labels, predicted classes and their probabilities over the whole evaluation set, each (N,)."""
    run = evaluation.run

    @jax.jit
    def choose(params: Any, inputs: Any, named: Any) -> tuple[jax.Array, jax.Array]:
        shares = jax.nn.softmax(run.apply(inputs, params=params, **named))
        return shares.argmax(-1), shares.max(-1)

    parts = []
    for batch in evaluation.batches():
        inputs, named = run.inputs(batch)
        parts.append((batch["labels"], *jax.device_get(choose(run.params["model"], inputs, named))))
    labels, predicted, confidence = (np.concatenate(each) for each in zip(*parts, strict=True))
    return labels, predicted, confidence


def counts(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Count how many examples of each class (rows) are predicted as each class (columns), (classes, classes)."""
    seen = labels >= 0
    return np.bincount(labels[seen] * classes + predicted[seen], minlength=classes**2).reshape(classes, classes)


def draw(matrix: np.ndarray, names: list[str]) -> Figure:
    """Draw the matrix with its counts."""
    classes, listed = len(matrix), len(matrix) <= LISTED
    side = min(max(3.2, 0.52 * classes + 1.4), 16)
    whole = figure(side + 0.6, side)
    axis: Any = whole.subplots()
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if listed:
        size = 9 if classes <= 20 else 6
        for row, column in np.argwhere(matrix):
            dark = shares[row, column] > 0.5
            color = "white" if dark else "0.15"
            axis.text(column, row, f"{matrix[row, column]}", ha="center", va="center", fontsize=size, color=color)
        long = max(map(len, names)) > 2
        axis.set_xticks(
            range(classes), names, parse_math=False, rotation=45 if long else 0, ha="right" if long else "center"
        )
        axis.set_yticks(range(classes), names, parse_math=False)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    return whole


def mistakes(
    evaluation: Evaluation, worst: np.ndarray, labels: np.ndarray, predicted: np.ndarray, confidence: np.ndarray
) -> Piece:
    """Show the examples at these indices, with their class and the prediction."""
    batch = evaluation.source.batch(worst, np.zeros_like(worst))
    guesses = [
        (evaluation.class_name(int(labels[i])), evaluation.class_name(int(predicted[i])), f"{confidence[i]:.1%}")
        for i in worst
    ]
    caption = "The mistakes that the model is most confident of."
    inputs = batch["inputs"]
    if inputs.ndim == 4:
        columns = min(8, len(worst))
        rows = -(-len(worst) // columns)
        whole, axes = grid(rows, columns, 1.35, 1.6)
        for axis in axes.flat[len(worst) :]:
            axis.set_axis_off()
        for axis, image, (true, wrong, sure) in zip(axes.flat, pixels(inputs), guesses, strict=False):
            show(axis, image)
            axis.set_title(f"{true} → {wrong}\n{sure}", fontsize=8.5, parse_math=False)
        return Picture("mistakes", whole, caption + " Above each: true → predicted, and its confidence.")
    texts = (
        [shortened(evaluation.source.texts[int(at)]) for at in worst.tolist()]
        if len(evaluation.source.texts)
        else numbers(inputs)
    )
    head = ("text" if len(evaluation.source.texts) else "input", "true", "predicted", "confidence")
    return Table(head, [(words, *each) for words, each in zip(texts, guesses, strict=True)], caption)


def shortened(text: str, most: int = 600) -> str:
    """Return a text as its record has it, shortened if it is long."""
    return text if len(text) <= most else text[: most - 1] + "…"


def numbers(inputs: np.ndarray) -> list[str]:
    """Format the first numbers of each example."""
    return [" ".join(f"{x:.3g}" for x in each.reshape(-1)[:16].tolist()) for each in inputs]
