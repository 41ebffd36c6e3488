"""Images that a generative model generated over time, and those that it generates now."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from jaxmodels.report.pieces import Picture, Piece, grid, sheet, show, tile
from jaxmodels.train.saved import Evaluation

MOMENTS = 8
SIDE = 8
ROWS, COLUMNS = 8, 11
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
    return found


def over_time(folder: Path, last: int) -> list[tuple[int, np.ndarray]]:
    """Return steps up to `last` with the images in [0, 1] saved at each, spread evenly if there are many."""
    files = sorted((int(file.stem), file) for file in folder.glob("*.npy") if file.stem.isdecimal())
    files = [(step, file) for step, file in files if step <= last]
    spread = np.unique(np.linspace(0, len(files) - 1, min(len(files), MOMENTS)).round().astype(int))
    return [(files[i][0], np.load(files[i][1]).astype(np.float32) / 255) for i in spread]
