"""What a variational autoencoder decodes from its latents, and from images that it has not seen."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.report.pieces import Picture, Piece, pixels, sheet
from jaxmodels.tasks.losses import gaussian_kl
from jaxmodels.train.saved import Evaluation

SIDE = 15
PAIRS = 30
LOOKED_AT = 1000


def pieces(evaluation: Evaluation) -> list[Piece]:
    """Show a grid over two latents, and originals above their reconstructions."""
    run = evaluation.run
    if (task := run.task.autoencoder) is None:
        return []
    inputs = evaluation.examples(0, LOOKED_AT)["inputs"]
    images = pixels(inputs)
    seen = np.asarray(task.seen(jnp.asarray(images)))
    outputs, mean, log_variance = run.apply(jnp.asarray(seen))
    size = mean.shape[-1]
    used = np.asarray(gaussian_kl(mean[..., None], log_variance[..., None]).mean(0))
    axes = (0, 1) if size == 2 else tuple(int(i) for i in np.argsort(-used)[:2])
    decoded = np.asarray(task.shown(run.apply(latents=jnp.asarray(codes(size, axes)))))
    caption = (
        f"{SIDE}×{SIDE} latent vectors at equal quantiles of the prior: "
        f"latent {axes[0]} grows to the right, latent {axes[-1]} upwards."
    )
    if size > 2:
        nats = " and ".join(f"{used[i]:.2f}" for i in axes)
        caption += (
            f" Of {size} latents these two are used most ({nats} nats per image of {used.sum():.2f} in total); "
            "the others are 0, the prior's mean."
        )
    pairs = np.concatenate([seen[:PAIRS], np.asarray(task.shown(outputs[:PAIRS]))])
    return [
        Picture("latents", sheet(decoded, SIDE, 7.0, gap=0), caption),
        Picture(
            "reconstructions",
            sheet(beside(pairs, 10), 10, 8.0),
            "Images of the held-out set; below each, what the mean of its code decodes to.",
        ),
    ]


def codes(size: int, axes: tuple[int, ...], side: int = SIDE) -> np.ndarray:
    """Return codes (side², size) on a grid over two axes, in rows from the top: the first axis grows along a row, the
    second from the last row to the first. With one latent, only that varies."""
    steps = np.asarray(jax.scipy.special.ndtri((np.arange(side) + 0.5) / side))
    found = np.zeros((side, side, size), np.float32)
    found[:, :, axes[-1]] = steps[::-1, None]
    found[:, :, axes[0]] = steps[None, :]
    return found.reshape(side * side, size)


def beside(pairs: np.ndarray, columns: int) -> np.ndarray:
    """Arrange 2N images, of which N + i belongs to i, in rows of `columns`, each above the row that belongs to it."""
    count = len(pairs) // 2
    order = [i + part for first in range(0, count, columns) for part in (0, count) for i in row(first, columns, count)]
    return pairs[order]


def row(first: int, columns: int, count: int) -> range:
    """Return the indices of a row; the last row may be shorter."""
    return range(first, min(first + columns, count))
