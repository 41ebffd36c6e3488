"""Random augmentations of images (Pillow), each a function of (seed, epoch, index)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from jaxmodels.data.marks import joined, scaling
from jaxmodels.data.order import mix
from jaxmodels.data.pixels import BILINEAR, Box, Jpeg, Library, Size, as_array, as_image, mirrored, resized
from jaxmodels.data.section import TRANSFORMS, Augment
from jaxmodels.errors import UserError

CENTER = 7 / 8
"""Fraction of the sides that evaluation sees if training crops."""

_AREA, _RATIO, _LEFT, _TOP, _FLIP, _DX, _DY, _TURN, _TINT, _HOLE_X, _HOLE_Y, _DRAWN = (
    0,
    1,
    2,
    3,
    4,
    5,
    6,
    7,
    8,
    11,
    12,
    13,
)
_STREAM = 0x1F83D9ABFB41BD6B  # makes these numbers independent of those of the order
_WIDEST = math.log(4 / 3)


def draws(seed: int, epochs: np.ndarray, indices: np.ndarray, count: int) -> np.ndarray:
    """Draw uniform numbers in [0, 1), float64 (B, count); a row depends on its (seed, epoch, index) alone."""
    key = mix(mix(epochs.astype(np.uint64)) + np.uint64((seed ^ _STREAM) % 2**64))
    key = mix(key ^ mix(indices.astype(np.uint64)))
    words = mix(key[:, None] + np.arange(count, dtype=np.uint64) * np.uint64(0xD1B54A32D192ED03))
    return (words >> np.uint64(11)) * 2.0**-53


def needed(cfg: Augment) -> int:
    """Return how many numbers a row of `draws` must hold."""
    return _DRAWN + 2 * cfg.randaugment


def check_channels(cfg: Augment, channels: int) -> None:
    """Raise UserError if images with this many channels cannot be augmented in this way."""
    if channels not in (1, 3) and len(describe(cfg)) > len(cfg.transforms):
        raise UserError(
            f"got a model of images of {channels} channels to augment, expected 1 (gray) or 3 (RGB), "
            f"try without {', '.join(describe(cfg))}"
        )


def check_marks(cfg: Augment) -> None:
    """Raise UserError if pixels would be moved in a way that what is marked on them could not follow."""
    if cfg.randaugment or cfg.transforms:
        raise UserError(
            f"got augment {'randaugment' if cfg.randaugment else 'transforms'} for images with marks, which may move "
            "pixels and leave the marks behind, expected crop, flip, shift, rotate, colour or cutout, try "
            f"--augment.{'randaugment 0' if cfg.randaugment else 'transforms'}"
        )


def together(cfg: Augment) -> bool:
    """Whether `augment_all` covers everything configured."""
    return cfg.crop is None and not cfg.colour and not cfg.randaugment


def describe(cfg: Augment) -> list[str]:
    """Describe each augmentation in a few words."""
    settings = {
        f"crop {cfg.crop}": cfg.crop,
        "flip": cfg.flip,
        f"shift {cfg.shift}": cfg.shift,
        f"rotate {cfg.rotate:g}": cfg.rotate,
        f"colour {cfg.colour}": cfg.colour,
        f"randaugment {cfg.randaugment} of {cfg.magnitude:g}": cfg.randaugment,
        f"cutout {cfg.cutout}": cfg.cutout,
    }
    return [text for text, on in settings.items() if on] + list(cfg.transforms)


def apply_own(images: np.ndarray, cfg: Augment, seed: int, epochs: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Apply the user's own functions to images (B, H, W, C), each with random numbers of (seed, epoch, index).

    Raises:
        UserError: one of them returns something other than such an image.
    """
    for name in cfg.transforms:
        change, changed = TRANSFORMS.find(name), []
        for image, epoch, index in zip(images, epochs.tolist(), indices.tolist(), strict=True):
            out = change(image.copy(), np.random.default_rng([seed, epoch, index]))
            if not isinstance(out, np.ndarray) or out.shape != image.shape or out.dtype != np.uint8:
                got = f"{out.dtype} {out.shape}" if isinstance(out, np.ndarray) else f"a {type(out).__name__}"
                raise UserError(f"got {got} from augment.transforms {name}, expected an image uint8 {image.shape}")
            changed.append(out)
        images = np.stack(changed)
    return images


def augment(
    image: Image.Image | Jpeg,
    cfg: Augment,
    shape: tuple[int, int, int],
    row: np.ndarray,
    library: Library = "pillow",
) -> np.ndarray:
    """Augment one image for training, uint8 (H, W, C): crop, resize, and change it by the numbers of a row of `draws`.

    Raises: Unreadable.
    """
    size = shape[:2]
    box = _crop(image.size, cfg.crop, size, row) if cfg.crop is not None else None
    changed = resized(image, size, shape[2], box, library)
    if cfg.shift or cfg.rotate:
        matrix = matrices(cfg, size, row[None])[0]
        changed = as_image(changed).transform(
            (size[1], size[0]), Image.Transform.AFFINE, tuple(matrix.tolist()), BILINEAR
        )
    elif cfg.flip and row[_FLIP] < 0.5:
        changed = mirrored(changed)
    if cfg.colour:
        changed = _tint(as_image(changed), cfg.colour, row[_TINT:])
    if cfg.randaugment:
        changed = _randaugment(as_image(changed), cfg, row[_DRAWN:])
    out = as_array(changed)
    if cfg.cutout:
        out = np.array(out)
        _cut(out, cfg.cutout, row)
    return out


