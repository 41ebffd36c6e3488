"""Records as a source returns them, before text becomes tokens and images are transformed."""

from __future__ import annotations

import hashlib
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from jaxmodels.data.files import shown
from jaxmodels.data.section import FilesConfig, default
from jaxmodels.data.values import EMPTY, number_dtype, unfit
from jaxmodels.errors import UserError, nearest
from jaxmodels.registry import named

Kind = Literal["image", "text", "label", "labels", "array", "audio", "mask", "spans", "boxes", "texts"]

_AT_ONCE = 1024
_SHOWN = 3

_log = logging.getLogger("jaxmodels")


@dataclass(frozen=True)
class Field:
    """What one field of every record holds.

    image: bytes of an image file, or uint8 (H, W, C); text: str; label: int; labels: a tuple of ints; array: numbers;
    audio: bytes of a sound file, or `Sound`; mask: bytes of an image file whose pixels are class numbers, or
    uint8 (H, W); spans: a tuple of `Span`s; texts: a tuple of strs;
    boxes: numbers (N, 5), left, top, width and height in pixels, and the class.
    """

    kind: Kind
    names: tuple[str, ...] = ()
    """Names of a label's classes, if they have names."""
    shape: tuple[int | None, ...] = ()
    """Shape of an image or an array; None if it varies."""
    dtype: str = ""
    """Dtype of an array."""

    def __post_init__(self) -> None:
        if self.kind not in (kinds := get_args(Kind)):
            raise UserError(f"got Field({self.kind!r}), expected one of {', '.join(kinds)}{nearest(self.kind, kinds)}")
        for name, kind, plural in (("names", str, "names of classes"), ("shape", int | None, "sizes, or None")):
            values = getattr(self, name)
            if not isinstance(values, tuple | list) or not all(isinstance(value, kind) for value in values):
                raise UserError(f"got Field({self.kind!r}, {name}={values!r}), expected a tuple of {plural}")
            object.__setattr__(self, name, tuple(values))
        try:
            known = not self.dtype or number_dtype(np.dtype(self.dtype))
        except TypeError:
            known = False
        if not known:
            raise UserError(f"got Field({self.kind!r}, dtype={self.dtype!r}), expected that of numbers, try 'float32'")


class Sound(NamedTuple):
    """A sound in memory."""

    samples: np.ndarray
    """float32 in [-1, 1], or int16: (N,), or (N, channels)."""
    rate: int
    """Samples a second."""


@dataclass(frozen=True)
class Bad:
    """Takes the place of a record that cannot be read."""

    where: str
    """File and row, or only the file."""
    reason: str
    empty: bool = False
    """Whether the record is an empty text, which is not a mistake but has nothing to learn from."""

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


