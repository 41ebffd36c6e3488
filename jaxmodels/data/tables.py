"""Tables: CSV, JSON lines and Parquet."""

from __future__ import annotations

import functools
import json
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.config import DataConfig
from jaxmodels.data import corpus
from jaxmodels.data.files import File, open_file, shown
from jaxmodels.data.records import Bad, Field, Records, check_fraction, check_some, digest, place
from jaxmodels.data.source import Split

# Share of a column's values that must be numbers for it to be one of numbers: others are then bad.
_MOST = 0.9
_DIGITS = frozenset("0123456789")


def records(cfg: DataConfig, split: Split) -> Records:
    """The rows of the tables that `data.path` names.

    Evaluation has those of `data.eval_path`; else those whose content has a hash below `data.eval_fraction`: equal
    rows are on one side, in files of any kind, and none ever changes it. The classes of a label or group are those
    of `data.path`, sorted.

    Raises: UserError where a file is no table, or nothing is left for the split.
    """
    train = _scan(_stamped(cfg.path), cfg.label_field, cfg.group_field)
    if cfg.eval_path:
        here = train if split == "train" else _scan(_stamped(cfg.eval_path), cfg.label_field, cfg.group_field)
        chosen = np.arange(len(here.places))
    else:
        check_fraction(cfg.eval_fraction)
        here, chosen = train, np.flatnonzero((train.places < cfg.eval_fraction) == (split == "eval"))
    found = Table(here, train.fields, chosen)
    check_some(found, split)
    return found


class Table(Records):
    """Some rows of files, read where they lie."""

    def __init__(self, scan: _Scan, fields: Mapping[str, Field], chosen: np.ndarray) -> None:
        self.fields, self._files = fields, scan.files
        self._which, self._rows = scan.which[chosen], scan.rows[chosen]
        self.label = f"table {', '.join(f.path.name for f in self._files[:3])}{', ...' if len(self._files) > 3 else ''}"
        self._ids = {name: {n: i for i, n in enumerate(field.names)} for name, field in fields.items()}
        self.fingerprint = digest(scan.places[chosen].tobytes() + repr(sorted(fields.items())).encode())

    def __len__(self) -> int:
        return len(self._rows)

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
            return {name: self._value(name, row.get(name)) for name in fields}
        except _Unfit as unfit:
            return Bad(self.where(index), str(unfit))

    def _value(self, name: str, value: Any) -> Any:
        field = self.fields[name]
        if value is None or value == "":
            raise _Unfit(f"{name} is missing")
        if field.kind == "label":
            return self._class(name, value)
        if field.kind == "labels" and isinstance(value, list):
            return tuple(self._class(name, v) for v in value)
        if field.kind == "array":
            try:
                numbers = np.asarray(value, field.dtype)
            except (ValueError, TypeError):
                raise _Unfit(f"{name} is {shown(value)}, expected numbers") from None
            sizes = zip(numbers.shape, field.shape, strict=False)
            if numbers.ndim != len(field.shape) or any(s not in (None, n) for n, s in sizes):
                raise _Unfit(f"{name} has the shape {numbers.shape}, expected {field.shape}")
            return numbers
        if (field.kind == "text" and isinstance(value, str)) or (field.kind == "image" and isinstance(value, bytes)):
            return value
        raise _Unfit(f"{name} is {shown(value)}, expected {field.kind}")

    def _class(self, name: str, value: Any) -> int:
        if ids := self._ids[name]:
            for key in (str(value), str(int(value)) if isinstance(value, bool) else ""):
                if key in ids:
                    return ids[key]
            known = list(ids)
            first = ", ".join(known[:10]) + (", ..." if len(known) > 10 else "")
            raise _Unfit(f"{name} is {shown(value)}, expected one of {first}")
        try:
            return int(value)
        except (ValueError, TypeError):
            raise _Unfit(f"{name} is {shown(value)}, expected a whole number") from None


class _Unfit(Exception):
    """A value that is not of its column's kind."""