def augment_all(images: np.ndarray, cfg: Augment, rows: np.ndarray) -> np.ndarray:
    """Augment many small images (B, H, W, C) at once, if everything configured can be done `together`.

    Results agree with `augment` to within one level of brightness, at several times the speed: Pillow takes 0.1 ms per
    image, however small.
    """
    size = images.shape[1], images.shape[2]
    if cfg.shift or cfg.rotate:
        images = move(images, matrices(cfg, size, rows))
    else:
        images = images.copy()
        if cfg.flip:
            mirrored = rows[:, _FLIP] < 0.5
            images[mirrored] = images[mirrored, :, ::-1]
    if cfg.cutout:
        for image, row in zip(images, rows, strict=True):
            _cut(image, cfg.cutout, row)
    return images


def center(
    image: Image.Image | Jpeg, cfg: Augment, shape: tuple[int, int, int], library: Library = "pillow"
) -> np.ndarray:
    """Prepare one image for evaluation, uint8 (H, W, C): whole, or the central 7/8 if training crops; resized."""
    box = None if cfg.crop is None else _center(image.size, shape[:2])
    return as_array(resized(image, shape[:2], shape[2], box, library))


def affine(cfg: Augment, full: tuple[int, int], size: Size, row: np.ndarray | None) -> np.ndarray:
    """Return where each pixel of an image of this size comes from in the one of (width, height) that it is made of.

    It is the matrix (6,) of what `augment` does by a row of `draws`, or, without a row, of what `center` does.
    """
    if row is None:
        return scaling(full, size, None if cfg.crop is None else _center(full, size))
    outer = scaling(full, size, None if cfg.crop is None else _crop(full, cfg.crop, size, row))
    return joined(outer, matrices(cfg, size, row[None])[0])


def _center(full: tuple[int, int], size: Size) -> Box:
    """Return the central part that evaluation sees of an image of (width, height)."""
    height, width = size
    scale = CENTER * min(full[0] / width, full[1] / height)
    w, h = width * scale, height * scale
    left, top = (full[0] - w) / 2, (full[1] - h) / 2
    return left, top, left + w, top + h


def _crop(full: tuple[int, int], least: float, size: Size, row: np.ndarray) -> Box:
    """Draw a part of an image of (width, height): uniform area, log-uniform aspect ratio, uniform position.

    The ratio is drawn from those with which the area fits, so that nothing has to be drawn again.
    """
    width, height = full
    shape = width / height
    most = min(1.0, math.exp(_WIDEST) / shape, math.exp(_WIDEST) * shape)
    least = min(least, most)
    area = least + (most - least) * row[_AREA]
    low, high = max(-_WIDEST, math.log(area * shape)), min(_WIDEST, math.log(shape / area))
    ratio = math.exp(low + (high - low) * row[_RATIO])
    w = min(math.sqrt(area * width * height * ratio), width)
    h = min(math.sqrt(area * width * height / ratio), height)
    left, top = (width - w) * row[_LEFT], (height - h) * row[_TOP]
    return left, top, left + w, top + h


def matrices(cfg: Augment, size: Size, rows: np.ndarray) -> np.ndarray:
    """Return where each pixel of flipped, shifted and rotated images comes from: (a, b, c, d, e, f) each, (B, 6).

    x' = ax + by + c and y' = dx + ey + f, in Pillow's coordinates (a pixel's center is at 0.5).
    """
    height, width = size
    angle = np.deg2rad(cfg.rotate) * (2 * rows[:, _TURN] - 1)
    steps = np.floor((2 * cfg.shift + 1) * rows[:, _DX : _DY + 1]) - cfg.shift
    cos, sin = np.cos(angle), np.sin(angle)
    middle = width / 2, height / 2
    across = np.stack([cos, -sin, middle[0] - steps[:, 0] - cos * middle[0] + sin * middle[1]])
    down = np.stack([sin, cos, middle[1] - steps[:, 1] - sin * middle[0] - cos * middle[1]])
    if cfg.flip:
        mirrored = rows[:, _FLIP] < 0.5
        across[:, mirrored] *= -1
        across[2, mirrored] += width
    return np.concatenate([across, down]).T


