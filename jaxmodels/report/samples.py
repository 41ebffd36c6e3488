"""Images that a generative model generated over time, and those that it generates now."""

from __future__ import annotations

import textwrap
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxmodels.report.pieces import Picture, Piece, blank, grid, pixels, sheet, show, tile
from jaxmodels.train.saved import Evaluation

MOMENTS = 8
SIDE = 8
ROWS, COLUMNS = 8, 11
NAMED = 24
SEED = 1
"""Seed of the fresh images; the images over time have other latents."""


def pieces(evaluation: Evaluation) -> list[Piece]:
    """Show samples from the same latents during training, a grid of fresh ones, and how they come out of noise."""
    run = evaluation.run
    found: list[Piece] = []
    moments = over_time(run.directory / "samples", run.step)
    if moments:
        columns = min(len(moments), MOMENTS)
        figure, axes = grid(-(-len(moments) // columns), columns, 2.0, 2.3)
        for axis, (step, images) in zip(axes.flat, moments, strict=True):
            show(axis, tile(images[:16], 4, 1))
            axis.set_title(f"step {step:,}", fontsize=10)
        found.append(Picture("samples", figure, "Images from the same latents at several steps."))
    if run.task.samples is not None and run.task.autoencoder is None:  # a VAE's codes have a picture of their own
        images = np.asarray(run.task.samples(run.params, run.stats, SIDE * SIDE, SEED))
        found.append(Picture("fresh", sheet(images, SIDE, 6.0), f"{SIDE * SIDE} images of the checkpoint, unselected."))
    if run.task.path is not None:
        path = np.asarray(run.task.path(run.params, run.stats, ROWS, SEED))
        moments = np.unique(np.linspace(0, len(path) - 1, COLUMNS).round().astype(int))
        rows = path[moments].swapaxes(0, 1).reshape(-1, *path.shape[2:])
        caption = f"From noise to picture, one in each row, in {len(path) - 1} steps."
        found.append(Picture("path", sheet(rows, len(moments), 7.0), caption))
    return found + by_text(evaluation)


def by_text(evaluation: Evaluation) -> list[Piece]:
    """Show what is drawn of held-out texts, each beside the image that has this text."""
    run = evaluation.run
    if run.task.samples is None or "tokens" not in run.task.asks:
        return []
    batch = evaluation.examples(0, NAMED)
    given = {name: jnp.asarray(batch[name]) for name in run.task.asks if name in batch}
    drawn = run.task.samples(run.params, run.stats, len(batch["images"]), SEED, given=given)
    pairs = np.concatenate([np.asarray(drawn), pixels(batch["images"])], 2)
    columns = 4
    figure, axes = grid(-(-len(pairs) // columns), columns, 2.4, 1.5)
    for axis in axes.flat:
        blank(axis)
    names = [evaluation.class_name(int(label)) for label in batch.get("labels", ())] or [""] * len(pairs)
    for axis, pair, name in zip(axes.flat, pairs, names, strict=False):
        show(axis, pair)
        axis.set_title(textwrap.shorten(name, 30, placeholder=" …"), fontsize=8)
    return [Picture("texts", figure, "Images drawn of held-out texts; to the right of each, an image of that text.")]


def over_time(folder: Path, last: int) -> list[tuple[int, np.ndarray]]:
    """Return steps up to `last` with the images in [0, 1] saved at each, spread evenly if there are many."""
    files = sorted((int(file.stem), file) for file in folder.glob("*.npy") if file.stem.isdecimal())
    files = [(step, file) for step, file in files if step <= last]
    spread = np.unique(np.linspace(0, len(files) - 1, min(len(files), MOMENTS)).round().astype(int))
    return [(files[i][0], np.load(files[i][1]).astype(np.float32) / 255) for i in spread]
