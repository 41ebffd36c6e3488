"""What is marked on images, a mask or boxes, moved along with the pixels.

Where a pixel of a changed image comes from is an affine map of the plane: x' = ax + by + c and y' = dx + ey + f from
the changed image to the one that it is made of, in Pillow's coordinates (a pixel's center is at 0.5). A matrix is these
six numbers, (a, b, c, d, e, f); `transforms.affine` gives that of an example.
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image

from jaxmodels.data.contract import IGNORED
from jaxmodels.data.pixels import Box, Size, Unreadable

VISIBLE = 0.25
_VALUES = 256
_UNKNOWN = -2


def scaling(full: tuple[int, int], size: Size, box: Box | None = None) -> np.ndarray:
    """Return the matrix of an image that shows the part `box`, or all, of one of (width, height)."""
    left, top, right, bottom = box or (0.0, 0.0, float(full[0]), float(full[1]))
    return np.array([(right - left) / size[1], 0.0, left, 0.0, (bottom - top) / size[0], top])


def joined(outer: np.ndarray, inner: np.ndarray) -> np.ndarray:
    """Return the matrix of an image made with `inner` of one that is made with `outer`."""
    return (_square(outer) @ _square(inner))[:2].reshape(6)


def _square(matrix: np.ndarray) -> np.ndarray:
    return np.concatenate([matrix, [0.0, 0.0, 1.0]]).reshape(3, 3)


def move_masks(masks: np.ndarray, matrices: np.ndarray, size: Size) -> np.ndarray:
    """Read each pixel of new masks (B, h, w) from the nearest one of masks (B, H, W); outside of these it is IGNORED.

    Shapes: matrices (B, 6).
    """
    count, height, width = masks.shape
    y, x = np.divmod(np.arange(size[0] * size[1]), size[1])
    m = matrices[:, :, None]
    at_x = np.floor(m[:, 0] * (x + 0.5) + m[:, 1] * (y + 0.5) + m[:, 2]).astype(np.intp)
    at_y = np.floor(m[:, 3] * (x + 0.5) + m[:, 4] * (y + 0.5) + m[:, 5]).astype(np.intp)
    inside = (at_x >= 0) & (at_x < width) & (at_y >= 0) & (at_y < height)
    found = masks[np.arange(count)[:, None], np.clip(at_y, 0, height - 1), np.clip(at_x, 0, width - 1)]
    return np.where(inside, found, np.array(IGNORED, masks.dtype)).reshape(count, *size)


def move_boxes(boxes: np.ndarray, matrix: np.ndarray, size: Size, visible: float = VISIBLE) -> np.ndarray:
    """Return where boxes (N, 4), as x, y, width and height in pixels, lie in an image of this size; 0 if they do not.

    A box becomes the one around its moved corners, clipped to the image. One of which less than the share `visible` is
    left is no longer there.
    """
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    x, y, w, h = boxes.T
    corners = np.stack([[x, y], [x + w, y], [x, y + h], [x + w, y + h]])  # (4, 2, N)
    a, b, c, d, e, f = matrix
    back = np.linalg.inv([[a, b], [d, e]])  # the matrix says where pixels come from, boxes go the other way
    moved = np.einsum("ij,kjn->kin", back, corners - np.array([c, f])[:, None])
    low, high = moved.min(0), moved.max(0)
    limit = np.array([[size[1]], [size[0]]], np.float64)
    seen_low, seen_high = np.clip(low, 0, limit), np.clip(high, 0, limit)
    area, whole = (seen_high - seen_low).prod(0), (high - low).prod(0)
    there = (area > 0) & (area >= visible * whole * (1 - 1e-9))
    return np.where(there, np.concatenate([seen_low, seen_high - seen_low]), 0.0).T.astype(np.float32)


class Marks(ABC):
    """One kind of thing that is marked on images, read from a field of their records. Its `repr` is its identity."""

    field: str
    """The record field."""

    @abstractmethod
    def room(self, count: int, size: Size) -> dict[str, np.ndarray]:
        """Return a batch's arrays for `count` images of a size on which nothing that counts is marked."""

    @abstractmethod
    def read(self, value: object, full: tuple[int, int]) -> dict[str, np.ndarray]:
        """Return what a record says of its image of (width, height), in that image's pixels.

        Raises: Unreadable.
        """

    @abstractmethod
    def move(self, marked: Mapping[str, np.ndarray], matrices: np.ndarray, size: Size) -> dict[str, np.ndarray]:
        """Move what is marked on images (B, …) to those made of them with matrices (B, 6)."""


