"""Segment images with a saved run: masks of an image's own size, and the files that they are written to."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jaxmodels.data import pixels
from jaxmodels.data.marks import values_of
from jaxmodels.generate.classes import class_names
from jaxmodels.generate.prepare import Answer, Answers, images
from jaxmodels.tasks.segmentation import resized
from jaxmodels.train.saved import Run

COLORS = (
    (31, 111, 180), (217, 84, 30), (42, 157, 78), (143, 75, 179), (184, 134, 11), (23, 160, 173), (212, 65, 142),
    (85, 85, 85), (158, 202, 60), (120, 60, 30),
)  # fmt: skip
"""Of a mask's values, over and over."""


def whole(run: Run) -> Callable[[Any], Any]:
    """Return the function that turns the bytes of an image file into the pixels of all of it, and its own size."""
    cfg = run.config
    uncropped = dataclasses.replace(run, config=dataclasses.replace(cfg, augment=type(cfg.augment)()))
    seen, library = images(uncropped), cfg.data.pixels

    def ready(value: Any) -> Any:
        return {**seen(value), "size": np.array(pixels.size_of(pixels.decode(value, library)))}

    return ready


def masker(run: Run) -> Answers:
    """Answer with the likeliest class of each pixel, as the value that it has in masks, and each class's share."""
    task: Any = run.config.task
    names, size = class_names(run), run.model.inputs(1)[0].shape[1:3]
    values = np.array(values_of(len(names), task.ignored), np.uint8)

    @jax.jit
    def shares(params: Any, inputs: Any) -> jax.Array:
        logits = run.apply(run.inputs({"inputs": inputs})[0], params=params)
        return jax.nn.softmax(resized(logits.astype(jnp.float32), size))

    def answers(ready: Sequence[Any]) -> list[Answer]:
        found = np.asarray(shares(run.params["model"], np.stack([each["inputs"] for each in ready])))
        return [one(row, each["size"]) for row, each in zip(found, ready, strict=True)]

    def one(row: np.ndarray, full: np.ndarray) -> Answer:
        if not np.isfinite(row).all():
            return {"error": "the model's probabilities are no finite numbers"}
        chosen = likeliest(row, (int(full[0]), int(full[1])))
        counts = np.bincount(chosen.ravel(), minlength=len(names)) / chosen.size
        listed = {name: round(float(share), 6) for name, share in zip(names, counts, strict=True) if share}
        return {"mask": values[chosen], "shares": listed}

    return answers


def likeliest(shares: np.ndarray, full: tuple[int, int]) -> np.ndarray:
    """Return the likeliest class of each pixel of an image of (width, height), from shares (h, w, C), bilinear."""
    best = np.full(full[::-1], -1.0, np.float32)
    chosen = np.zeros(full[::-1], np.intp)
    for number in range(shares.shape[-1]):  # one class at a time, which is all that a large image has room for
        own = np.asarray(Image.fromarray(shares[..., number].astype(np.float32)).resize(full, pixels.BILINEAR))
        better = own > best
        best[better], chosen[better] = own[better], number
    return chosen


def encoded(mask: np.ndarray) -> bytes:
    """Return a mask (H, W) as a PNG whose pixels are its values, with a palette for the eye."""
    image = Image.fromarray(mask)
    image.putpalette([level for value in range(256) for level in COLORS[value % len(COLORS)]])
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


class Folder:
    """A folder that masks are written to, each under the name of its image."""

    def __init__(self, path: Path) -> None:
        self.path, self._names = path, set[str]()
        path.mkdir(parents=True, exist_ok=True)

    def keep(self, answer: Answer) -> Answer:
        """Write an answer's mask, if it has one, and return the answer with the path of the file in its place."""
        if "mask" not in answer:
            return answer
        path, row = Path(answer["where"]), ""
        if ":" in path.name:  # a row of a table
            path, row = path.with_name(path.name.rpartition(":")[0]), f"-{path.name.rpartition(':')[2]}"
        name = stem = f"{path.stem}{row}"
        count = 1
        while name in self._names:  # images of the same name in several folders
            count += 1
            name = f"{stem}-{count}"
        self._names.add(name)
        file = self.path / f"{name}.png"
        file.write_bytes(encoded(answer["mask"]))
        return {**answer, "mask": str(file)}