class Records(ABC):
    """A finite set of records that can be read in any order.

    `fingerprint` is a short hash that changes when the records do. `whole` says that its texts are parts of a single
    one, to be joined without a separator.
    """

    label: str
    """What the set is, in a few words."""
    fields: Mapping[str, Field]
    fingerprint: str
    whole: bool = False
    apart: bool = False
    """Whether a label can be read without reading the image beside it."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, indices: Sequence[int], fields: Sequence[str]) -> list[dict[str, Any] | Bad]:
        """Read these fields of these records, each with the type of value that its `Field` says; thread-safe."""

    def where(self, index: int) -> str:
        """Return file and row of a record, or only the file."""
        return f"{self.label}, record {index}"

    def check(self, fields: Sequence[str]) -> None:  # noqa: B027 - most sets have all fields everywhere
        """Raise UserError if a part of the set, such as one of its files, lacks one of these fields."""


class Joined(Records):
    """One field of several sets, one set after another, under the name that it has in the first."""

    def __init__(self, parts: Sequence[Records], names: Sequence[str]) -> None:
        self.parts, self._names = tuple(parts), tuple(names)
        self.label = " + ".join(part.label for part in parts)
        self.fields = {names[0]: parts[0].fields[names[0]]}
        self.fingerprint = digest(repr([(p.fingerprint, n) for p, n in zip(parts, names, strict=True)]).encode())
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, indices: Sequence[int], fields: Sequence[str]) -> list[dict[str, Any] | Bad]:
        found: list[dict[str, Any] | Bad] = [{}] * len(indices)
        which, inside = self._place(indices)
        for part in np.unique(which) if fields else ():
            rows = np.flatnonzero(which == part)
            values = read(self.parts[part], inside[rows].tolist(), [self._names[part]])
            for row, value in zip(rows.tolist(), values, strict=True):
                found[row] = value if isinstance(value, Bad) else {fields[0]: value[self._names[part]]}
        return found

    def where(self, index: int) -> str:
        which, inside = self._place([index])
        return self.parts[which[0]].where(int(inside[0]))

    def _place(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        wanted = np.asarray(indices, np.int64)
        which = np.searchsorted(self._ends, wanted, side="right")
        return which, wanted - np.concatenate([[0], self._ends])[which]


class Known(Records):
    """Records whose labels are numbered by the classes that a model was trained on, matched by name.

    A record of any other class is bad. If the records' own classes have no names, their numbers are the model's.
    """

    def __init__(self, records: Records, label: str, classes: Sequence[str]) -> None:
        self.records, self.label, self.fingerprint, self.whole = (
            records, records.label, records.fingerprint, records.whole,
        )  # fmt: skip
        own = records.fields[label]
        self.fields = {**records.fields, label: replace(own, names=tuple(classes))}
        places = {name: at for at, name in enumerate(classes)}
        self._label, self._classes, self._names = label, tuple(classes), own.names
        self._to = [places.get(name) for name in own.names] or list(range(len(classes)))

    def __len__(self) -> int:
        return len(self.records)

    def where(self, index: int) -> str:
        return self.records.where(index)

    def check(self, fields: Sequence[str]) -> None:
        self.records.check(fields)

    def read(self, indices: Sequence[int], fields: Sequence[str]) -> list[dict[str, Any] | Bad]:
        found = read(self.records, indices, fields)
        kind = self.fields[self._label].kind
        if self._label not in fields or kind not in ("label", "labels", "boxes"):
            return found
        return [self._one(index, value) for index, value in zip(indices, found, strict=True)]

    def _one(self, index: int, value: dict[str, Any] | Bad) -> dict[str, Any] | Bad:
        if isinstance(value, Bad):
            return value
        label = value[self._label]
        several, boxes = isinstance(label, tuple), self.fields[self._label].kind == "boxes"
        if boxes and unfit(self._label, label, self.records.fields[self._label]):
            return value  # the reader says why
        each = label[:, 4].astype(int).tolist() if boxes else label if several else (label,)
        places = [at if at < 0 else self._to[at] if at < len(self._to) else None for at in each]  # below 0: ignored
        if None in places:
            at = each[places.index(None)]
            own_name = repr(self._names[at]) if at < len(self._names) else at
            known = ", ".join(self._classes[:10]) + (", ..." if len(self._classes) > 10 else "")
            return Bad(
                self.where(index), f"{self._label} is {own_name}, expected one of {known}, which were trained on"
            )
        if boxes:
            return {**value, self._label: np.column_stack([label[:, :4], np.array(places, label.dtype)])}
        return {**value, self._label: tuple(places) if several else places[0]}


class Row(dict[str, Any]):
    """The fields of a record, and its `index` in its set."""

    def __init__(self, values: Mapping[str, Any], index: int) -> None:
        super().__init__(values)
        self.index = index


class Reader:
    """Reads fields of records, leaving out the records that cannot be read.

    Values of any kind of set are checked against their `Field`s here (`unfit`). Each bad record is logged once by name
    and counted; more than `limit` of them stop the run. Empty texts are left out and counted separately.
    """

    def __init__(self, records: Records, fields: Sequence[str], limit: int) -> None:
        self.records, self.fields, self.limit = records, tuple(fields), limit
        records.check(self.fields)
        self._bad: dict[int, Bad] = {}
        self._empty = 0
        self._lock = threading.Lock()

    @property
    def left_out(self) -> int:
        """How many records have been found bad so far, not counting empty texts."""
        return len(self._bad) - self._empty

    def rows(self, indices: Sequence[int] | np.ndarray) -> tuple[list[Row], np.ndarray]:
        """Read these records, replacing each bad one by the next good one; also return which were replaced, bool (B,).

        Thread-safe; the result is a function of the indices alone.

        Raises: UserError if more than the limit are bad.
        """
        wanted = [int(i) for i in indices]
        places, rows = [self._good(i) for i in wanted], [Row({}, -1)] * len(wanted)
        left = list(range(len(wanted)))
        while left:
            values = self._read([places[k] for k in left])
            again = []
            for k, value in zip(left, values, strict=True):
                if isinstance(value, Bad):
                    self._leave_out(places[k], value)
                    places[k] = self._good(places[k])
                    again.append(k)
                else:
                    rows[k] = Row(value, places[k])
            left = again
        return rows, np.array(places, np.int64) != np.array(wanted, np.int64)

    def all(self) -> Iterator[list[Row]]:
        """Yield every good record once and in order, in chunks.

        Raises: UserError if more than the limit are bad.
        """
        before, found = self._empty, 0
        for start in range(0, len(self.records), _AT_ONCE):
            some = [i for i in range(start, min(start + _AT_ONCE, len(self.records))) if i not in self._bad]
            good = []
            for index, value in zip(some, self._read(some), strict=True):
                if isinstance(value, Bad):
                    self._leave_out(index, value)
                else:
                    good.append(Row(value, index))
            found += len(good)
            yield good
        if self._empty > before:
            _log.warning("left out %s empty texts of %s", f"{self._empty:,}", self.records.label)
        if self._bad and not found:
            raise self._none_good()

    def bad(self, index: int, reason: str) -> None:
        """Leave out a record that turned out to be bad after it was read, by its `Row.index`, and log why.

        Afterwards `rows` returns its replacement.

        Raises: UserError if more than the limit are bad.
        """
        self._leave_out(index, Bad(self.records.where(index), reason))

    def _read(self, indices: Sequence[int]) -> list[dict[str, Any] | Bad]:
        return [
            value if isinstance(value, Bad) else self._fit(index, value)
            for index, value in zip(indices, read(self.records, indices, self.fields), strict=True)
        ]

    def _fit(self, index: int, values: dict[str, Any]) -> dict[str, Any] | Bad:
        for name in self.fields:
            if isinstance(value := values[name], str):  # a byte order mark belongs to the file that the text came from
                values[name] = value = value.removeprefix("\ufeff")
            if reason := unfit(name, value, self.records.fields[name]):
                return Bad(self.records.where(index), reason, reason is EMPTY)
        return values

    def _good(self, index: int) -> int:
        n = len(self.records)
        for place in range(index, index + n):
            if place % n not in self._bad:
                return place % n
        raise self._none_good()

    def _none_good(self) -> UserError:
        return UserError(
            f"got {self.records.label}, all {len(self.records):,} records of which are bad (the last: {self._last()}), "
            "expected some that can be read, try repairing them"
        )

    def _leave_out(self, index: int, bad: Bad) -> None:
        with self._lock:
            if index in self._bad:
                return
            self._bad[index] = bad
            self._empty += bad.empty
            count, last = self.left_out, self._last()
        if bad.empty:
            return
        _log.warning("left out %s", bad)
        if count > self.limit:
            raise UserError(
                f"got {count:,} bad records in {self.records.label} (the last: {last}), "
                f"expected at most {self.limit:,}, try repairing them or --data.bad-records {10 * max(self.limit, 1)}"
            )

    def _last(self) -> str:
        return "; ".join(map(str, list(self._bad.values())[-_SHOWN:]))


def read(records: Records, indices: Sequence[int], fields: Sequence[str]) -> list[dict[str, Any] | Bad]:
    """Read these fields of these records.

    Raises:
        UserError: the set's class does not give one record with all of them for each index.
    """
    found: Any = records.read(indices, fields)
    if not isinstance(found, list | tuple) or len(found) != len(indices):
        given = f"{len(found)} records" if isinstance(found, list | tuple) else shown(found)
        raise UserError(
            f"got {named(type(records))}, whose read gives {given} for {len(indices)} indices, expected a list of one "
            "record for each"
        )
    wanted = set(fields)
    for record in found:
        if not isinstance(record, Bad) and not (isinstance(record, dict) and record.keys() >= wanted):
            raise UserError(
                f"got {named(type(records))}, whose read gives {shown(record)}, expected a dict with "
                f"{', '.join(fields)}, or a Bad"
            )
    return list(found)


def hash_fraction(key: bytes) -> float:
    """Return a hash of a record as a number in [0, 1); records below `eval_fraction` are held out."""
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") / 2**64


def digest(content: bytes) -> str:
    """Return a short hash, for a fingerprint."""
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def check_fraction(eval_fraction: float) -> None:
    """Raise UserError unless a fraction is in [0, 1)."""
    if not 0 <= eval_fraction < 1:
        raise UserError(
            f"got data.eval_fraction {eval_fraction}, expected 0 <= fraction < 1, try --data.eval-fraction 0.1"
        )


def check_unused_fraction(cfg: FilesConfig, why: str) -> None:
    """Raise UserError if `data.eval_fraction` was set but has no effect, for the reason `why`."""
    if cfg.eval_fraction != (usual := default(cfg, "eval_fraction")):
        raise UserError(
            f"got data.eval_fraction {cfg.eval_fraction} although {why}, expected one of them, "
            f"try --data.eval-fraction {usual}"
        )


def check_some(records: Records, split: str) -> None:
    """Raise UserError if a split by hash has left nothing to `split` on."""
    if not len(records):
        raise UserError(
            f"got 0 records to {split} on in {records.label}, expected at least 1, try more data, "
            "another --data.eval-fraction or --data.eval-path"
        )


def distinct(names: Sequence[str]) -> list[str]:
    """Make names unique: of equal names, all except the first get their number appended."""
    seen: set[str] = set()
    found = []
    for index, name in enumerate(names):
        own = name if name not in seen else f"{name} ({index})"
        seen.add(own)
        found.append(own)
    return found
