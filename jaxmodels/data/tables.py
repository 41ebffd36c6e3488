"""Tables: CSV, JSON lines and Parquet."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import stat
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from jaxmodels.data import corpus
from jaxmodels.data.classes import tell_trimmed
from jaxmodels.data.columns import SOUNDS, Column, listed, name_of, whole
from jaxmodels.data.fields import unknown
from jaxmodels.data.files import File, open_file, shown
from jaxmodels.data.folders import SUFFIXES
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
from jaxmodels.data.section import DataConfig, FilesConfig, RecordsConfig, default
from jaxmodels.data.source import Split
from jaxmodels.errors import UserError, nearest


@dataclass(frozen=True)
class Table(RecordsConfig, FilesConfig):
    """Tables: CSV, JSON lines or Parquet."""

    evaluated_by: ClassVar[tuple[str, ...]] = ("files", "masks", "split_field")

    files: tuple[str, ...] = ()
    """Columns of images and sounds, which hold paths of files: absolute, or from the folder of the table."""
    masks: tuple[str, ...] = ()
    """Columns of masks, which hold paths of images whose pixels are numbers of classes."""
    split_field: str = ""
    """Column that names each row's split. Empty: a fraction of the rows is held out."""
    train_split: str = "train"
    """Name of the split to train on, where there is a `split_field`."""
    eval_split: str = "validation"
    """Name of the split to evaluate on, where there is a `split_field`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.split_field and self.eval_path:
            raise UserError(
                f"got data.split_field {self.split_field!r} and data.eval_path, expected one of them, "
                "try without --data.eval-path"
            )
        if self.split_field:
            check_unused_fraction(self, f"the column {self.split_field} names the split of each row")
        for name in ("train_split", "eval_split"):
            if not self.split_field and (value := getattr(self, name)) != default(self, name):
                raise UserError(
                    f"got data.{name} {value!r} without data.split_field, expected the column that names each row's "
                    "split, try --data.split-field split"
                )

    def records(self, split: Split) -> Records:
        return records(self, split)

    def evaluated_on(self, fields: Mapping[str, Any]) -> DataConfig:
        if "path" in fields and "eval_split" not in fields:  # all rows of other tables
            fields = {"split_field": "", "train_split": "train", "eval_split": "validation", **fields}
            return super().evaluated_on(fields)
        # the rows of one split, in these tables or in others
        return dataclasses.replace(self, **fields) if self.split_field else super().evaluated_on(fields)


def records(cfg: Table, split: Split) -> Records:
    """Open the rows of the tables that `data.path` names.

    Integers from 0 on are class numbers; other numbers (-1 and 1, say) and names are classes in sorted order.

    Evaluation has the rows of `data.eval_path`, or those that `data.split_field` gives to `data.eval_split`, or else
    those whose content has a hash below `data.eval_fraction`: equal rows are always on the same side, in files of any
    kind. The classes of a label or group are those of
    `data.path`, sorted.

    Raises: UserError if a file is not a table, or nothing is left for the split.
    """
    inputs = (cfg.input_field, cfg.target_field)
    read = _Read(cfg.label_field, cfg.group_field, cfg.split_field, cfg.files, cfg.masks, inputs)
    train = _scan(_stamped(cfg.path), read)
    if cfg.split_field:
        here, chosen = train, train.rows_of(cfg.train_split if split == "train" else cfg.eval_split, f"{split}_split")
    elif cfg.eval_path:
        here = train if split == "train" else _scan(_stamped(cfg.eval_path), read)
        _check_names(train, here, cfg)
        chosen = np.arange(len(here.places))
    else:
        check_fraction(cfg.eval_fraction)
        here, chosen = train, np.flatnonzero((train.places < cfg.eval_fraction) == (split == "eval"))
    found = _Rows(here, train.fields, chosen)
    check_some(found, split)
    return found


def _check_names(train: _Scan, here: _Scan, cfg: Table) -> None:
    """Raise UserError if a class or group that recurs in evaluation does not occur in training."""
    for name in (cfg.label_field, cfg.group_field):
        if name in train.fields and name in here.fields:
            known = train.fields[name].names
            if others := [other for other in here.fields[name].names if other not in known]:
                used = [other for other in others if here.columns[name].names[other] > 1]
                if known and used:
                    raise UserError(
                        f"got {name} {used[0]!r} in {here.label}, expected one of {listed(known)} as in {train.label}, "
                        "try --data.eval-path with a table of the same classes"
                    )


class _Rows(Records):
    """Some rows of files, read from the files when needed."""

    apart = True

    def __init__(self, scan: _Scan, fields: Mapping[str, Field], chosen: np.ndarray) -> None:
        self.fields, self._files = fields, scan.files
        self._which, self._rows = scan.which[chosen], scan.rows[chosen]
        self._scan, self.label = scan, scan.label
        self._ids = {name: {n: i for i, n in enumerate(field.names)} for name, field in fields.items()}
        facts = scan.places[chosen].tobytes() + (scan.sizes[chosen].tobytes() if scan.read.paths else b"")
        self.fingerprint = digest(facts + repr(sorted(fields.items())).encode())

    def __len__(self) -> int:
        return len(self._rows)

    def check(self, fields: Sequence[str]) -> None:
        for file, columns in zip(self._files, self._scan.seen, strict=True):
            if columns and (missing := [name for name in fields if name not in columns]):
                raise UserError(
                    f"got {file.path} without {missing[0]}, expected it in every file of {self.label} "
                    f"(this one has {listed(sorted(columns))}), try another --data.path"
                )

    def where(self, index: int) -> str:
        file = self._files[self._which[index]]
        return f"{file.path}:{file.line(int(self._rows[index]))}"

    def read(self, indices: Sequence[int], fields: Sequence[str]) -> list[dict[str, Any] | Bad]:
        found: list[dict[str, Any] | Bad] = [{}] * len(indices)
        which = self._which[np.asarray(indices, np.int64)]
        for number in np.unique(which):
            here = np.flatnonzero(which == number).tolist()
            rows = self._files[number].read([int(self._rows[indices[k]]) for k in here], fields)
            for k, row in zip(here, rows, strict=True):
                found[k] = self._one(indices[k], row, fields)
        return found

    def _one(self, index: int, row: dict[str, Any] | str, fields: Sequence[str]) -> dict[str, Any] | Bad:
        if isinstance(row, str):
            return Bad(self.where(index), row)
        try:
            folder = self._files[self._which[index]].path.parent
            return {name: self._value(name, row.get(name), folder) for name in fields}
        except Unfit as unfit:
            return Bad(self.where(index), str(unfit))

    def _value(self, name: str, value: Any, folder: Path) -> Any:
        field = self.fields[name]
        if value is None or (value == "" and field.kind != "text"):
            raise Unfit(f"{name} is missing")
        if field.kind == "label":
            return self._class(name, value)
        if field.kind == "texts" and isinstance(value, list):
            return tuple(value)
        if field.kind == "labels":
            return tuple(self._class(name, v) for v in (value if isinstance(value, list) else [value]))
        if field.kind == "array":
            try:
                with np.errstate(over="ignore"):  # too large for float32: becomes infinite, which is bad
                    return np.asarray(value, field.dtype)
            except (ValueError, TypeError, OverflowError):
                raise Unfit(f"{name} is {shown(value)}, expected numbers") from None
        if name in self._scan.read.paths:
            return content_of(name, value, folder)
        if (field.kind == "text" and isinstance(value, str)) or (field.kind == "image" and isinstance(value, bytes)):
            return value
        raise Unfit(f"{name} is {shown(value)}, expected {field.kind}")

    def _class(self, name: str, value: Any) -> int:
        key, ids = name_of(value), self._ids[name]
        if key is None:
            raise Unfit(f"{name} is missing")
        if key in ids:
            return ids[key]
        if not ids and whole(key):
            return int(key)
        raise Unfit(f"{name} is {shown(value)}, expected {f'one of {listed(list(ids))}' if ids else 'a whole number'}")


class Unfit(Exception):
    """A value does not fit the kind of its column."""


def content_of(name: str, value: Any, folder: Path) -> bytes:
    """Read the file that a column names: by an absolute path, or by one from the folder of the table.

    Raises:
        Unfit: there is no such file, or nothing in it.
    """
    if not isinstance(value, str):
        raise Unfit(f"{name} is {shown(value)}, expected the path of a file")
    try:
        if not stat.S_ISREG(os.stat(folder / value).st_mode):  # reading a pipe would wait
            raise Unfit(f"{name} is {shown(value)}, which is not a regular file")
        content = (folder / value).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a zero byte
        reason = getattr(error, "strerror", None) or str(error)
        raise Unfit(f"{name} is {shown(value)}, which cannot be read ({reason})") from None
    if not content:
        raise Unfit(f"{name} is {shown(value)}, which is empty")
    return content


class _Read(NamedTuple):
    """How columns are read: by their names in the config."""

    label: str
    group: str
    split: str
    files: tuple[str, ...]
    masks: tuple[str, ...]
    inputs: tuple[str, ...]
    """What a model reads, so that a list of texts there is no list of classes."""

    @property
    def paths(self) -> tuple[str, ...]:
        """The columns that hold paths of files."""
        return (*self.files, *self.masks)


class _Scan:
    """What one pass over files finds: where rows are, the hash of each, and what columns hold."""

    def __init__(self, files: Sequence[File], read: _Read) -> None:
        self.files, self.read = files, read
        self.label = f"table {', '.join(f.path.name for f in files[:3])}{', ...' if len(files) > 3 else ''}"
        which, rows, places, sizes = array("i"), array("q"), array("d"), array("q")
        splits: list[str] = []
        self.columns: dict[str, Column] = {}
        self.seen: list[set[str]] = []
        """The columns of each file."""
        broken = ""
        for number, file in enumerate(files):
            self.seen.append(set(file.columns or ()))
            for row, (values, raw) in enumerate(file.rows()):
                which.append(number)
                rows.append(row)
                places.append(hash_fraction(raw if isinstance(values, str) else _canonical(values) or raw))
                known = {} if isinstance(values, str) else values
                sizes.append(sum(_size(file.path.parent, known.get(name)) for name in read.paths))
                splits.append(name_of(known.get(read.split)) or "" if read.split else "")
                if isinstance(values, str):
                    broken = broken or f"{file.path}:{file.line(row)}: {values}"
                    continue
                if file.columns is None:
                    self.seen[-1].update(values)
                for name, value in values.items():
                    if name not in self.columns:
                        self.columns[name] = Column(name == read.label, name == read.group, name in read.inputs)
                    self.columns[name].see(value, file.typed)
        if broken and not self.columns:
            raise UserError(
                f"got {self.label}, of whose {len(rows):,} rows none can be read (the first: {broken}), expected "
                "one record a row, try another file"
            )
        self.which, self.rows = np.array(which, np.int32), np.array(rows, np.int64)
        self.places, self.sizes = np.array(places, np.float64), np.array(sizes, np.int64)
        self.splits = np.array(splits) if read.split else np.zeros(0, str)
        self._check_columns()
        found = {name: self._field(name) for name in sorted(self.columns)}
        self.fields = {name: field for name, field in found.items() if field}
        for name, field in self.fields.items():
            if field.kind in ("label", "labels"):
                tell_trimmed(self.columns[name].spaced, name, self.label)

    def rows_of(self, split: str, option: str) -> np.ndarray:
        """Return the rows of a split, which `option` names.

        Raises: UserError if there are none.
        """
        chosen = np.flatnonzero(self.splits == split)
        if not len(chosen):
            known = sorted({str(name) for name in self.splits if name})
            near = nearest(split, known) or f", try --data.{option.replace('_', '-')} {known[0] if known else 'NAME'}"
            raise UserError(
                f"got data.{option} {split!r}, expected one that {self.read.split} of {self.label} names "
                f"({listed(known) or 'it names none'}){near}"
            )
        return chosen

    def _check_columns(self) -> None:
        """Raise UserError if the config names a column that is not there, or one for two kinds of files."""
        known = sorted(self.columns)
        named = (("split_field", (self.read.split,)), ("files", self.read.files), ("masks", self.read.masks))
        for option, name in ((option, name) for option, names in named for name in names if name):
            if name not in self.columns:
                raise UserError(unknown(f"data.{option}", name, known, f"--data.{option.replace('_', '-')}"))
        if both := sorted(set(self.read.files) & set(self.read.masks)):
            raise UserError(f"got the column {both[0]!r} in data.files and in data.masks, expected it in one of them")

    def _field(self, name: str) -> Field | None:
        """Return what a column holds; of files, by the suffix of most."""
        if name in self.read.masks:
            return Field("mask")
        if name not in self.read.files:
            return self.columns[name].field()
        kind, suffix = self.columns[name].of_files()
        if kind is None:
            raise UserError(
                f"got the column {name!r} in data.files of {self.label}, most of whose values end in {suffix!r}, "
                f"expected files of images ({listed(SUFFIXES)}) or sounds ({listed(SOUNDS)})"
            )
        return Field(kind, shape=(None, None, None) if kind == "image" else ())


def _canonical(values: Mapping[str, Any]) -> bytes:
    """Serialize a row to bytes that do not depend on the kind of file; empty if it is nested too deep."""
    try:
        return json.dumps({k: v for k in sorted(values) if (v := _plain(values[k])) != ""}).encode()
    except RecursionError:
        return b""


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: _plain(value[k]) for k in sorted(value)}
    return "" if value is None else value.hex() if isinstance(value, bytes) else str(value)


def _stamped(patterns: Sequence[str]) -> tuple[tuple[Path, int, int], ...]:
    """Return files with size and time, the key under which a scan is cached."""
    return tuple((f, f.stat().st_size, f.stat().st_mtime_ns) for f in corpus.expand(patterns, "table"))


def _size(folder: Path, value: Any) -> int:
    """Return the size of the file that a column names, -1 without one; of a link its own, as it may be broken."""
    try:
        return os.stat(folder / value, follow_symlinks=False).st_size if isinstance(value, str) else -1
    except (OSError, ValueError):
        return -1


@functools.lru_cache(2)
def _scan(files: tuple[tuple[Path, int, int], ...], read: _Read) -> _Scan:
    return _Scan([open_file(path) for path, *_ in files], read)
