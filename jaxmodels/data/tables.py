"""Tables: CSV, JSON lines and Parquet."""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.data import corpus
from jaxmodels.data.classes import spaced, tell_trimmed
from jaxmodels.data.files import File, open_file, shown
from jaxmodels.data.records import Bad, Field, Records, check_fraction, check_some, digest, hash_fraction
from jaxmodels.data.section import FilesConfig, RecordsConfig
from jaxmodels.data.source import Split
from jaxmodels.errors import UserError

# Fraction of a column's values that must be numbers for it to be numeric; its other values are then bad.
_MOST = 0.9
# Integers up to this are taken for class numbers.
_MOST_NUMBERED = 100_000
_DIGITS = frozenset("0123456789")
_NUMBER = re.compile(r"\s*[+-]?\d+(\.\d*)?([eE][+-]?\d+)?\s*")
# Integers below this are exact in float64; a larger one is a name, such as an account number.
_EXACT = 2**53


@dataclass(frozen=True)
class Table(RecordsConfig, FilesConfig):
    """Tables: CSV, JSON lines or Parquet."""

    def records(self, split: Split) -> Records:
        return records(self, split)


def records(cfg: Table, split: Split) -> Records:
    """Open the rows of the tables that `data.path` names.

    Integers from 0 on are class numbers; other numbers (-1 and 1, say) and names are classes in sorted order.

    Evaluation has the rows of `data.eval_path`, or else those whose content has a hash below `data.eval_fraction`:
    equal rows are always on the same side, in files of any kind. The classes of a label or group are those of
    `data.path`, sorted.

    Raises: UserError if a file is not a table, or nothing is left for the split.
    """
    train = _scan(_stamped(cfg.path), cfg.label_field, cfg.group_field)
    if cfg.eval_path:
        here = train if split == "train" else _scan(_stamped(cfg.eval_path), cfg.label_field, cfg.group_field)
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
        self.fingerprint = digest(scan.places[chosen].tobytes() + repr(sorted(fields.items())).encode())

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
            return {name: self._value(name, row.get(name)) for name in fields}
        except _Unfit as unfit:
            return Bad(self.where(index), str(unfit))

    def _value(self, name: str, value: Any) -> Any:
        field = self.fields[name]
        if value is None or (value == "" and field.kind != "text"):
            raise _Unfit(f"{name} is missing")
        if field.kind == "label":
            return self._class(name, value)
        if field.kind == "labels":
            return tuple(self._class(name, v) for v in (value if isinstance(value, list) else [value]))
        if field.kind == "array":
            try:
                with np.errstate(over="ignore"):  # too large for float32: becomes infinite, which is bad
                    return np.asarray(value, field.dtype)
            except (ValueError, TypeError, OverflowError):
                raise _Unfit(f"{name} is {shown(value)}, expected numbers") from None
        if (field.kind == "text" and isinstance(value, str)) or (field.kind == "image" and isinstance(value, bytes)):
            return value
        raise _Unfit(f"{name} is {shown(value)}, expected {field.kind}")

    def _class(self, name: str, value: Any) -> int:
        key, ids = name_of(value), self._ids[name]
        if key is None:
            raise _Unfit(f"{name} is missing")
        if key in ids:
            return ids[key]
        if not ids and _whole(key):
            return int(key)
        raise _Unfit(f"{name} is {shown(value)}, expected {f'one of {listed(list(ids))}' if ids else 'a whole number'}")


def name_of(value: Any) -> str | None:
    """Normalize a value to the name of its class; None if it names none.

    true is 1; 2.0, "2.0", "02" and " 2" are 2. White space around a name is left out, and accents are composed.
    """
    if isinstance(value, str):
        value = value.strip() if value.isascii() else unicodedata.normalize("NFC", value.strip())
    if value is None or value != value or value == "":
        return None
    if isinstance(value, str):
        if not _NUMBER.fullmatch(value):
            return value
        number = float(value)
        return str(int(number)) if number.is_integer() and abs(number) < _EXACT else value
    return str(int(value) if isinstance(value, bool) or (isinstance(value, float) and value.is_integer()) else value)


def listed(names: Sequence[str]) -> str:
    """List names for a message, only the first ten if there are more."""
    return ", ".join(map(str, names[:10])) + (", ..." if len(names) > 10 else "")


class _Unfit(Exception):
    """A value does not fit the kind of its column."""


class _Scan:
    """What one pass over files finds: where rows are, the hash of each, and what columns hold."""

    def __init__(self, files: Sequence[File], label_field: str, group_field: str) -> None:
        self.files = files
        self.label = f"table {', '.join(f.path.name for f in files[:3])}{', ...' if len(files) > 3 else ''}"
        which, rows, places = array("i"), array("q"), array("d")
        self.columns: dict[str, _Column] = {}
        self.seen: list[set[str]] = []
        """The columns of each file."""
        broken = ""
        for number, file in enumerate(files):
            self.seen.append(set(file.columns or ()))
            for row, (values, raw) in enumerate(file.rows()):
                which.append(number)
                rows.append(row)
                places.append(hash_fraction(raw if isinstance(values, str) else _canonical(values) or raw))
                if isinstance(values, str):
                    broken = broken or f"{file.path}:{file.line(row)}: {values}"
                    continue
                if file.columns is None:
                    self.seen[-1].update(values)
                for name, value in values.items():
                    if name not in self.columns:
                        self.columns[name] = _Column(name == label_field, name == group_field)
                    self.columns[name].see(value, file.typed)
        if broken and not self.columns:
            raise UserError(
                f"got {self.label}, of whose {len(rows):,} rows none can be read (the first: {broken}), expected "
                "one record a row, try another file"
            )
        self.which, self.rows = np.array(which, np.int32), np.array(rows, np.int64)
        self.places = np.array(places, np.float64)
        found = {name: self.columns[name].field() for name in sorted(self.columns)}
        self.fields = {name: field for name, field in found.items() if field}
        for name, field in self.fields.items():
            if field.kind in ("label", "labels"):
                tell_trimmed(self.columns[name].spaced, name, self.label)


