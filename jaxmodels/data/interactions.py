"""What users bought, watched or read, and when: tables of interactions, whose records are the histories of users."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from jaxmodels.data import corpus
from jaxmodels.data.columns import in_order
from jaxmodels.data.files import File, open_file, shown
from jaxmodels.data.records import Bad, Field, Records, digest, distinct
from jaxmodels.data.section import RecordsConfig
from jaxmodels.data.source import Split
from jaxmodels.errors import UserError, nearest

_log = logging.getLogger("jaxmodels")

_LATEST = 253_402_300_800.0
"""The year 10,000: a time beyond it is in milliseconds or in nanoseconds."""


@dataclass(frozen=True)
class Interactions(RecordsConfig):
    """Tables of who did something with which item, and when. A record is the history of a user.

    By time: a user's new items from `eval_from` on are to be predicted from those before. Without it, each user's last
    item is. Items that the user had before are never among those to be predicted.
    """

    evaluated_by: ClassVar[tuple[str, ...]] = ("path", "items", "eval_from", "eval_until")
    instead: ClassVar[str] = "--data.path FILE"

    path: tuple[str, ...] = ()
    """Tables with a row for each interaction."""
    items: tuple[str, ...] = ()
    """Tables with a row for each item, and its name. Empty: the items that occur in `path`, without names."""
    user_field: str = "user"
    """Column of the user, any text or number."""
    item_field: str = "item"
    """Column of the item, in both tables."""
    time_field: str = "time"
    """Column of the time, in seconds since 1970 (UTC). Rows of equal time are one basket, without an order."""
    name_field: str = "description"
    """Column of the items' names."""
    eval_from: str = ""
    """Day (2011-11-01, UTC) from which a user's new items are to be predicted. Empty: each user's last item is."""
    eval_until: str = ""
    """Day before which they are. Empty: all from `eval_from` on."""
    train_until: str = ""
    """Day before which interactions are trained on. Empty: `eval_from`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        until, first, last = (
            _seconds(name, getattr(self, name)) for name in ("train_until", "eval_from", "eval_until")
        )
        if self.name_field != type(self).name_field and not self.items:
            raise UserError(
                f"got data.name_field {self.name_field} without data.items, expected the tables that have the column, "
                "try --data.items items.csv"
            )
        if first is None and (self.train_until or self.eval_until):
            name, day = ("train_until", self.train_until) if self.train_until else ("eval_until", self.eval_until)
            raise UserError(f"got data.{name} {day} without data.eval_from, expected both, try --data.eval-from {day}")
        if first is not None and until is not None and first < until:
            raise UserError(
                f"got data.eval_from {self.eval_from} before data.train_until {self.train_until}, expected "
                f"nothing that is trained on to be predicted, try --data.eval-from {self.train_until}"
            )
        if first is not None and last is not None and last <= first:
            raise UserError(
                f"got data.eval_until {self.eval_until} and data.eval_from {self.eval_from}, expected a later day, "
                "try without --data.eval-until"
            )

    def records(self, split: Split) -> Histories:
        found = _read(
            _stamped(self.path, "path"),
            _stamped(self.items, "items") if self.items else (),
            self._columns,
            self.bad_records,
        )
        return histories(found, self, split)

    @property
    def _columns(self) -> _Columns:
        return _Columns(self.user_field, self.item_field, self.time_field, self.name_field)

    def evaluated_on(self, fields: Mapping[str, Any]) -> Interactions:
        """Return the source with these fields changed; what was trained on stays so, and cannot be predicted."""
        if fields.get("path", self.path) != self.path:  # other users
            return dataclasses.replace(self, **{"train_until": "", **fields})
        if fields.get("eval_from") and not self.eval_from:
            raise UserError(
                f"got data.eval_from {fields['eval_from']} for a run that has trained on all but the last item of "
                "each user, expected one that was trained on what is before a day, try another run"
            )
        return dataclasses.replace(self, **{"train_until": self.train_until or self.eval_from, **fields})


class _Columns(NamedTuple):
    user: str
    item: str
    time: str
    name: str


class Log(NamedTuple):
    """All interactions, by user and time; of one time, by item."""

    label: str
    users: tuple[str, ...]
    items: tuple[str, ...]
    """Names of the items."""
    user: np.ndarray
    """(N,), as are the next two."""
    item: np.ndarray
    time: np.ndarray


class Histories(Records):
    """The histories of users, and the items that each is to be predicted to take next.

    Fields: `user`; `items` in the order in which they were taken; `times` of each; `held`, those to be predicted, of
    which there are none in training.
    """

    def __init__(
        self, log: Log, split: Split, users: np.ndarray, past: list[np.ndarray], held: list[np.ndarray]
    ) -> None:
        """`past` has the rows of the log, and `held` the items, of each of `users`."""
        self.label, self._log, self._users, self._past, self._held = log.label, log, users, past, held
        self.fields = {
            "user": Field("label", names=log.users),
            "items": Field("labels", names=log.items),
            "times": Field("array", shape=(None,), dtype=log.time.dtype.name),
            "held": Field("labels", names=log.items),
        }
        parts = [split.encode(), repr((log.users, log.items)).encode(), users.tobytes()]
        parts += [b"".join(part.tobytes() + b"," for part in parts) for parts in (past, held)]
        self.fingerprint = digest(b";".join([*parts, log.item.tobytes(), log.time.tobytes()]))

    def __len__(self) -> int:
        return len(self._users)

    def where(self, index: int) -> str:
        return f"{self.label}, user {self._log.users[self._users[index]]}"

    def read(self, indices: Sequence[int], fields: Sequence[str]) -> list[dict[str, Any] | Bad]:
        return [{name: self._value(name, index) for name in fields} for index in indices]

    def _value(self, name: str, index: int) -> Any:
        if name == "user":
            return int(self._users[index])
        if name == "held":
            return tuple(self._held[index].tolist())
        past = self._past[index]
        return self._log.time[past] if name == "times" else tuple(self._log.item[past].tolist())


def histories(log: Log, cfg: Interactions, split: Split) -> Histories:
    """Divide a log by time or, without `eval_from`, into each user's last item and those before.

    Users without a history, or without anything to predict, are left out.

    Raises: UserError if none are left.
    """
    starts = np.searchsorted(log.user, np.arange(len(log.users) + 1))
    first, last = (_seconds(name, getattr(cfg, name)) for name in ("eval_from", "eval_until"))
    until = first if (found := _seconds("train_until", cfg.train_until)) is None else found
    users: list[int] = []
    past: list[np.ndarray] = []
    held: list[np.ndarray] = []
    for user, (start, end) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)):
        times = log.time[start:end]
        if first is None or until is None:
            cut, stop = max(end - 1, start), end
        else:
            cut = start + int(np.searchsorted(times, until if split == "train" else first))
            stop = end if last is None else start + int(np.searchsorted(times, last))
        rows, new = np.arange(start, cut), np.empty(0, np.int32)
        if split == "eval":
            new = np.setdiff1d(log.item[cut:stop], log.item[rows])
        if len(rows) > (split == "train") and (split == "train" or len(new)):
            users.append(user)
            past.append(rows)
            held.append(new)
    if not users:
        raise UserError(
            f"got no history in {log.label} to {split} on, expected users with two items before data.eval_from, or one "
            "before and a new one later, try another --data.eval-from"
        )
    return Histories(log, split, np.array(users, np.int64), past, held)


def _seconds(name: str, day: str) -> float | None:
    """Return a day as seconds since 1970; None if it is empty."""
    if not day:
        return None
    try:
        found = datetime.fromisoformat(day)
    except ValueError:
        flag = name.replace("_", "-")
        raise UserError(f"got data.{name} {day!r}, expected a day, try --data.{flag} 2011-11-01") from None
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()


def _stamped(patterns: Sequence[str], option: str) -> tuple[tuple[Path, int, int], ...]:
    """Return files with size and time, the key under which a log is cached."""
    files = corpus.expand(patterns, "table", f"data.{option}")
    return tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in files)


@functools.lru_cache(2)
def _read(
    files: tuple[tuple[Path, int, int], ...], items: tuple[tuple[Path, int, int], ...], columns: _Columns, limit: int
) -> Log:
    """Read all interactions. Rows that cannot be read are named, counted and left out, up to a limit."""
    label = " + ".join(path.name for path, *_ in files)
    bad: list[Bad] = []
    names = _names([open_file(path) for path, *_ in items], columns, bad)
    users, taken, times = [], [], []
    for table in [open_file(path) for path, *_ in files]:
        _check(table, (columns.user, columns.item, columns.time))
        for row, (values, _) in enumerate(table.rows()):
            reason, user, item, time = _one(values, columns, names if items else None)
            if reason:
                bad.append(Bad(f"{table.path}:{table.line(row)}", reason))
            else:
                users.append(user)
                taken.append(item)
                times.append(time)
    for one in bad[: limit + 1]:
        _log.warning("left out %s", one)
    if len(bad) > limit:
        raise UserError(
            f"got {len(bad):,} bad rows in {label} (the first: {bad[0]}), expected at most {limit:,}, "
            f"try repairing them or --data.bad-records {len(bad)}"
        )
    if not users:
        raise UserError(f"got {label} without an interaction, expected some, try another --data.path")
    if not items:
        names = {item: item for item in sorted(set(taken), key=in_order)}
    known = sorted(set(users), key=in_order)
    user, item = (
        np.array(list(map({name: at for at, name in enumerate(order)}.__getitem__, found)), np.int32)
        for order, found in ((known, users), (names, taken))
    )
    time = np.array(times)
    if (time == np.trunc(time)).all():
        time = time.astype(np.int64)
    order = np.lexsort((item, time, user))
    return Log(label, tuple(known), tuple(distinct(list(names.values()))), user[order], item[order], time[order])


def _names(tables: Sequence[File], columns: _Columns, bad: list[Bad]) -> dict[str, str]:
    """Return the name of each item, in the order of its row; one without a name is called as it is numbered."""
    names: dict[str, str] = {}
    for table in tables:
        _check(table, (columns.item, columns.name))
        for row, (values, _) in enumerate(table.rows()):
            item = "" if isinstance(values, str) else _text(values.get(columns.item))
            if isinstance(values, str) or not item or item in names:
                reason = (
                    values if isinstance(values, str) else f"{columns.item} is {'given twice' if item else 'missing'}"
                )
                bad.append(Bad(f"{table.path}:{table.line(row)}", reason))
            else:
                names[item] = _text(values.get(columns.name)) or item
    return names


def _check(table: File, wanted: Sequence[str]) -> None:
    """Refuse a table without a column that is named."""
    columns = table.columns
    for name in wanted if columns is not None else ():
        if name not in (columns or ()):
            raise UserError(
                f"got {table.path} without the column {name!r}, expected it among {', '.join(columns or ())}"
                f"{nearest(name, columns or ())}, try --data.user-field, --data.item-field, --data.time-field or "
                "--data.name-field"
            )


def _one(
    values: dict[str, Any] | str, columns: _Columns, names: Mapping[str, str] | None
) -> tuple[str, str, str, float]:
    """Return why a row is no interaction, or nothing; and its user, item and time."""
    if isinstance(values, str):
        return values, "", "", 0
    user, item = _text(values.get(columns.user)), _text(values.get(columns.item))
    text = values.get(columns.time, "")
    try:
        time = math.nan if isinstance(text, bool) else float(text)
    except (TypeError, ValueError, OverflowError):
        time = math.nan
    reason = ""
    if not user or not item:
        name = columns.item if user else columns.user
        absent = values.get(name) is None or values[name] != values[name] or not str(values[name]).strip()
        reason = f"{name} is {'missing' if absent else f'{shown(values[name])}, expected a text or a number'}"
    elif not abs(time) < _LATEST:
        reason = f"{columns.time} is {shown(text)}, expected seconds since 1970"
    elif names is not None and item not in names:
        reason = f"{columns.item} is {item!r}, which is not among the items"
    return reason, user, item, 0 if reason else time


def _text(value: Any) -> str:
    """Return a text or a number as text, the same for 5 and 5.0; empty if it is neither."""
    if value is None or isinstance(value, bool | list | dict) or value != value:  # the last is NaN
        return ""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()
