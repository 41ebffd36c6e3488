"""The pieces of a page, and how its pictures look."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from jaxmodels.tasks.task import floats

COLORS = ("#1f6fb4", "#d9541e", "#2a9d4e", "#8f4bb3", "#b8860b", "#17a0ad", "#d4418e", "#555555")
"""For runs and series: colors that differ in hue and lightness, so that most remain distinct for color-blind
readers."""


@dataclass(frozen=True)
class Picture:
    """A figure, its file name, and a caption."""

    name: str
    figure: Figure
    caption: str = ""

    def png(self) -> bytes:
        """The figure as a PNG."""
        buffer = io.BytesIO()
        FigureCanvasAgg(self.figure)
        self.figure.savefig(buffer, format="png", dpi=120)
        return buffer.getvalue()


@dataclass(frozen=True)
class Table:
    """Rows of text, in which numbers are text too."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""


@dataclass(frozen=True)
class Tokens:
    """Texts whose tokens are colored by a number from -1 to 1, with a heading for each text."""

    texts: Sequence[tuple[str, Sequence[str], np.ndarray]]
    caption: str = ""


@dataclass(frozen=True)
class Heard:
    """Sounds to play: WAV files, with a heading for each."""

    sounds: Sequence[tuple[str, bytes]]
    caption: str = ""


@dataclass(frozen=True)
class Marked:
    """Texts in parts, some of them marked, with a heading for each text.

    A part is marked "hit" where what a model says is right, "said" where it is not, and "missed" where it should have
    said something; "" otherwise.
    """

    texts: Sequence[tuple[str, Sequence[tuple[str, str]]]]
    """(heading, [(part, mark), …])."""
    caption: str = ""


Piece = Picture | Table | Tokens | Heard | Marked


def figure(width: float, height: float) -> Figure:
    """Create a white figure of this many inches, laid out so that nothing is cut off."""
    return Figure((width, height), layout="constrained", facecolor="white")


def grid(rows: int, columns: int, width: float = 2.0, height: float = 2.0) -> tuple[Figure, np.ndarray]:
    """Create a figure and its axes (rows, columns), each of this many inches."""
    whole = figure(columns * width, rows * height)
    return whole, np.asarray(whole.subplots(rows, columns, squeeze=False))


def blank(axis: Any) -> None:
    """Remove ticks and frame from axes, for an image or an empty cell."""
    axis.set_xticks([])
    axis.set_yticks([])
    for side in axis.spines.values():
        side.set_visible(False)


def show(axis: Any, image: np.ndarray, **how: Any) -> None:
    """Draw an image (H, W, C) with values in [0, 1] and 1, 3 or 4 channels; with any other number, their mean."""
    image = np.clip(np.asarray(image, np.float32), 0, 1)
    if image.shape[-1] not in (3, 4):
        image = image.mean(-1)
    axis.imshow(image, **{"cmap": "gray", "vmin": 0, "vmax": 1, "interpolation": "nearest", **how})
    blank(axis)


def tile(images: np.ndarray, columns: int, gap: int = 0) -> np.ndarray:
    """Arrange images (N, H, W, C) in rows of `columns`, from the top left, with white gaps."""
    N, H, W, C = images.shape
    rows = -(-N // columns)
    sheet = np.ones((rows * (H + gap) - gap, columns * (W + gap) - gap, C), np.float32)
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        sheet[row * (H + gap) :, column * (W + gap) :][:H, :W] = image
    return sheet


def sheet(images: np.ndarray, columns: int, inches: float, gap: int = 1) -> Figure:
    """Draw images (N, H, W, C) in [0, 1] as one figure of this many inches in width."""
    tiled = tile(images, columns, gap)
    whole = Figure((inches, inches * tiled.shape[0] / tiled.shape[1]), facecolor="white")
    axis: Any = whole.add_axes((0, 0, 1, 1))
    show(axis, tiled)
    return whole


def pieces_of(tokenizer: Any, ids: np.ndarray) -> list[str]:
    """Return each token as a short text of its own, without surrounding spaces unless it is nothing else."""
    if tokenizer is None:
        return [str(i) for i in ids.tolist()]

    def one(i: int) -> str:
        text = tokenizer.decode([i])
        text = text.strip(" ") or text.replace(" ", "␣")
        text = "".join(
            c if c.isprintable() else {"\n": "⏎", "\t": "⇥"}.get(c, "\N{REPLACEMENT CHARACTER}") for c in text
        )
        return text if len(text) <= 16 else text[:15] + "…"

    return [one(i) for i in ids.tolist()]


def pixels(x: np.ndarray) -> np.ndarray:
    """Scale the data's images to [0, 1]."""
    return np.asarray(floats(jax.numpy.asarray(x)))


def length(segment_ids: np.ndarray | None, ids: np.ndarray, most: int) -> int:
    """Count the tokens of the first text in a row (T,), without padding, and up to `most`."""
    if segment_ids is not None:
        there = int((segment_ids == segment_ids[0]).sum())
    else:
        there = len(np.trim_zeros(ids, "b"))
    return max(1, min(there, most))