def move(images: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Warp images (B, H, W, C), reading each pixel where its matrix (B, 6) says, bilinear; black outside."""
    count, height, width, channels = images.shape
    grid_y, grid_x = np.divmod(np.arange(height * width, dtype=np.float32), np.float32(width))
    grid_x, grid_y = grid_x + np.float32(0.5), grid_y + np.float32(0.5)
    m = matrix.astype(np.float32)[:, :, None]
    x = m[:, 0] * grid_x + (m[:, 1] * grid_y + (m[:, 2] - np.float32(0.5)))
    y = m[:, 3] * grid_x + (m[:, 4] * grid_y + (m[:, 5] - np.float32(0.5)))
    inside = (x >= -0.5) & (x < width - 0.5) & (y >= -0.5) & (y < height - 0.5)
    np.clip(x, 0, width - 1, out=x)
    np.clip(y, 0, height - 1, out=y)
    # the last row and column are read as the far ends of those before
    left, top = np.minimum(x.astype(np.intp), max(width - 2, 0)), np.minimum(y.astype(np.intp), max(height - 2, 0))
    x, y = (x - left.astype(np.float32))[..., None], (y - top.astype(np.float32))[..., None]
    at = left + width * (top + (np.arange(count) * height)[:, None])
    flat = np.ascontiguousarray(images).reshape(-1, channels)
    right, down = int(width > 1), width * int(height > 1)
    corners = [flat.take(at + step, axis=0).astype(np.float32) for step in (0, right, down, down + right)]
    above = corners[0] + x * (corners[1] - corners[0])
    below = corners[2] + x * (corners[3] - corners[2])
    out = (above + y * (below - above) + np.float32(0.5)).astype(np.uint8)
    out *= inside[..., None]
    return out.reshape(images.shape)


def _cut(out: np.ndarray, side: int, row: np.ndarray) -> None:
    """Blank a square in place, with its center anywhere in the image (DeVries & Taylor 2017)."""
    top = int(row[_HOLE_Y] * out.shape[0]) - side // 2
    left = int(row[_HOLE_X] * out.shape[1]) - side // 2
    out[max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)] = 0


def _tint(image: Image.Image, most: float, row: np.ndarray) -> Image.Image:
    factors = 1 + (2 * row[:3] - 1) * most
    kinds: Sequence[Callable[[Image.Image], Any]] = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for kind, factor in zip(kinds if image.mode == "RGB" else kinds[:2], factors, strict=False):
        image = kind(image).enhance(max(float(factor), 0.0))
    return image


@dataclass(frozen=True)
class Operation:
    """One of RandAugment's operations: `apply(image, strength)`, with strength in [-1, 1] (0: unchanged)."""

    name: str
    apply: Callable[[Image.Image, float], Image.Image]
    color: bool = False
    """Whether it has no effect on a gray image."""


def _enhance(name: str, kind: Callable[[Image.Image], Any], color: bool = False) -> Operation:
    return Operation(name, lambda image, s: kind(image).enhance(1 + 0.9 * s), color)


def _affine(name: str, matrix: Callable[[Image.Image, float], tuple[float, ...]]) -> Operation:
    def apply(image: Image.Image, s: float) -> Image.Image:
        return image.transform(image.size, Image.Transform.AFFINE, matrix(image, s), BILINEAR)

    return Operation(name, apply)


OPERATIONS = (
    Operation("identity", lambda image, s: image),
    Operation("autocontrast", lambda image, s: ImageOps.autocontrast(image)),
    Operation("equalize", lambda image, s: ImageOps.equalize(image)),
    Operation("rotate", lambda image, s: image.rotate(30 * s, BILINEAR)),
    Operation("solarize", lambda image, s: ImageOps.solarize(image, round(256 * (1 - abs(s))))),
    Operation("posterize", lambda image, s: ImageOps.posterize(image, 8 - round(4 * abs(s)))),
    _enhance("color", ImageEnhance.Color, color=True),
    _enhance("contrast", ImageEnhance.Contrast),
    _enhance("brightness", ImageEnhance.Brightness),
    _enhance("sharpness", ImageEnhance.Sharpness),
    _affine("shear x", lambda image, s: (1, 0.3 * s, -0.15 * s * image.height, 0, 1, 0)),
    _affine("shear y", lambda image, s: (1, 0, 0, 0.3 * s, 1, -0.15 * s * image.width)),
    _affine("translate x", lambda image, s: (1, 0, 0.45 * s * image.width, 0, 1, 0)),
    _affine("translate y", lambda image, s: (1, 0, 0, 0, 1, 0.45 * s * image.height)),
)
"""The 14 operations, with the ranges of AutoAugment (Cubuk et al. 2019, table 6); either sign where it matters."""

_GRAY = tuple(operation for operation in OPERATIONS if not operation.color)


def _randaugment(image: Image.Image, cfg: Augment, row: np.ndarray) -> Image.Image:
    known = OPERATIONS if image.mode == "RGB" else _GRAY
    for which, sign in row.reshape(-1, 2)[: cfg.randaugment]:
        strength = cfg.magnitude / 10 * (1 if sign < 0.5 else -1)
        image = known[int(which * len(known))].apply(image, strength)
    return image
