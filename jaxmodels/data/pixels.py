"""From a stored image to pixels of one size, by Pillow or OpenCV."""

from __future__ import annotations

import importlib.util
import io
import math
from typing import Literal, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from jaxmodels.errors import UserError

Size = tuple[int, int]
"""Height and width."""
Box = tuple[float, float, float, float]
"""Left, top, right and bottom."""
Library = Literal["pillow", "opencv"]
"""Library that decodes JPEG and resizes (`data.pixels`)."""

BILINEAR = Image.Resampling.BILINEAR

_FRAMES = (0xC0, 0xC1, 0xC2)
_TABLES = (0xC4, 0xDB, 0xDD, 0xE0, 0xFE)  # and JFIF's own, and comments; not EXIF, several pictures, other colors


class Unreadable(Exception):
    """An image cannot be decoded; the message says why."""


def check_library(library: Library) -> None:
    """Raise UserError if the library's packages are not installed."""
    if library == "opencv":
        for package, name in (("cv2", "opencv-python-headless"), ("simplejpeg", "simplejpeg")):
            if importlib.util.find_spec(package) is None:
                raise UserError(
                    f"got no package {name}, expected it for data.pixels opencv, "
                    "try pip install 'jaxmodels[opencv]' or --data.pixels pillow"
                )


class Jpeg(NamedTuple):
    """A JPEG, gray or of three colors and stored upright, which need not be opened with Pillow."""

    data: bytes
    size: tuple[int, int]
    """Width and height."""


def decode(value: bytes | np.ndarray, library: Library = "pillow") -> Image.Image | Jpeg:
    """Open an encoded image (its pixels are read on demand) or an array (H, W, C).

    An image stored rotated or mirrored according to EXIF is turned upright.
    Raises: Unreadable.
    """
    try:
        if isinstance(value, np.ndarray):
            return as_image(value)
        if library == "opencv" and (size := _plain(value)):
            return Jpeg(value, size)
        image = Image.open(io.BytesIO(value))
        upright = _upright(image)
        if library == "opencv" and upright is image and image.format == "JPEG" and image.mode in ("L", "RGB"):
            return Jpeg(value, image.size)
        return upright
    except Exception as error:
        raise Unreadable(_reason(error)) from error


def _plain(data: bytes) -> tuple[int, int] | None:
    """Return width and height of a JPEG of one or three colors whose header needs no interpretation.

    Source: ITU-T T.81, annex B.
    """
    at = 2 if data.startswith(b"\xff\xd8") else len(data)
    while at + 10 < len(data):
        kind, length = data[at + 1], data[at + 2] << 8 | data[at + 3]
        if data[at] == 0xFF and kind in _FRAMES:
            size = data[at + 7] << 8 | data[at + 8], data[at + 5] << 8 | data[at + 6]
            return size if data[at + 9] in (1, 3) and all(size) else None
        if data[at] != 0xFF or kind not in _TABLES:
            return None
        at += 2 + length
    return None


def _upright(image: Image.Image) -> Image.Image:
    if "exif" not in image.info:
        return image
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation) in range(2, 9)
    except Exception:  # broken tags do not affect the pixels
        return image
    if not turned:
        return image
    del image.info["exif"]  # or all tags would be rewritten, which fails if one is malformed
    return ImageOps.exif_transpose(image)


def _reason(error: Exception) -> str:
    known = "no image that Pillow knows" if isinstance(error, UnidentifiedImageError) else str(error)
    return " ".join(known.split()) or type(error).__name__


