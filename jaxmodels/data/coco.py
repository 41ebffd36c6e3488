"""Images with boxes around objects, as COCO's JSON lists them."""

from __future__ import annotations

import functools
import json
import logging
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from jaxmodels.data import corpus, pixels
from jaxmodels.data.files import shown
from jaxmodels.data.records import Bad, Field, Records, check_fraction, check_some, digest, hash_fraction
from jaxmodels.data.section import FilesConfig, RecordsConfig
from jaxmodels.data.source import Split
from jaxmodels.errors import UserError, nearest

_PARTS: dict[str, dict[str, Any]] = {
    "images": {"id": int | str, "file_name": str, "width": int, "height": int},
    "annotations": {"image_id": int | str, "category_id": int, "bbox": object},
    "categories": {"id": int, "name": str},
}
"""The lists of a file, and what is read of each of their entries."""

_log = logging.getLogger("jaxmodels")


@dataclass(frozen=True)
class COCO(RecordsConfig, FilesConfig):
    """Images with boxes in COCO's JSON."""

    evaluated_by: ClassVar[tuple[str, ...]] = ("images",)

    label_field: str = "boxes"
    """Record field that holds the boxes and their classes."""
    images: str = ""
    """Folder that the names of images are relative to. Empty: that of the JSON."""

    def records(self, split: Split) -> Records:
        return records(self, split)


def records(cfg: COCO, split: Split) -> Records:
    """Open the images of `data.path`: the fields image and boxes, the classes in the order of their ids.

    Evaluation has the images of `data.eval_path`, or else those whose file name has a hash below `data.eval_fraction`.
    Its classes are numbered as those of `data.path`, by name.

    Raises: UserError if a file is not COCO's JSON, or one to evaluate on has a class that is not in training.
    """
    train = _open(cfg.path, "path", cfg.images)
    if cfg.eval_path:
        chosen = train if split == "train" else _open(cfg.eval_path, "eval_path", cfg.images, train.names)
    else:
        check_fraction(cfg.eval_fraction)
        inside = [(hash_fraction(each.name.encode()) < cfg.eval_fraction) == (split == "eval") for each in train.images]
        chosen = _Set(train.names, tuple(each for each, here in zip(train.images, inside, strict=True) if here))
    found = _Pictured(" + ".join(cfg.path if chosen is train or not cfg.eval_path else cfg.eval_path), chosen)
    check_some(found, split)
    return found


@dataclass(frozen=True)
class _Image:
    """One image, and what is marked on it: rows of left, top, width, height and class."""

    path: Path
    name: str
    size: tuple[int, int]
    boxes: tuple[tuple[float, ...], ...]
    wrong: str = ""


@dataclass(frozen=True)
class _Set:
    names: tuple[str, ...]
    images: tuple[_Image, ...]


class _Pictured(Records):
    apart = True

    def __init__(self, label: str, found: _Set) -> None:
        self.label, self._images = label, found.images
        self.fields = {"image": Field("image", shape=(None, None, None)), "boxes": Field("boxes", found.names)}
        facts = [(each.name, each.size, each.boxes) for each in found.images]
        self.fingerprint = digest(repr((found.names, facts)).encode())

    def __len__(self) -> int:
        return len(self._images)

    def where(self, index: int) -> str:
        return str(self._images[index].path)

    def read(self, indices: Sequence[int], fields: Sequence[str]) -> list[dict[str, Any] | Bad]:
        return [self._one(self._images[index], fields) for index in indices]

    def _one(self, image: _Image, fields: Sequence[str]) -> dict[str, Any] | Bad:
        if image.wrong:
            return Bad(str(image.path), image.wrong)
        record: dict[str, Any] = {}
        if "boxes" in fields:
            record["boxes"] = np.array(image.boxes, np.float32).reshape(-1, 5)
        if "image" in fields:
            try:
                record["image"] = image.path.read_bytes()
                size = pixels.size_of(pixels.decode(record["image"]))  # of its header alone
            except OSError as error:
                return Bad(str(image.path), error.strerror or "cannot be read")
            except pixels.Unreadable as error:
                return Bad(str(image.path), str(error))
            if size != image.size:
                real = "×".join(map(str, image.size))
                return Bad(str(image.path), f"is {size[0]}×{size[1]}, expected {real} as its boxes are for")
        return record


def _open(paths: Sequence[str], option: str, folder: str, names: Sequence[str] = ()) -> _Set:
    """Read the files of an option; classes are numbered by `names`, or by the first file."""
    found: list[_Image] = []
    for path in corpus.expand(paths, "coco", f"data.{option}"):
        status = path.stat()
        names, images = _read(path, status.st_size, status.st_mtime_ns, folder, tuple(names))
        found += images
    return _Set(tuple(names), tuple(found))


