"""Pictures that a run draws: of a class, of a text, or of anything."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from PIL import Image

from jaxmodels.data.texts import encoded
from jaxmodels.errors import UserError, nearest
from jaxmodels.train.saved import Run

WIDTH = 512
"""Pixels that a sheet is enlarged to, by whole numbers, where its pictures are small."""


def draw(run: Run, prompt: str | None = None, count: int = 16, seed: int = 0) -> np.ndarray:
    """Draw pictures (count, H, W, C) in [0, 1]; a prompt is the name or number of a class, or a text.

    Without a prompt they are of all classes in turn, or of anything.

    Raises:
        UserError: the run makes no images, does not take what to draw, or does not know the class.
    """
    samples, asks = run.task.samples, run.task.asks
    if samples is None:
        raise UserError(f"got a run of task {run.config.task.kind}, expected one whose model generates images")
    if prompt is None:
        return np.asarray(samples(run.params, run.stats, count, seed))
    if not asks:
        raise UserError(
            f"got a prompt {prompt!r} for a run of task {run.config.task.kind}, whose model is not told what to draw, "
            "expected none, try it without"
        )
    given = _words(run, prompt) if "tokens" in asks else {"labels": np.int32(_class(run, prompt))}
    rows = {name: jnp.asarray(np.broadcast_to(x, (count, *np.shape(x)))) for name, x in given.items()}
    return np.asarray(samples(run.params, run.stats, count, seed, given=rows))


def _class(run: Run, prompt: str) -> int:
    names = [run.class_name(i) for i in range(run.model.config.classes)]
    if prompt in names:
        return names.index(prompt)
    if prompt.isdecimal() and int(prompt) < len(names):
        return int(prompt)
    known = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
    raise UserError(f"got prompt {prompt!r}, expected one of the classes {known}{nearest(prompt, names)}")


def _words(run: Run, prompt: str) -> Mapping[str, np.ndarray]:
    if run.tokenizer is None:
        raise UserError(f"got {run.directory} without a tokenizer, expected a run that was trained on texts")
    rows = encoded([prompt], run.tokenizer, run.config.data.seq_len)
    return {"tokens": rows["inputs"][0], "segment_ids": rows["segment_ids"][0]}


def sheet(images: np.ndarray) -> Image.Image:
    """Arrange pictures (N, H, W, C) in [0, 1] in rows, as nearly a square as they give."""
    N, H, W, C = images.shape
    columns = math.ceil(math.sqrt(N))
    rows = math.ceil(N / columns)
    whole = np.ones((rows * columns, H, W, C), np.float32)
    whole[:N] = images
    whole = whole.reshape(rows, columns, H, W, C).swapaxes(1, 2).reshape(rows * H, columns * W, C)
    pixels = np.round(255 * whole).astype(np.uint8)
    made = Image.fromarray(pixels if C in (3, 4) else pixels[..., 0])
    times = max(1, WIDTH // made.width)
    return made.resize((times * made.width, times * made.height), Image.Resampling.NEAREST)
