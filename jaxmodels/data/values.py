"""Values of records, held against what their `Field` says."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxmodels.data.files import shown

if TYPE_CHECKING:
    from jaxmodels.data.records import Field, Kind

EMPTY = "is an empty text"
_MOST_CLASSES = 2**31
"""Class numbers are int32 in a batch."""
_GREATEST = float(np.finfo(np.float32).max)


class Span(NamedTuple):
    """A part of a text beside it, such as an answer in its context."""

    text: str
    start: int
    """The character at which it begins."""


def unfit(name: str, value: Any, field: Field) -> str:
    """Return why a value does not match its field, empty if it does.

    Where classes have names, a label of -1 is an unknown one, as both TFDS and the library `datasets` write it. Without
    names, numbers below 0 are refused by `fields.numbered`, which sees all of them.
    """
    return _CHECKS[field.kind](name, value, field)


def _text(name: str, value: Any, field: Field) -> str:
    if not isinstance(value, str):
        return f"{name} is {shown(value)}, expected text"
    if not value or value.isspace():
        return EMPTY
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        return f"{name} has half of a surrogate pair, which is no character"
    return ""


def _image(name: str, value: Any, field: Field) -> str:
    if isinstance(value, bytes):
        return ""
    if not isinstance(value, np.ndarray):
        return f"{name} is {shown(value)}, expected the bytes of an image file, or an array of uint8"
    if value.dtype != np.uint8 or value.ndim != 3 or not value.size:
        return f"{name} is {value.dtype} of the shape {value.shape}, expected uint8 (height, width, channels)"
    return _shape(name, value, field) if field.shape else ""


def _audio(name: str, value: Any, field: Field) -> str:
    if isinstance(value, bytes):
        return ""
    samples, rate = value if isinstance(value, tuple) and len(value) == 2 else (None, None)
    if not isinstance(samples, np.ndarray) or not isinstance(rate, numbers.Integral) or not 0 < int(rate) < 1 << 20:
        return f"{name} is {shown(value)}, expected the bytes of a sound file, or Sound(samples, rate)"
    if samples.dtype not in (np.int16, np.float32) or samples.ndim not in (1, 2) or not samples.size:
        return f"{name} is {samples.dtype} of the shape {samples.shape}, expected int16 or float32 (samples,)"
    return "" if np.isfinite(samples).all() else f"{name} has samples that are no finite numbers"


def _mask(name: str, value: Any, field: Field) -> str:
    if isinstance(value, bytes):
        return ""
    if not isinstance(value, np.ndarray):
        return f"{name} is {shown(value)}, expected the bytes of an image file, or an array of uint8"
    if value.dtype != np.uint8 or value.ndim != 2 or not value.size:
        return f"{name} is {value.dtype} of the shape {value.shape}, expected uint8 (height, width)"
    return _shape(name, value, field) if field.shape else ""


def _spans(name: str, value: Any, field: Field) -> str:
    if not isinstance(value, tuple) or not all(isinstance(each, tuple) and len(each) == 2 for each in value):
        return f"{name} is {shown(value)}, expected a tuple of parts of a text, each with the character it begins at"
    for text, start in value:
        if not isinstance(text, str) or not text.strip() or type(start) is not int or start < 0:
            return f"{name} holds {shown(text)} at {shown(start)}, expected a part of a text and a number from 0"
    return ""


def _boxes(name: str, value: Any, field: Field) -> str:
    if not isinstance(value, np.ndarray) or value.ndim != 2 or value.shape[1] != 5 or not number_dtype(value.dtype):
        return f"{name} is {shown(value)}, expected numbers (boxes, 5): left, top, width, height and class"
    if not np.isfinite(value).all():
        return f"{name} holds {value[~np.isfinite(value)].flat[0]}, expected finite numbers"
    if (flat := (value[:, 2:4] <= 0).any(1)).any():
        return f"{name} has the box {value[flat][0, :4].tolist()}, expected a width and a height above 0"
    known = len(field.names) or _MOST_CLASSES
    if (odd := (value[:, 4] < 0) | (value[:, 4] >= known) | (value[:, 4] % 1 != 0)).any():
        return f"{name} has a box of class {value[odd][0, 4]:g}, expected a class from 0 to {known - 1}"
    return ""


def _texts(name: str, value: Any, field: Field) -> str:
    if not isinstance(value, tuple) or not value:
        return f"{name} is {shown(value)}, expected a tuple of texts"
    return next((wrong for each in value if (wrong := _text(name, each, field))), "")


def _array(name: str, value: Any, field: Field) -> str:
    if not isinstance(value, np.ndarray | np.generic):
        return f"{name} is {shown(value)}, expected an array of {field.dtype or 'numbers'}"
    value = np.asarray(value)
    if wrong := _shape(name, value, field):
        return wrong
    if not number_dtype(value.dtype) or (field.dtype and not np.can_cast(value.dtype, field.dtype, "same_kind")):
        return f"{name} is an array of {value.dtype}, expected {field.dtype or 'numbers'}"
    if value.dtype.kind != "f":
        return ""
    if not np.isfinite(value).all():
        return f"{name} holds {value[~np.isfinite(value)].flat[0]}, expected finite numbers"
    if value.dtype.itemsize > 4 and (large := np.abs(value) > _GREATEST).any():
        return f"{name} holds {value[large].flat[0]}, expected numbers that float32 holds"
    return ""


def _shape(name: str, value: Any, field: Field) -> str:
    sizes = zip(value.shape, field.shape, strict=False)
    if value.ndim != len(field.shape) or any(s not in (None, n) for n, s in sizes):
        return f"{name} has the shape {value.shape}, expected {field.shape}"
    return ""


def _label(name: str, value: Any, field: Field) -> str:
    one, number = field.kind == "label", len(field.names) or _MOST_CLASSES
    least = -number if not field.names else -1 if one else 0
    if not one and not isinstance(value, tuple):
        return f"{name} is {shown(value)}, expected a tuple of classes"
    for label in (value,) if one else value:
        if not isinstance(label, numbers.Integral) or not least <= label < number:  # type: ignore[operator]
            return f"{name} is {shown(label)}, expected a class from 0 to {number - 1}"
    return ""


_CHECKS: dict[Kind, Callable[[str, Any, Field], str]] = {
    "image": _image,
    "text": _text,
    "label": _label,
    "labels": _label,
    "array": _array,
    "audio": _audio,
    "mask": _mask,
    "spans": _spans,
    "boxes": _boxes,
    "texts": _texts,
}


def number_dtype(dtype: np.dtype[Any]) -> bool:
    """Whether arrays of this dtype become float32 inputs."""
    return dtype.kind in "biuf" or dtype.name == "bfloat16"
