"""From an image as it is stored to pixels of one size, by Pillow or by OpenCV."""

from __future__ import annotations

import importlib.util
import io
import math
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from jaxmodels.errors import UserError

Size = tuple[int, int]
"""Height and width."""
Box = tuple[float, float, float, float]
"""Left, top, right and bottom."""
Library = Literal["pillow", "opencv"]
"""What decodes JPEG and resizes (`data.pixels`)."""

BILINEAR = Image.Resampling.BILINEAR


class Unreadable(Exception):
    """What was to be an image can't be decoded; says why."""


def check(library: Library) -> None:
    """Raises UserError where its packages are not installed."""
    if library == "opencv":
        for package, name in (("cv2", "opencv-python-headless"), ("simplejpeg", "simplejpeg")):
            if importlib.util.find_spec(package) is None:
                raise UserError(
                    f"got no package {name}, expected it for data.pixels opencv, "
                    "try pip install 'jaxmodels[opencv]' or --data.pixels pillow"
                )


def decode(value: bytes | np.ndarray) -> Image.Image:
    """The image of encoded bytes (its pixels are read when first asked for) or of an array (H, W, C).

    One that EXIF says is stored turned or mirrored is turned upright.
    Raises: Unreadable.
    """
    try:
        if isinstance(value, np.ndarray):
            return as_image(value)
        return _upright(Image.open(io.BytesIO(value)))
    except Exception as error:
        raise Unreadable(_reason(error)) from error


def _upright(image: Image.Image) -> Image.Image:
    if "exif" not in image.info:
        return image
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation) in range(2, 9)
    except Exception:  # broken tags say nothing of the pixels
        return image
    if not turned:
        return image
    del image.info["exif"]  # or all tags would be written anew, which fails where one of them is odd
    return ImageOps.exif_transpose(image)


def _reason(error: Exception) -> str:
    known = "no image that Pillow knows" if isinstance(error, UnidentifiedImageError) else str(error)
    return " ".join(known.split()) or type(error).__name__


def resized(
    image: Image.Image, size: Size, channels: int, box: Box | None = None, library: Library = "pillow"
) -> Image.Image | np.ndarray:
    """The part `box` of an image, or all of it, at a size and with 1 or 3 channels: Pillow's image or OpenCV's array.

    A JPEG is decoded at 1/2, 1/4 or 1/8 where what is left still has the pixels asked for, to the same pixels by either
    library. Then Pillow averages all that one pixel of the result covers; OpenCV takes the four nearest, where a side
    shrinks to more than half, and rounds the box to whole pixels.

    Raises: Unreadable.
    """
    full, target = image.size, (size[1], size[0])
    left, top, right, bottom = box or (0.0, 0.0, float(full[0]), float(full[1]))
    least = math.ceil(full[0] * target[0] / (right - left)), math.ceil(full[1] * target[1] / (bottom - top))
    mode = "L" if channels == 1 else "RGB"
    try:
        if library == "opencv":
            read = _read(image, mode, least)
            return _by_opencv(read, read.shape[1] / full[0], size, (left, top, right, bottom))
        if image.format == "JPEG":
            image.draft(mode, least)
        image.load()
        image = image if image.mode == mode else image.convert(mode)
    except Exception as error:
        raise Unreadable(_reason(error)) from error
    if box is None:
        return image if image.size == target else image.resize(target, BILINEAR)
    x, y = image.width / full[0], image.height / full[1]
    part = (left * x, top * y, min(right * x, image.width), min(bottom * y, image.height))
    return image.resize(target, BILINEAR, box=part)


def _read(image: Image.Image, mode: str, least: Size) -> np.ndarray:
    """All pixels (H, W, C); of a JPEG perhaps at 1/2, 1/4 or 1/8, with at least this width and height."""
    if isinstance(image, ImageFile.ImageFile) and image.format == "JPEG" and image.mode in ("L", "RGB"):
        import simplejpeg

        factor = 1 << max(min(8, image.width // least[0], image.height // least[1]).bit_length() - 1, 0)
        width, height = -(-image.width // factor), -(-image.height // factor)
        colours = "GRAY" if mode == "L" else "RGB"
        assert isinstance(image.fp, io.BytesIO)
        try:
            return simplejpeg.decode_jpeg(image.fp.getvalue(), colours, min_width=width, min_height=height)
        except ValueError:
            pass  # it refuses all that is not quite right; what of that can be read, Pillow reads
    return as_array(image if image.mode == mode else image.convert(mode))


def _by_opencv(pixels: np.ndarray, scale: float, size: Size, box: Box) -> np.ndarray:
    """The part `box` of an image, at a size, from all its pixels at a scale."""
    import cv2

    height, width = pixels.shape[:2]
    x0, y0, x1, y1 = (round(edge * scale) for edge in box)
    left, top = min(x0, width - 1), min(y0, height - 1)
    part = pixels[top : max(y1, top + 1), left : max(x1, left + 1)]
    if part.shape[:2] == size:
        return part
    halved = part.shape[0] >= 2 * size[0] and part.shape[1] >= 2 * size[1]
    out = cv2.resize(part, size[::-1], interpolation=cv2.INTER_AREA if halved else cv2.INTER_LINEAR)
    return out.reshape(*size, -1)


def mirrored(image: Image.Image | np.ndarray) -> Image.Image | np.ndarray:
    """Left for right."""
    if isinstance(image, Image.Image):
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    import cv2

    return cv2.flip(image, 1).reshape(image.shape)


def as_image(pixels: Image.Image | np.ndarray) -> Image.Image:
    """Of an array (H, W, C)."""
    if isinstance(pixels, Image.Image):
        return pixels
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def as_array(image: Image.Image | np.ndarray) -> np.ndarray:
    """Of a grey or RGB image, uint8 (H, W, C)."""
    out = np.asarray(image)
    return out[..., None] if out.ndim == 2 else out
