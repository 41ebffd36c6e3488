"""How a record becomes the inputs of a saved run's model, to be answered."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxmodels.data import given, pixels, texts, transforms
from jaxmodels.data.files import shown
from jaxmodels.data.section import Augment
from jaxmodels.data.tokenizer import Tokenizer
from jaxmodels.errors import UserError
from jaxmodels.train.saved import Run

Answer = dict[str, Any]
Answers = Callable[[Sequence[Any]], Sequence[Answer]]
"""Computes the answers for a batch of prepared records."""
Predictor = tuple[Callable[[Any], Any], Answers]
"""The function that prepares a value, and the one that answers a batch of them."""


class Options(NamedTuple):
    """Options of the command that some answers depend on."""

    tokens: int
    """Largest number of tokens to continue a text by."""
    beams: int | None = None
    """Width of the beam search; by default that of the imported files, or 4."""


def kind_of(run: Run) -> given.Kind:
    """Return what a run's model reads."""
    if run.config.task.answers == "transcript":
        return "audio"
    if run.kept.kind == "array":  # of items too, whose numbers are no tokens of a text
        return "array"
    if run.config.task.answers in ("answer", "extract", "reply"):
        return "record"
    if "model" in run.networks and np.issubdtype(run.model.inputs(1)[0].dtype, np.integer):
        return "text"
    return "array" if len(shape_of(run)) != 3 else "image"


def reader(run: Run) -> Callable[[Any], Any]:
    """Return the function that turns a record into a row of each of a classifier's inputs."""
    kind = kind_of(run)
    if kind == "text":
        return whole_text(tokenizer_of(run), run.config.data.seq_len)
    return images(run) if kind == "image" else array(shape_of(run))


def whole_text(tokenizer: Tokenizer, length: int) -> Callable[[Any], Any]:
    """Return the function that turns a text into a row of tokens, cut or padded to a length."""

    def ready(value: Any) -> Any:
        rows = texts.single(tokenizer.encode_many([text_of(value)], special=True, length=length), length)
        return {name: row[0] for name, row in rows.items()}

    return ready


def images(run: Run) -> Callable[[Any], Any]:
    """Return the function that turns the bytes of an image file into pixels of a run's shape."""
    return image(shape_of(run), run.config.data.pixels, run.config.augment.crop is not None)


def image(shape: tuple[int, ...], library: pixels.Library, cropped: bool) -> Callable[[Any], Any]:
    """Return the function that turns the bytes of an image file into pixels of a shape; `cropped`: of its middle."""
    crop = Augment(crop=1.0 if cropped else None)
    pixels.check_library(library)
    height, width, channels = shape

    def ready(value: Any) -> Any:
        if not isinstance(value, bytes):
            raise UserError(f"is {shown(value)}, expected an image")
        found = pixels.decode(value, library)
        return {"inputs": transforms.center(found, crop, (height, width, channels), library)}

    return ready


def array(shape: tuple[int, ...]) -> Callable[[Any], Any]:
    """Return the function that turns numbers, or their JSON, into an array of a shape."""

    def ready(value: Any) -> Any:
        try:
            numbers = np.asarray(json.loads(value) if isinstance(value, str) else value, np.float32)
        except (ValueError, TypeError, RecursionError):
            raise UserError(f"is {shown(value)}, expected numbers") from None
        if numbers.shape != shape:
            raise UserError(f"has the shape {numbers.shape}, expected {shape}")
        if not np.isfinite(numbers).all():
            raise UserError("has numbers that are not finite, expected finite ones")
        return {"inputs": numbers}

    return ready


def tokenizer_of(run: Run) -> Tokenizer:
    """Return the run's tokenizer.

    Raises: UserError if it has none.
    """
    if run.tokenizer is None:
        raise UserError(f"got {run.directory} without a tokenizer, expected a run that was trained on texts")
    return run.tokenizer


def shape_of(run: Run) -> tuple[int, ...]:
    """Return the shape of one example of numbers or pixels."""
    return tuple(run.networks[next(iter(run.networks))].inputs(1)[0].shape[1:])


def text_of(value: Any) -> str:
    """Return a record that is a text.

    Raises: UserError if it is none.
    """
    if not isinstance(value, str):
        raise UserError(f"is {shown(value)}, expected text")
    if re.search(r"[\ud800-\udfff]", value):
        raise UserError("has half of a surrogate pair, expected text of UTF-8")
    if not value.strip():
        raise UserError("is blank, expected text")
    return value
