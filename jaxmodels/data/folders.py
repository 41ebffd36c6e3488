"""Folders of images, one folder a class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.config import DataConfig
from jaxmodels.data.records import Bad, Field, Records, check_fraction, check_some, digest, place
from jaxmodels.data.source import Split
from jaxmodels.errors import UserError, nearest

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
HELD_OUT = ("val", "validation", "test")


def records(cfg: DataConfig, split: Split) -> Records:
    """The images of `data.path`, `root/<class>/<image>`: fields image and label, classes in the order of their names.

    Evaluation has the images of `data.eval_path`; else of the folder val, validation or test beside the folder train;
    else those whose path below the root has a hash below `data.eval_fraction`.

    Raises: UserError where there are no such folders, or one to evaluate on has a class that is not trained on.
    """
    root = _root(cfg.path, "path")
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
            f"got {root} without folders in it, expected one folder of images a class, try {root}/NAME_OF_A_CLASS/1.png"
        )
    if held_out is None:
        check_fraction(cfg.eval_fraction)
        files = [f for f in _images(root, names) if (place(os.fsencode(f[0])) < cfg.eval_fraction) == (split == "eval")]
    elif split == "train":
        files = _images(root, names)
    else:
        if others := sorted(set(_classes(held_out)) - set(names)):
            raise UserError(
                f"got the class {others[0]!r} in {held_out}, expected one of {', '.join(names)} as in {root}"
                f"{nearest(others[0], names)}"
            )
        root, files = held_out, _images(held_out, names)
    found = _Folder(root, names, files)
    check_some(found, split)
    return found


class _Folder(Records):
    def __init__(self, root: Path, names: Sequence[str], files: Sequence[tuple[str, int]]) -> None:
        self.root, self.label = root, f"images of {root}"
        self.fields = {"image": Field("image", shape=(None, None, None)), "label": Field("label", tuple(names))}
        # of a million files, names in one array take a tenth of the memory of a list of them
        self._names = np.array([os.fsencode(name) for name, _ in files], np.bytes_)
        ids = {name: i for i, name in enumerate(names)}
        self._labels = np.array([ids[name.split("/")[0]] for name, _ in files], np.int32)
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
        raise UserError(f"got data.{option} {paths[0]!r}, which is no folder, expected one{near or f', try {flag} .'}")
    return root


def _classes(root: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))


def _images(root: Path, names: Sequence[str]) -> list[tuple[str, int]]:
    """Paths below the root and sizes, sorted."""
    found: list[tuple[str, int]] = []
    for name in names:
        if (root / name).is_dir():
            with os.scandir(root / name) as entries:
                wanted = (e for e in entries if e.name.lower().endswith(SUFFIXES) and not e.name.startswith("."))
                # of a link its own size: one that leads nowhere is told when it is read
                found += [(f"{name}/{e.name}", e.stat(follow_symlinks=not e.is_symlink()).st_size) for e in wanted]
    return sorted(found)