@dataclass(frozen=True)
class Masks(Marks):
    """The class of each pixel, `labels` (B, H, W), from an image file of numbers or an array of them.

    Values that do not count are IGNORED; the others, in order, are the classes 0, 1, …
    """

    field: str
    classes: int
    ignored: tuple[int, ...] = ()

    @cached_property
    def _numbers(self) -> np.ndarray:
        """The class of each value."""
        found = np.full(_VALUES, _UNKNOWN, np.int16)
        counted = values_of(self.classes, self.ignored)
        found[list(self.ignored)] = IGNORED
        found[counted] = np.arange(len(counted))
        return found

    def room(self, count: int, size: Size) -> dict[str, np.ndarray]:
        return {"labels": np.full((count, *size), IGNORED, np.int16)}

    def read(self, value: object, full: tuple[int, int]) -> dict[str, np.ndarray]:
        mask = decode_mask(value)
        if mask.shape != full[::-1]:
            raise Unreadable(
                f"has a mask of {mask.shape[1]}×{mask.shape[0]} for an image of {full[0]}×{full[1]}, expected one size"
            )
        labels = self._numbers[mask]
        if (unknown := labels == _UNKNOWN).any():
            found = int(mask[unknown].max())
            raise Unreadable(
                f"has a mask with the value {found}, expected one of {self.classes} classes or --task.ignored {found}"
            )
        return {"labels": labels}

    def move(self, marked: Mapping[str, np.ndarray], matrices: np.ndarray, size: Size) -> dict[str, np.ndarray]:
        return {"labels": move_masks(marked["labels"], matrices, size)}


@dataclass(frozen=True)
class Boxes(Marks):
    """Up to `most` boxes an image: `boxes` (B, most, 4), x, y, width and height in pixels, with `classes` (B, most).

    A record has an array (N, 5) of x, y, width, height and class. The class of a place without a box is IGNORED, and so
    is that of a box of which too little is left. `known` (B,) is 1 for an image, also for one without a box, and 0 for
    one that stands in for an image that cannot be read.
    """

    field: str
    most: int
    visible: float = VISIBLE
    """Least share of a box that must be left of it inside an image for it to count."""

    def room(self, count: int, size: Size) -> dict[str, np.ndarray]:
        return {
            "boxes": np.zeros((count, self.most, 4), np.float32),
            "classes": np.full((count, self.most), IGNORED, np.int32),
            "known": np.zeros(count, np.int32),
        }

    def read(self, value: object, full: tuple[int, int]) -> dict[str, np.ndarray]:
        rows = np.asarray(value, np.float32).reshape(-1, 5)
        if len(rows) > self.most:
            raise Unreadable(f"has {len(rows)} boxes, expected at most {self.most}")
        found = {name: x[0] for name, x in self.room(1, (full[1], full[0])).items()}
        found["boxes"][: len(rows)], found["classes"][: len(rows)] = rows[:, :4], rows[:, 4]
        return found | {"known": np.ones((), np.int32)}

    def move(self, marked: Mapping[str, np.ndarray], matrices: np.ndarray, size: Size) -> dict[str, np.ndarray]:
        each = zip(marked["boxes"], matrices, strict=True)
        boxes = np.stack([move_boxes(boxes, matrix, size, self.visible) for boxes, matrix in each])
        there = (boxes[..., 2:] > 0).all(-1)
        classes = np.where(there, marked["classes"], np.int32(IGNORED))
        return {"boxes": boxes, "classes": classes, "known": marked["known"]}


def values_of(classes: int, ignored: Sequence[int]) -> list[int]:
    """Return a mask's value of each class: 0, 1, … without those that are ignored."""
    return [value for value in range(_VALUES) if value not in ignored][:classes]


def decode_mask(value: object) -> np.ndarray:
    """Read a mask's numbers, uint8 (H, W): an array, or an image file of gray levels, of a palette or of two colors.

    A palette's colors do not matter, its numbers do.

    Raises: Unreadable.
    """
    if isinstance(value, np.ndarray):
        mask = value[..., 0] if value.ndim == 3 and value.shape[-1] == 1 else value
    else:
        assert isinstance(value, bytes)
        try:
            image = Image.open(io.BytesIO(value))
            image.load()
        except Exception as error:
            raise Unreadable(" ".join(f"has no mask that Pillow knows: {error}".split())) from error
        if image.mode not in ("L", "P", "1"):
            raise Unreadable(f"has a mask with pixels of the kind {image.mode}, expected one number each, of 8 bits")
        mask = np.asarray(image)
    if mask.ndim != 2 or mask.dtype not in (np.uint8, np.bool_):
        raise Unreadable(f"has a mask {mask.dtype} of the shape {mask.shape}, expected uint8 (height, width)")
    return mask.astype(np.uint8)
