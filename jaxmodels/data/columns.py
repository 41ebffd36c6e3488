"""What the columns of a table hold, and how their values name classes."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxmodels.data.classes import spaced
from jaxmodels.data.folders import SUFFIXES
from jaxmodels.data.records import Field, Kind
from jaxmodels.data.sounds import SUFFIXES as SOUNDS

# Fraction of a column's values that must be numbers for it to be numeric; its other values are then bad.
_MOST = 0.9
# Integers up to this are taken for class numbers.
_MOST_NUMBERED = 100_000
_DIGITS = frozenset("0123456789")
_NUMBER = re.compile(r"\s*[+-]?\d+(\.\d*)?([eE][+-]?\d+)?\s*")
# No system has longer paths.
_LONGEST_PATH = 4096
# Integers below this are exact in float64; a larger one is a name, such as an account number.
_EXACT = 2**53


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


class Column:
    """The values of a column, counted by what they are."""

    def __init__(self, is_label: bool, is_group: bool, is_read: bool = False) -> None:
        self.is_label, self.is_group, self.is_read = is_label, is_group, is_read
        self.kinds: Counter[str] = Counter()
        self.names: Counter[str] = Counter()
        """How often each name of a class or group occurs; each of several labels counts."""
        self.numbers: Counter[str] = Counter()
        """How often each value occurs as a number."""
        self.spaced: Counter[str] = Counter()
        """Names of classes or groups with white space around them."""
        self.shapes: Counter[tuple[int, ...]] = Counter()
        self.suffixes: Counter[str] = Counter()
        """The suffixes of texts, which are the names of files in some columns."""

    def see(self, value: Any, typed: bool) -> None:
        kind = _kind(value, typed)
        if kind == "text" and (self.is_label or self.is_group) and name_of(value) is None:
            kind = "missing"
        self.kinds[kind] += 1
        if kind == "text" and len(value) < _LONGEST_PATH:
            self.suffixes[os.path.splitext(value)[1].lower()] += 1
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

    def of_files(self) -> tuple[Kind | None, str]:
        """Return what most of the files that a column names hold, an image or a sound, and their suffix."""
        suffix = max(self.suffixes, key=lambda each: self.suffixes[each], default="")
        return "image" if suffix in SUFFIXES else "audio" if suffix in SOUNDS else None, suffix

    def field(self) -> Field | None:
        """Return what the column holds, None if nothing here can use it."""
        count = self.kinds
        total = max(sum(count.values()) - count["missing"], 1)
        if count["texts"] and self.is_read:
            return Field("texts")
        if count["texts"] or (count["list"] and self.is_label and all(map(whole, self.names))):
            # -1 pads lists, and is not a class inside one
            names = [name for name in self.names if not (whole(name) and int(name) < 0)]
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
        numbers = {int(name): often for name, often in self.numbers.items() if often and whole(name)}
        strange = Counter({name: often for name, often in self.names.items() if not self.numbers[name]})
        fractions = Counter({name: often for name, often in self.numbers.items() if often and not whole(name)})
        if fractions.total() > (1 - _MOST) * total and not strange:
            return Field("array", dtype="float32")
        strange += fractions
        if not numbers or strange.total() > (1 - _MOST) * total or any(often > 1 for often in strange.values()):
            return Field("label", tuple(sorted(self.names, key=in_order)))
        plain = {n for n in numbers if 0 <= n < _MOST_NUMBERED}
        if not plain or any(often > 1 for n, often in numbers.items() if n not in plain):
            return Field("label", tuple(map(str, sorted(numbers))))
        return Field("label", tuple(map(str, range(max(plain) + 1))))


def whole(name: str) -> bool:
    return name.removeprefix("-").isdecimal()


def in_order(name: str) -> tuple[bool, int, str]:
    """Sort key: numbers by value, then names alphabetically."""
    return (False, int(name), "") if whole(name) else (True, 0, name)


def _kind(value: Any, typed: bool) -> str:
    """Return what a value is; in a file without types (CSV), text that reads as a number is one."""
    if value is None or value == "" or (isinstance(value, float) and value != value):
        return "missing"
    if isinstance(value, str):
        if typed or value[-1] not in _DIGITS or "_" in value:
            return "text"
        if whole(value):
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
