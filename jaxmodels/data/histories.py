"""Examples of the histories of users: sequences of items, each with one that is taken later."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxmodels.data.contract import IGNORED
from jaxmodels.data.examples import open_records
from jaxmodels.data.opening import Opening
from jaxmodels.data.records import Field, Reader, Row
from jaxmodels.data.source import Source, fingerprint
from jaxmodels.data.transforms import draws
from jaxmodels.errors import UserError

_USED = ("bad_records",)
_DAY = 86_400.0


def readable(opening: Opening, used: Sequence[str] = ()) -> tuple[dict[str, Field], list[Row]]:
    """Read the histories of a split, with the fields that they have.

    Raises:
        UserError: the source has no histories, has too many items for the model, or others than it was trained on.
    """
    data: Any = opening.data
    opening.check((*_USED, *used), "histories")
    records = open_records(data, opening.split)
    fields = dict(records.fields)
    for name in ("items", "times", "held"):
        if name not in fields:
            raise UserError(
                f"got {records.label} with the fields {', '.join(sorted(fields))}, expected the histories of users "
                f"({name} is missing), try --data interactions"
            )
    names = fields["items"].names
    if opening.classes and tuple(opening.classes) != names:
        raise UserError(
            f"got {records.label} with {len(names):,} items, expected the same {len(opening.classes):,} in the same "
            "order as in training, try --data.items with the table that the run was trained with"
        )
    if opening.vocab_size is not None and len(names) > opening.vocab_size:
        raise UserError(
            f"got {records.label} with {len(names):,} items, expected at most model.vocab_size {opening.vocab_size:,}, "
            f"try --model.vocab-size {len(names)}"
        )
    reader = Reader(records, [name for name in ("user", "items", "times", "held") if name in fields], data.bad_records)
    return fields, [row for some in reader.all() for row in some]


class Sequences(Source):
    """Histories as rows of T items that end at the right, `tokens` (N, T), where `segment_ids` are 0 for padding.

    In training `targets` (N, T) are the item that follows or, with a `horizon`, one drawn in each epoch of so many that
    follow the basket: those of one time have no order, so that they are put into another one in each epoch. Longer
    histories make several rows. With a `half_life` in days, a target counts half as often for each half-life that it is
    older than another: an epoch has a row as often as its newest target counts, and others of the row by chance. With
    `places`, `targets` (N, P) are so many of those that count, drawn in each epoch, and `at` (N, P) says where they
    are.

    In evaluation a row has no targets, but a user's last items, all that the user had, `seen` (N, S), and those to be
    predicted, `held` (N, K), both filled up with IGNORED.
    """

    def __init__(
        self, opening: Opening, horizon: int = 0, half_life: float | None = None, places: int | None = None
    ) -> None:
        fields, rows = readable(opening, ("seq_len",))
        self.split, self.label, self._length, self._seed = (
            opening.split,
            f"{opening.data.kind}",
            opening.data.seq_len,
            opening.seed,
        )
        self.class_names = fields["items"].names
        self.kind, self.field = "array", "items"
        self._horizon, self._half_life, self._places = horizon, half_life, places
        self._items = [np.array(row["items"], np.int32) for row in rows]
        self._times = [np.asarray(row["times"], np.float64) for row in rows]
        self._held = [np.array(row["held"], np.int32) for row in rows]
        self._most = max(map(len, self._items), default=0)
        if self.split == "train":
            # the windows of a history end where it does, and where the next one begins
            ends = [
                (user, end) for user, items in enumerate(self._items) for end in range(len(items) - 1, 0, -self._length)
            ]
        else:
            ends = [(user, len(items)) for user, items in enumerate(self._items)]
        self._ends = np.array(ends, np.int64).reshape(-1, 2)
        if not len(self._ends):
            raise UserError(
                f"got no history to {self.split} on, expected users with two items, try another --data.path"
            )
        self._newest = np.array([self._last_target(*row) for row in ends])
        self._drawn = None if half_life is None else Drawn(half_life_weights(self._newest, half_life), opening.seed)
        facts = ("sequences", self.split, self._length, self.class_names, horizon, half_life, places)
        self.fingerprint = fingerprint([np.concatenate(x) for x in (self._items, self._times, self._held)], *facts)

    def __len__(self) -> int:
        return len(self._ends)

    def batch(self, indices: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        T, rows, order = self._length, len(indices), indices
        if self._drawn is not None and self.split == "train":
            indices = self._drawn(indices, epochs)
        users, ends = self._ends[indices].T.tolist()
        tokens, segments = np.zeros((2, rows, T), np.int32)
        targets = np.full((rows, T), IGNORED, np.int32)
        if self.split == "train":
            chance = draws(self._seed, epochs, order, self._most)
            chosen = draws(self._seed + 1, epochs, order, 3 * T).reshape(rows, 3, T)
        for row, (user, end) in enumerate(zip(users, ends, strict=True)):
            items = self._items[user]
            if self.split == "train":
                times, start = self._times[user], max(0, end - T)
                items = items[np.lexsort((chance[row, : len(items)], times))]
                which, kept, _ = chosen[row, :, : end - start]
                at, newest = np.arange(start, end), float(self._newest[indices[row]])
                targets[row, T - (end - start) :] = self._targets(items, times, newest, at, which, kept)
            tokens[row], segments[row] = last_items(items[:end], T)
        found = {"tokens": tokens, "segment_ids": segments, "targets": targets}
        if self._places is not None:
            # those that count come first, in an order by chance
            first = np.where(targets < 0, 1.0, chosen[:, 2]) if self.split == "train" else np.zeros(targets.shape)
            found["at"] = np.sort(np.argsort(first, axis=1, kind="stable")[:, : self._places]).astype(np.int32)
            found["targets"] = np.take_along_axis(targets, found["at"], 1)
        if self.split == "eval":
            found |= {
                "seen": filled([self._items[user] for user in users], self._most),
                "held": filled([self._held[user] for user in users], max(map(len, self._held))),
            }
        return found

    def _last_target(self, user: int, end: int) -> float:
        """Return the time of the newest item that may be a target of the row that ends before `end`."""
        times = self._times[user]
        later = int(np.searchsorted(times, times[end - 1], side="right")) + self._horizon - 1 if self._horizon else end
        return float(times[min(later, len(times) - 1)])

    def _targets(
        self, items: np.ndarray, times: np.ndarray, newest: float, at: np.ndarray, which: np.ndarray, kept: np.ndarray
    ) -> np.ndarray:
        """Draw what is to be predicted at the places `at` of a history, by numbers in [0, 1) for each of them."""
        places, counts = at + 1, np.ones(len(at), bool)
        if self._horizon:
            later = np.searchsorted(times, times[at], side="right")
            room = np.minimum(len(items) - later, self._horizon)
            counts, places = room > 0, np.minimum(later + (which * room).astype(np.int64), len(items) - 1)
        if self._half_life is not None:
            counts = counts & (kept < 0.5 ** ((newest - times[places]) / (_DAY * self._half_life)))
        return np.where(counts, items[places], IGNORED)

    def describe(self) -> str:
        users, items = len(self._items), len(self.class_names)
        return (
            f"{self.label}: {len(self):,} rows of {self._length} of {users:,} users and {items:,} items ({self.split})"
        )


class Drawn:
    """Which of n examples fill an epoch's n places: each as often as its weight says, rounded at random."""

    def __init__(self, weights: np.ndarray, seed: int) -> None:
        self._ends, self._seed = np.cumsum(weights) / weights.sum(), seed

    def __call__(self, places: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        chance = draws(self._seed + 2, epochs, np.zeros_like(places), 1)[:, 0]
        return np.minimum(np.searchsorted(self._ends, (places + chance) / len(self._ends)), len(self._ends) - 1)


def half_life_weights(times: np.ndarray, half_life: float) -> np.ndarray:
    """Return weights that halve for each half-life, in days, by which a time in seconds is before the newest."""
    return 0.5 ** ((times.max() - times) / (_DAY * half_life))


def last_items(items: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Lay out the last items of a history at the right of a row (T,), beside segment ids, which are 0 before it."""
    tokens, segments = np.zeros((2, length), np.int32)
    count = min(len(items), length)
    tokens[length - count :], segments[length - count :] = items[len(items) - count :], 1
    return tokens, segments


def filled(rows: Sequence[np.ndarray], width: int) -> np.ndarray:
    """Lay out numbers of unequal count as rows (N, width), filled up with IGNORED."""
    found = np.full((len(rows), width), IGNORED, np.int32)
    for row, numbers in zip(found, rows, strict=True):
        row[: len(numbers)] = numbers
    return found
