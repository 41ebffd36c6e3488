"""Folders of images, one folder per class."""

from __future__ import annotations

import functools
import logging
import os
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from jaxmodels.data import idx
from jaxmodels.data.classes import spaced, tell_trimmed
from jaxmodels.data.records import (
    Bad,
    Field,
    Records,
    check_fraction,
    check_some,
    check_unused_fraction,
    digest,
    hash_fraction,
)
from jaxmodels.data.section import DataConfig, FilesConfig, RecordsConfig
from jaxmodels.data.source import Split
from jaxmodels.errors import UserError, nearest

SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm",
)  # fmt: skip
HELD_OUT = ("val", "validation", "test")

_log = logging.getLogger("jaxmodels")


@dataclass(frozen=True)
class Images(RecordsConfig, FilesConfig):
    """A folder with one folder of images per class, or with MNIST's own files."""

    instead: ClassVar[str] = "--data.path FOLDER"

    def records(self, split: Split) -> Records:
        return records(self, split)

    def evaluated_on(self, fields: Mapping[str, Any]) -> DataConfig:
        if any(Path(each).is_dir() and idx.found(Path(each)) for each in fields.get("path", ())):
            fields = {"eval_path": (), **fields}  # such a set defines its own held-out images
        return super().evaluated_on(fields)


def records(cfg: Images, split: Split) -> Records:
    """Open the images of `data.path`, `root/<class>/…/<image>`: fields image and label, classes sorted by name.

    Other files are counted by kind, once. A folder of MNIST's own files is read too (`idx`).

    Evaluation reads the images of `data.eval_path`, or else of the folder val, validation or test beside the folder
    train, or else those whose path below the root has a hash below `data.eval_fraction`.

    Raises: UserError if there are no such folders, or one to evaluate on has a class that is not in training.
    """
    root = _root(cfg.path, "path")
    if idx.found(root):
        return idx.records(root, cfg, split)
    beside = next((root / name for name in HELD_OUT if (root / name).is_dir()), None)
    by_folder = (root / "train").is_dir() and beside is not None and set(_classes(root)) <= {"train", *HELD_OUT}
    if by_folder:
        root, held_out = root / "train", beside
    else:
        held_out = None
    if cfg.eval_path:
        held_out = _root(cfg.eval_path, "eval_path")
    names = _classes(root)
    if not names:
        raise UserError(
            f"got {root} without folders in it, expected one folder of images per class, "
            f"try {root}/NAME_OF_A_CLASS/1.png"
        )
    if held_out is not None and not cfg.eval_path:
        check_unused_fraction(cfg, f"evaluation has the folder {held_out}")
    if held_out is None:
        check_fraction(cfg.eval_fraction)
        files = [
            f
            for f in _images(root, names)
            if (hash_fraction(os.fsencode(f[0])) < cfg.eval_fraction) == (split == "eval")
        ]
    elif split == "train":
        files = _images(root, names)
    else:
        if others := sorted(set(_classes(held_out)) - set(names)):
            raise UserError(
                f"got the class {others[0]!r} in {held_out}, expected one of {', '.join(names)} as in {root}"
                f"{nearest(others[0], names)}"
            )
        root, files = held_out, _images(held_out, names, all_of_them=False)
    found = _Folder(root, names, files)
    check_some(found, split)
    return found


class _Folder(Records):
    apart = True

    def __init__(self, root: Path, names: Sequence[str], files: Sequence[tuple[str, int]]) -> None:
        self.root, self.label = root, f"images of {root}"
        self.fields = {"image": Field("image", shape=(None, None, None)), "label": Field("label", tuple(names))}
        # for a million files, one array of names takes a tenth of the memory of a list
        self._names = np.array([os.fsencode(name) for name, _ in files], np.bytes_)
        ids = {name: i for i, name in enumerate(names)}
        self._labels = np.array([ids[_named(name.split("/")[0])] for name, _ in files], np.int32)
        self.fingerprint = digest(os.fsencode(repr((names, files))))

    def __len__(self) -> int:
        return len(self._labels)

    def where(self, index: int) -> str:
        return os.fsdecode(self._names[index])

    def read(self, indices: Sequence[int], fields: Sequence[str]) -> list[dict[str, Any] | Bad]:
        return [self._one(index, fields) for index in indices]

    def _one(self, index: int, fields: Sequence[str]) -> dict[str, Any] | Bad:
        record: dict[str, Any] = {}
        if "image" in fields:
            try:
                with open(f"{self.root}/{self.where(index)}", "rb", buffering=0) as file:
                    record["image"] = file.read()
            except OSError as error:
                return Bad(self.where(index), error.strerror or "cannot be read")
            if not record["image"]:
                return Bad(self.where(index), "is empty")
        if "label" in fields:
            record["label"] = int(self._labels[index])
        return record


