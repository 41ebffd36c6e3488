"""What a classifier's decision depends on: gradient × input (Shrikumar et al. 2016)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.models.families import create
from jaxmodels.report.pieces import Picture, Piece, Tokens, grid, length, pieces_of, pixels, show
from jaxmodels.train.saved import Evaluation, Run

LOOKED_AT = 200
IMAGES, TEXTS, LONGEST = 10, 8, 60


def pieces(evaluation: Evaluation) -> list[Piece]:
    """Show the contribution of each pixel or token to the logit of the predicted class."""
    run = evaluation.run
    if run.config.task.answers not in ("class", "classes"):
        return []
    batch = evaluation.examples(0, LOOKED_AT)
    inputs = batch["inputs"]
    if inputs.ndim == 4:
        return [of_images(evaluation, batch)]
    if inputs.ndim == 2 and inputs.dtype.kind in "iu" and "embed" in run.params["model"]:
        return [of_texts(evaluation, batch)]
    return []


def attribute(logits: Callable[[jax.Array], jax.Array], x: jax.Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return gradient × input of each example's largest logit (shaped like x), the classes and their probabilities
    (B,).

    `logits` maps x (B, …) to (B, classes).
    """

    def best(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = logits(x)
        return found.max(-1).sum(), found

    slope, found = jax.jit(jax.grad(best, has_aux=True))(x)
    return np.asarray(slope * x), np.asarray(found.argmax(-1)), np.asarray(jax.nn.softmax(found).max(-1))


def of_images(evaluation: Evaluation, batch: dict[str, np.ndarray]) -> Picture:
    """Show images of different predicted classes, each with its map."""
    run = evaluation.run
    x, named = run.inputs(batch)
    found, predicted, confidence = attribute(lambda x: run.apply(x, **named), x)
    _, first = np.unique(predicted, return_index=True)
    rows = np.sort(first)[:IMAGES]
    images = pixels(batch["inputs"])
    pairs = min(5, len(rows))
    figure, axes = grid(-(-len(rows) // pairs), 2 * pairs, 1.15, 1.5)
    for axis in axes.flat[2 * len(rows) :]:
        axis.set_axis_off()
    for i, row in enumerate(rows):
        left, right = axes.flat[2 * i], axes.flat[2 * i + 1]
        show(left, images[row])
        left.set_title(evaluation.class_name(int(predicted[row])), fontsize=9, parse_math=False)
        heat = found[row].sum(-1)
        limit = max(float(np.abs(heat).max()), 1e-12)
        right.imshow(heat, cmap="RdBu", vmin=-limit, vmax=limit, interpolation="nearest")
        right.set_xticks([])
        right.set_yticks([])
        right.set_title(f"{confidence[row]:.0%}", fontsize=9)
    caption = (
        "Gradient × input of the predicted class (above each image, with its probability): blue is evidence for it, "
        "red against it. Where an input is 0, its contribution is 0."
    )
    return Picture("saliency", figure, caption)


def of_texts(evaluation: Evaluation, batch: dict[str, np.ndarray]) -> Tokens:
    """Show texts with a number for each token: the sum over its embedding."""
    run = evaluation.run
    texts = []
    for row in range(min(TEXTS, len(batch["inputs"]))):
        ids = batch["inputs"][row]
        named = {name: batch[name][row : row + 1] for name in ("segment_ids", "types") if name in batch}
        found, predicted, confidence = of_tokens(run, ids, named)
        count = length(named["segment_ids"][0] if "segment_ids" in named else None, ids, LONGEST)
        found = found[:count]
        true, chosen = evaluation.class_name(int(batch["labels"][row])), evaluation.class_name(predicted)
        heading = f"predicted {chosen}, {confidence:.0%}; {'right' if true == chosen else 'it is ' + true}"
        texts.append(
            (heading, pieces_of(evaluation.source.tokenizer, ids[:count]), found / max(np.abs(found).max(), 1e-12))
        )
    caption = (
        "Gradient × input of the predicted class, summed over each token's embedding: blue is evidence for it, red "
        "against it; the strongest token of each text has full color."
    )
    return Tokens(texts, caption)


def of_tokens(run: Run, ids: np.ndarray, named: dict[str, Any]) -> tuple[np.ndarray, int, float]:
    """Return gradient × input of each token (T,) of one text, the class and its probability.

    The model reads a vocabulary made of this text alone: row t of its embedding is the token at position t, so that
    each token has a separate gradient.
    """
    model = create(dataclasses.replace(run.model.config, vocab_size=len(ids)))
    params, table = run.params["model"], run.numbers().params["model"]["embed"]["w"]
    places = jnp.arange(len(ids))[None]

    def logits(rows: jax.Array) -> jax.Array:
        return model.apply({**params, "embed": {"w": rows[0]}}, places, **named)

    found, predicted, confidence = attribute(logits, table[ids][None])
    return found[0].sum(-1), int(predicted[0]), float(confidence[0])