class _Column:
    """The values of a column, counted by what they are."""

    def __init__(self, is_label: bool, is_group: bool) -> None:
        self.is_label, self.is_group = is_label, is_group
        self.kinds: Counter[str] = Counter()
        self.names: Counter[str] = Counter()
        """How often each name of a class or group occurs; each of several labels counts."""
        self.numbers: Counter[str] = Counter()
        """How often each value occurs as a number."""
        self.spaced: Counter[str] = Counter()
        """Names of classes or groups with white space around them."""
        self.shapes: Counter[tuple[int, ...]] = Counter()

    def see(self, value: Any, typed: bool) -> None:
        kind = _kind(value, typed)
        if kind == "text" and (self.is_label or self.is_group) and name_of(value) is None:
            kind = "missing"
        self.kinds[kind] += 1
        if kind == "texts" or (isinstance(value, list) and self.is_label):
            self.names.update(name for v in value if (name := name_of(v)) is not None)
            self.spaced.update(spaced(value))
        elif kind in ("text", "whole", "number") and (self.is_label or self.is_group):
            name = str(name_of(value))
            self.names[name] += 1
            self.spaced.update(spaced([value]) if kind == "text" else ())
            self.numbers[name] += kind != "text"
        if kind == "list":
            self.shapes[np.shape(value)] += 1

    def field(self) -> Field | None:
        """Return what the column holds, None if nothing here can use it."""
        count = self.kinds
        total = max(sum(count.values()) - count["missing"], 1)
        if count["texts"] or (count["list"] and self.is_label and all(map(_whole, self.names))):
            # -1 pads lists, and is not a class inside one
            names = [name for name in self.names if not (_whole(name) and int(name) < 0)]
            return Field("labels", tuple(sorted(names, key=in_order)))
        if count["list"]:
            return Field("array", shape=self._shape(), dtype="float32")
        if self.is_group and self.names:
            return Field("label", tuple(sorted(self.names, key=in_order)))
        if self.is_label and self.names:
            return self._classes(total)
        if count["whole"] >= _MOST * total:
            return Field("label")
        if count["whole"] + count["number"] >= _MOST * total:
            return Field("array", dtype="float32")
        if count["bytes"]:
            return Field("image", shape=(None, None, None))
        return Field("text") if count["text"] else None

    def _shape(self) -> tuple[int | None, ...]:
        """Return the shape that nearly all arrays have, or its common part; None if they differ."""
        (usual, often), *_ = self.shapes.most_common(1)
        if often >= _MOST * self.shapes.total():
            return usual
        sizes = list(zip(*self.shapes, strict=False))
        return tuple(each[0] if len(set(each)) == 1 else None for each in sizes)

    def _classes(self, total: int) -> Field:
        """Number the classes: integers from 0 on are class numbers; other numbers and names are sorted.

        A value of another kind than nearly all others is a mistake in its row if it occurs only once; one that recurs
        is a class.
        """
        numbers = {int(name): often for name, often in self.numbers.items() if often and _whole(name)}
        strange = Counter({name: often for name, often in self.names.items() if not self.numbers[name]})
        fractions = Counter({name: often for name, often in self.numbers.items() if often and not _whole(name)})
        if fractions.total() > (1 - _MOST) * total and not strange:
            return Field("array", dtype="float32")
        strange += fractions
        if not numbers or strange.total() > (1 - _MOST) * total or any(often > 1 for often in strange.values()):
            return Field("label", tuple(sorted(self.names, key=in_order)))
        plain = {n for n in numbers if 0 <= n < _MOST_NUMBERED}
        if not plain or any(often > 1 for n, often in numbers.items() if n not in plain):
            return Field("label", tuple(map(str, sorted(numbers))))
        return Field("label", tuple(map(str, range(max(plain) + 1))))


def _whole(name: str) -> bool:
    return name.removeprefix("-").isdecimal()


def in_order(name: str) -> tuple[bool, int, str]:
    """Sort key: numbers by value, then names alphabetically."""
    return (False, int(name), "") if _whole(name) else (True, 0, name)


def _kind(value: Any, typed: bool) -> str:
    """Return what a value is; in a file without types (CSV), text that reads as a number is one."""
    if value is None or value == "" or (isinstance(value, float) and value != value):
        return "missing"
    if isinstance(value, str):
        if typed or value[-1] not in _DIGITS or "_" in value:
            return "text"
        if _whole(value):
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


@functools.lru_cache(2)
def _scan(files: tuple[tuple[Path, int, int], ...], label_field: str, group_field: str) -> _Scan:
    return _Scan([open_file(path) for path, *_ in files], label_field, group_field)