def resized(
    image: Image.Image | Jpeg, size: Size, channels: int, box: Box | None = None, library: Library = "pillow"
) -> Image.Image | np.ndarray:
    """Resize the part `box` of an image, or all of it, with 1 or 3 channels: a Pillow image or an OpenCV array.

    A JPEG is decoded at 1/2, 1/4 or 1/8 if that leaves the requested pixels, with equal results in both libraries. Then
    Pillow averages everything that a pixel of the result covers. OpenCV uses the four nearest pixels if a side shrinks
    to more than half, and rounds the box to whole pixels.

    Raises: Unreadable.
    """
    full, target = image.size, (size[1], size[0])
    left, top, right, bottom = box or (0.0, 0.0, float(full[0]), float(full[1]))
    least = math.ceil(full[0] * target[0] / (right - left)), math.ceil(full[1] * target[1] / (bottom - top))
    mode = "L" if channels == 1 else "RGB"
    try:
        if library == "opencv" or isinstance(image, Jpeg):
            read = _read(image, mode, least)
            return _by_opencv(read, read.shape[1] / full[0], size, (left, top, right, bottom))
        if image.format == "JPEG":
            image.draft(mode, least)
        image.load()
        image = _converted(image, mode)
    except Exception as error:
        raise Unreadable(_reason(error)) from error
    if box is None:
        return image if image.size == target else image.resize(target, BILINEAR)
    x, y = image.width / full[0], image.height / full[1]
    part = (left * x, top * y, min(right * x, image.width), min(bottom * y, image.height))
    return image.resize(target, BILINEAR, box=part)


def _read(image: Image.Image | Jpeg, mode: str, least: Size) -> np.ndarray:
    """Read all pixels (H, W, C), of a JPEG perhaps at 1/2, 1/4 or 1/8, with at least this width and height."""
    if isinstance(image, Jpeg):
        import simplejpeg

        width, height = image.size
        factor = 1 << max(min(8, width // least[0], height // least[1]).bit_length() - 1, 0)
        smaller = -(-height // factor), -(-width // factor)
        try:
            return simplejpeg.decode_jpeg(image.data, "GRAY" if mode == "L" else "RGB", False, False, *smaller)
        except ValueError:  # it refuses any irregularity; Pillow reads what can be read
            image = Image.open(io.BytesIO(image.data))
    return as_array(_converted(image, mode))


def _converted(image: Image.Image, mode: str) -> Image.Image:
    """Convert an image to 8-bit L or RGB, keeping the upper bits of 16, as Pillow itself does for colors of 16 bits.

    An alpha channel is dropped, not blended with a background that nobody has chosen.
    Raises: Unreadable if nothing says which value is white.
    """
    if image.mode == mode:
        return image
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        wide = np.asarray(image)
        if wide.dtype.kind == "u" or (wide.min() >= 0 and wide.max() < 1 << 16):
            return Image.fromarray((wide >> 8).astype(np.uint8)).convert(mode)
    if image.mode[0] in "IF":
        raise Unreadable(f"has pixels of the kind {image.mode}, expected 8 or 16 bits, for which white is defined")
    return image.convert(mode)


def _by_opencv(pixels: np.ndarray, scale: float, size: Size, box: Box) -> np.ndarray:
    """Resize the part `box` of an image from all its pixels at a scale."""
    import cv2

    height, width = pixels.shape[:2]
    left, top = min(round(box[0] * scale), width - 1), min(round(box[1] * scale), height - 1)
    part = pixels[top : max(round(box[3] * scale), top + 1), left : max(round(box[2] * scale), left + 1)]
    if part.shape[:2] == size:
        return part
    halved = part.shape[0] >= 2 * size[0] and part.shape[1] >= 2 * size[1]
    out = cv2.resize(part, size[::-1], interpolation=cv2.INTER_AREA if halved else cv2.INTER_LINEAR)
    return out.reshape(*size, -1)


def size_of(image: Image.Image | Jpeg | np.ndarray) -> tuple[int, int]:
    """Return width and height of an opened image or an array (H, W, C)."""
    return (image.shape[1], image.shape[0]) if isinstance(image, np.ndarray) else image.size


def mirrored(image: Image.Image | np.ndarray) -> Image.Image | np.ndarray:
    """Mirror an image left to right."""
    if isinstance(image, Image.Image):
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    import cv2

    return cv2.flip(image, 1).reshape(image.shape)


def as_image(pixels: Image.Image | np.ndarray) -> Image.Image:
    """Convert an array (H, W, C) to an image."""
    if isinstance(pixels, Image.Image):
        return pixels
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def as_array(image: Image.Image | np.ndarray) -> np.ndarray:
    """Convert a gray or RGB image to uint8 (H, W, C)."""
    out = np.asarray(image)
    return out[..., None] if out.ndim == 2 else out