@functools.lru_cache(4)
def _read(
    path: Path, size: int, changed: int, folder: str, names: tuple[str, ...]
) -> tuple[tuple[str, ...], list[_Image]]:
    """Read one file, which is known by its size and the time of its change."""
    content = _content(path)
    classes = _classes(path, content["categories"], names)
    names = names or tuple(name for name, _ in classes.values())
    root = Path(folder).expanduser() if folder else path.parent
    marked: dict[Any, list[tuple[float, ...]]] = {}
    wrong: dict[Any, str] = {}
    left_out: Counter[str] = Counter()
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    _check_ids(path, "images", content["images"])
    for at, each in enumerate(content["annotations"]):
        image = each["image_id"]
        if image not in sizes:
            raise UserError(
                f"got an annotation of image {image!r} in {path}, expected one of its {len(sizes):,} images"
            )
        if each["category_id"] not in classes:
            known = ", ".join(map(str, classes))
            raise UserError(f"got an annotation of category {each['category_id']!r} in {path}, expected one of {known}")
        crowd = each.get("iscrowd", 0)
        if crowd not in (0, 1):
            raise UserError(f"got {path} with {shown(crowd)} as annotations[{at}].iscrowd, expected 0 or 1")
        if crowd:
            left_out["boxes around crowds"] += 1
            continue
        box = each["bbox"]
        if not isinstance(box, list) or len(box) != 4 or not all(map(_finite, box)):
            wrong[image] = f"has the box {shown(box)}, expected left, top, width and height"
            continue
        box = _inside(box, sizes[image])
        if box is None:
            left_out["boxes without an area inside their image"] += 1
        else:
            marked.setdefault(image, []).append((*box, classes[each["category_id"]][1]))
    for what, count in left_out.items():
        _log.warning("left out %s %s of %s", f"{count:,}", what, path)
    images = [
        _Image(root / each["file_name"], each["file_name"], sizes[each["id"]], tuple(marked.get(each["id"], ())),
               wrong.get(each["id"], ""))
        for each in content["images"]
    ]  # fmt: skip
    return names, images


def _content(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Read the lists of a file, whose entries have what is read of them."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"got {path}, which is no JSON ({error}), expected COCO's, try another file") from error
    for part, keys in _PARTS.items():
        entries = content.get(part) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise UserError(f"got {path} without {part}, expected COCO's JSON with {', '.join(_PARTS)}")
        for at, each in enumerate(entries):
            for key, kind in keys.items():
                if not isinstance(each, dict) or not isinstance(each.get(key), kind) or each[key] is None:
                    value = shown(each.get(key)) if isinstance(each, dict) else shown(each)
                    raise UserError(
                        f"got {path} with {value} as {part}[{at}].{key}, expected "
                        f"{'anything' if kind is object else getattr(kind, '__name__', 'a number or a text')}"
                    )
    return content


def _classes(path: Path, categories: Sequence[dict[str, Any]], names: tuple[str, ...]) -> dict[Any, tuple[str, int]]:
    """The name and number of each category's id."""
    _check_ids(path, "categories", categories)
    ordered = sorted(categories, key=lambda each: each["id"])
    own = [str(each["name"]) for each in ordered]
    if twice := [name for name, count in Counter(own).items() if count > 1]:
        raise UserError(f"got two categories {twice[0]!r} in {path}, expected names that differ")
    known = names or tuple(own)
    if strange := [name for name in own if name not in known]:
        raise UserError(
            f"got the category {strange[0]!r} in {path}, expected one of {', '.join(known)}, as in the others"
            f"{nearest(strange[0], known)}"
        )
    return {each["id"]: (name, known.index(name)) for each, name in zip(ordered, own, strict=True)}


def _check_ids(path: Path, part: str, entries: Sequence[dict[str, Any]]) -> None:
    """Refuse entries with one id, of which annotations do not say which they mean."""
    if twice := [each for each, count in Counter(each["id"] for each in entries).items() if count > 1]:
        raise UserError(f"got the id {shown(twice[0])} of two {part} in {path}, expected ids that differ")


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _inside(box: Sequence[float], size: tuple[int, int]) -> tuple[float, ...] | None:
    """Clip a box to its image; None if nothing is left."""
    left, top = max(box[0], 0.0), max(box[1], 0.0)
    right, bottom = min(box[0] + box[2], float(size[0])), min(box[1] + box[3], float(size[1]))
    return (left, top, right - left, bottom - top) if right > left and bottom > top else None