def _root(paths: Sequence[str], option: str) -> Path:
    flag = f"--data.{option.replace('_', '-')}"
    if len(paths) != 1:
        raise UserError(f"got {len(paths)} folders in data.{option}, expected one, try {flag} images")
    root = Path(paths[0]).expanduser()
    if not root.is_dir():
        near = nearest(root.name, [p.name for p in root.parent.iterdir()] if root.parent.is_dir() else [])
        raise UserError(
            f"got data.{option} {paths[0]!r}, which is not a folder, expected one{near or f', try {flag} .'}"
        )
    return root


def _named(folder: str) -> str:
    """Return the class of a folder: its name without white space around it, and with its accents composed.

    Some systems store accents as separate characters.
    """
    return unicodedata.normalize("NFC", folder.strip())


def _classes(root: Path) -> list[str]:
    return sorted({_named(e.name) for e in os.scandir(root) if e.is_dir() and not e.name.startswith(".")})


def _images(root: Path, names: Sequence[str], all_of_them: bool = True) -> list[tuple[str, int]]:
    """List paths below the root and sizes, sorted.

    Raises: UserError if `all_of_them` must have images and a class has none.
    """
    found: list[tuple[str, int]] = []
    others: Counter[str] = Counter()
    folders: list[str] = []
    for entry in os.scandir(root):
        if _named(entry.name) in names and entry.is_dir():
            folders.append(entry.name)
            found += _below(root, entry.name, others, (_identity(root),))
        elif not entry.is_dir():
            others[_kind(entry)] += 1
    _tell_spaced(root, tuple(sorted(spaced(folders))))
    empty = sorted(set(names) - {_named(name.split("/")[0]) for name, _ in found})
    _tell(root, tuple(sorted(others.items())))
    if empty and all_of_them:
        raise UserError(
            f"got no image in {root}/{empty[0]}, expected some of every class ({', '.join(SUFFIXES)}), "
            "try removing the folder or converting what is in it"
        )
    return sorted(found)


def _below(root: Path, folder: str, others: Counter[str], above: tuple[tuple[int, int], ...]) -> list[tuple[str, int]]:
    """List images in a folder and its subfolders; `above`: its parent folders, to which a link may lead back."""
    found: list[tuple[str, int]] = []
    if (here := _identity(root / folder)) in above:
        return []
    with os.scandir(root / folder) as entries:
        for e in entries:
            if e.is_dir() and not e.name.startswith("."):
                found += _below(root, f"{folder}/{e.name}", others, (*above, here))
            elif (kind := _kind(e)) in SUFFIXES:
                # a link's own size: a broken link is reported when it is read
                found.append((f"{folder}/{e.name}", e.stat(follow_symlinks=not e.is_symlink()).st_size))
            else:
                others[kind] += 1
    return found


def _identity(folder: Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _kind(entry: os.DirEntry[str]) -> str:
    """Return the extension of an image's name, or what else a file is."""
    if entry.name.startswith(".") or entry.name in ("Thumbs.db", "desktop.ini"):
        return "hidden"
    if not entry.is_file() and not (entry.is_symlink() and not os.path.exists(entry.path)):
        return "hidden folder" if entry.is_dir() else "not a regular file"  # opening a pipe would wait forever
    return os.path.splitext(entry.name)[1].lower() or "without an extension"


@functools.lru_cache(16)
def _tell(root: Path, others: tuple[tuple[str, int], ...]) -> None:
    """Log once what was left out; both splits of a set search the same folder."""
    if others:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in others)
        _log.warning("left out files of %s that are not images: %s", root, kinds)


@functools.lru_cache(16)
def _tell_spaced(root: Path, folders: tuple[str, ...]) -> None:
    """Log once which classes' folders have white space around their names."""
    tell_trimmed(Counter(folders), "the classes", str(root))
