"""Files in MNIST's own format: `train-images-idx3-ubyte`, `t10k-labels-idx1-ubyte`, packed by gzip or not."""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.data.records import (
    Bad,
    Field,
    Records,
    check_fraction,
    check_some,
    check_unused_fraction,
    digest,
    hash_fraction,
)  # fmt: skip
from jaxmodels.data.section import FilesConfig
from jaxmodels.data.source import Split
from jaxmodels.errors import UserError

_NAME = re.compile(r"(.*?)(train|t10k|test)-images[-.]idx3-ubyte(\.gz)?")


def found(root: Path) -> bool:
    """Whether a folder holds such files."""
    return any(_NAME.fullmatch(path.name) for path in root.iterdir())


def records(root: Path, cfg: FilesConfig, split: Split) -> Records:
    """Open the training images, or those of the files t10k or test; without these, the images that a hash holds out.

    Raises: UserError if a file is not in the format, or images and labels do not match.
    """
    if cfg.eval_path:
        raise UserError(
            f"got data.eval_path {cfg.eval_path[0]!r} for the idx files of {root}, expected them to hold their own "
            "set to evaluate on, try without --data.eval-path"
        )
    parts = {match[2]: path for path in sorted(root.iterdir()) if (match := _NAME.fullmatch(path.name))}
    if "train" not in parts:
        raise UserError(f"got {root} without train-images-idx3-ubyte, expected it, try another --data.path")
    if len(files := [path.name for path in root.iterdir() if _NAME.fullmatch(path.name)]) > len(parts):
        raise UserError(
            f"got {root} with {', '.join(sorted(files))}, expected one set, try a folder of its own for each"
        )
    names = tuple(map(str, range(1 + int(_labels(parts["train"]).max(initial=0)))))
    held_out = parts.get("t10k", parts.get("test"))
    images = parts["train"] if split == "train" or held_out is None else held_out
    pixels, labels = _read(images, 3), _labels(images)
    if len(pixels) != len(labels):
        raise UserError(
            f"got {len(pixels):,} images in {images} and {len(labels):,} labels, expected as many of each, "
            "try getting both files anew"
        )
    if held_out is not None:
        check_unused_fraction(cfg, f"evaluation has {held_out.name}")
    else:
        check_fraction(cfg.eval_fraction)
        places = np.array([hash_fraction(image.tobytes()) for image in pixels])
        chosen = (places < cfg.eval_fraction) == (split == "eval")
        pixels, labels = pixels[chosen], labels[chosen]
    made = _Set(pixels, labels, names, f"images of {images.name}")
    check_some(made, split)
    return made


class _Set(Records):
    apart = True

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, names: tuple[str, ...], label: str) -> None:
        self._pixels, self._labels, self.label = pixels, labels, label
        self.fields = {"image": Field("image", shape=(*pixels.shape[1:], 1)), "label": Field("label", names)}
        self.fingerprint = digest(pixels.tobytes() + labels.tobytes())

    def __len__(self) -> int:
        return len(self._labels)

    def read(self, indices: Sequence[int], fields: Sequence[str]) -> list[dict[str, Any] | Bad]:
        values = {"image": lambda i: self._pixels[i, ..., None], "label": lambda i: int(self._labels[i])}
        return [{name: values[name](i) for name in fields} for i in indices]


def _labels(images: Path) -> np.ndarray:
    """Read the labels that belong to a file of images."""
    plain = images.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    path = next((p for n in (plain, f"{plain}.gz") if (p := images.with_name(n)).is_file()), None)
    if path is None:
        raise UserError(f"got {images} without {plain} beside it, expected the labels of the images there")
    return _read(path, 1)


def _read(path: Path, dimensions: int) -> np.ndarray:
    """Read an array of bytes: two zeros, 8 for bytes, the number of dimensions, their sizes (4 bytes each), the values.

    Source: LeCun et al., the MNIST database of handwritten digits.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.name.endswith(".gz") else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"got {path}, which cannot be unpacked ({error}), expected gzip, try getting it anew") from None
    head = 4 + 4 * dimensions
    shape = tuple(np.frombuffer(raw[4:head], ">u4").tolist()) if len(raw) >= head else ()
    if raw[:4] != bytes((0, 0, 8, dimensions)) or len(raw) - head != int(np.prod(shape, dtype=object)):
        raise UserError(
            f"got {path} of {len(raw):,} bytes that begins with {raw[:4].hex()}, expected bytes in {dimensions} "
            f"dimensions ({bytes((0, 0, 8, dimensions)).hex()}) as many as it says, try getting it anew"
        )
    return np.frombuffer(raw, np.uint8, offset=head).reshape(shape)