class _Scan:
    """What one pass over files has found: where rows lie, the hash of each, and what columns hold."""

    def __init__(self, files: Sequence[File], label_field: str, group_field: str) -> None:
        self.files = files
        which, rows, places = array("i"), array("q"), array("d")
        columns: dict[str, _Column] = {}
        for number, file in enumerate(files):
            for row, (values, raw) in enumerate(file.rows()):
                which.append(number)
                rows.append(row)
                places.append(place(_canonical(values) if isinstance(values, dict) else raw))
                for name, value in values.items() if isinstance(values, dict) else ():
                    if name not in columns:
                        columns[name] = _Column(name == label_field, name == group_field)
                    columns[name].see(value, file.typed)
        self.which, self.rows = np.array(which, np.int32), np.array(rows, np.int64)
        self.places = np.array(places, np.float64)
        found = {name: columns[name].field() for name in sorted(columns)}
        self.fields = {name: field for name, field in found.items() if field}


class _Column:
    """The values of a column, counted by what they are."""

    def __init__(self, is_label: bool, is_group: bool) -> None:
        self.is_label, self.is_group = is_label, is_group
        self.kinds: Counter[str] = Counter()
        self.names: set[str] = set()
        self.shapes: set[tuple[int, ...]] = set()
        self.largest = -1

    def see(self, value: Any, typed: bool) -> None:
        kind = _kind(value, typed)
        self.kinds[kind] += 1
        if kind == "texts" or (kind == "list" and self.is_label):
            self.names.update(map(str, value))
        elif kind in ("text", "whole", "number") and (self.is_label or self.is_group):
            self.names.add(str(value))
            if kind == "whole":
                self.largest = max(self.largest, int(value))
        if kind == "list":
            self.shapes.add(np.shape(value))

    def field(self) -> Field | None:
        """None: nothing here can use such a column."""
        count = self.kinds
        total = max(sum(count.values()) - count["missing"], 1)
        if count["texts"] or (count["list"] and self.is_label):
            return Field("labels", tuple(sorted(self.names, key=_in_order)))
        if count["list"]:
            sizes = list(zip(*self.shapes, strict=False))
            shape = tuple(each[0] if len(set(each)) == 1 else None for each in sizes)
            return Field("array", shape=shape, dtype="float32")
        if self.is_group and self.names:
            return Field("label", tuple(sorted(self.names, key=_in_order)))
        if count["whole"] >= _MOST * total:
            # whole numbers are classes from 0 on; more names than these would be of no use to anyone
            named = self.is_label and self.largest < 100_000
            return Field("label", tuple(map(str, range(self.largest + 1))) if named else ())
        if count["whole"] + count["number"] >= _MOST * total:
            return Field("array", dtype="float32")
        if count["bytes"]:
            return Field("image", shape=(None, None, None))
        if count["text"]:
            return Field("label", tuple(sorted(self.names))) if self.is_label else Field("text")
        return None


def _in_order(name: str) -> tuple[bool, int, str]:
    """Numbers by their size, then names by their letters."""
    return (False, int(name), "") if name.removeprefix("-").isdecimal() else (True, 0, name)


def _kind(value: Any, typed: bool) -> str:
    """What a value is; where a file has no types (CSV), a text that reads as a number is one."""
    if value is None or value == "":
        return "missing"
    if isinstance(value, str):
        if typed or value[-1] not in _DIGITS:
            return "text"
        if value.removeprefix("-").isdecimal():
            return "whole"
        try:
            float(value)
        except ValueError:
            return "text"
        return "number"
    if isinstance(value, int | float):
        return "whole" if isinstance(value, int) else "number"
    if isinstance(value, list):
        if value and all(isinstance(x, str) for x in value):
            return "texts"
        try:
            return "list" if np.asarray(value).dtype.kind in "biuf" else "other"
        except ValueError:  # lists of different lengths
            return "other"
    return "bytes" if isinstance(value, bytes) else "other"


def _canonical(values: Mapping[str, Any]) -> bytes:
    """A row as bytes, the same whatever kind of file it is from."""
    return json.dumps({k: v for k in sorted(values) if (v := _plain(values[k])) != ""}).encode()


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: _plain(value[k]) for k in sorted(value)}
    return "" if value is None else value.hex() if isinstance(value, bytes) else str(value)


def _stamped(patterns: Sequence[str]) -> tuple[tuple[Path, int, int], ...]:
    """Files with their size and time, by which a scan is remembered."""
    return tuple((f, f.stat().st_size, f.stat().st_mtime_ns) for f in corpus.expand(patterns, "table"))


@functools.lru_cache(2)
def _scan(files: tuple[tuple[Path, int, int], ...], label_field: str, group_field: str) -> _Scan:
    return _Scan([open_file(path) for path, *_ in files], label_field, group_field)
