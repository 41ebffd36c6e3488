"""Examples of two towers: an item that a user took, beside the history before it, and the words of their names."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import numpy as np

from jaxmodels.data.contract import IGNORED
from jaxmodels.data.histories import Drawn, filled, half_life_weights, last_items, readable
from jaxmodels.data.opening import Opening
from jaxmodels.data.source import Source, fingerprint
from jaxmodels.data.transforms import draws
from jaxmodels.errors import UserError

ANY_USER = 2**24
"""The bound of users' numbers that no model reads; any number is below it."""


class Purchases(Source):
    """Rows of a user, `user` (N,), a history, `tokens` and `segment_ids` (N, T), and an `item` (N,).

    In training the item was taken after the history, whose baskets are all earlier; `log_q` (N,) is the logarithm of
    its share of all rows, and `other` (N,) is an item drawn in each epoch with equal chances. With a `half_life` in
    days, an epoch has a row half as often for each half-life that its item is older than another.

    In evaluation the user and the item of a row have nothing to do with each other: there are all users and all items.
    `seen` (N, S) and `held` (N, K) are the user's, filled up with IGNORED, and all IGNORED where there is no user; so
    is the item where there is none.

    With a number of `words`, `words` (N, T + 1, W) are those of the names of the history and of the item, and
    `other_words` (N, W) those of the other.
    """

    def __init__(self, opening: Opening, half_life: float | None, words: int | None, name_words: int) -> None:
        fields, rows = readable(opening, ("seq_len",))
        most, users = (opening.fields or {})["user"].below, len(fields["user"].names)
        if most is not None and users > most:
            raise UserError(f"got {users:,} users, expected at most model.users {most:,}, try --model.users {users}")
        self.split, self.label, self._length = opening.split, opening.data.kind, opening.data.seq_len
        self._seed, self.class_names = opening.seed, fields["items"].names
        self.kind, self.field = "array", "items"
        self._users = np.array([row["user"] for row in rows], np.int32)
        if most is not None and most < ANY_USER:  # a model that has a vector of each user, by its number
            self.groups = fields["user"].names
            if opening.groups and self.groups != tuple(opening.groups):
                others = sorted(set(self.groups) - set(opening.groups)) or ["fewer"]
                raise UserError(
                    f"got users that the model was not trained on ({', '.join(others[:3])}), expected those that its "
                    "vectors belong to, try the table that it was trained on, or a model without model.users"
                )
        self._items = [np.array(row["items"], np.int32) for row in rows]
        self._times = [np.asarray(row["times"], np.float64) for row in rows]
        self._held = [np.array(row["held"], np.int32) for row in rows]
        self._words = None if words is None else words_of(self.class_names, words, name_words)
        self._drawn: Drawn | None = None
        self._log_q = np.zeros(len(self.class_names), np.float32)
        if opening.split == "train":
            # an item, and where the baskets before it end
            before = [np.searchsorted(times, times, side="left") for times in self._times]
            found = [(user, at, end) for user, ends in enumerate(before) for at, end in enumerate(ends.tolist()) if end]
            self._rows = np.array(found, np.int64).reshape(-1, 3)
            if not len(self._rows):
                raise UserError("got no history of two times to train on, expected some, try another --data.path")
            weights = np.ones(len(self._rows))
            if half_life is not None:
                weights = half_life_weights(np.array([self._times[u][at] for u, at, _ in found]), half_life)
                self._drawn = Drawn(weights, opening.seed)
            taken = np.array([self._items[u][at] for u, at, _ in found])
            share = np.bincount(taken, weights, len(self.class_names)) / weights.sum()
            self._log_q = np.log(np.maximum(share, 1e-12)).astype(np.float32)
        facts = ("purchases", self.split, self._length, self.class_names, half_life, words, name_words)
        self.fingerprint = fingerprint([np.concatenate(x) for x in (self._items, self._times, self._held)], *facts)

    def __len__(self) -> int:
        return len(self._rows) if self.split == "train" else max(len(self._users), len(self.class_names))

    def batch(self, indices: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        if self.split == "eval":
            return self._evaluated(indices)
        chance = draws(self._seed, epochs, indices, 1)[:, 0]
        rows = self._rows[indices if self._drawn is None else self._drawn(indices, epochs)]
        item = np.array([self._items[user][at] for user, at, _ in rows], np.int32)
        found = self._of_users([(user, end) for user, _, end in rows], item)
        return {**found, **self._beside(item, (chance * len(self.class_names)).astype(np.int32))}

    def _beside(self, item: np.ndarray, other: np.ndarray) -> dict[str, np.ndarray]:
        """How often items are drawn, and other items with their words."""
        words = {} if self._words is None else {"other_words": self._words[other]}
        return {"log_q": self._log_q[item], "other": other, **words}

    def _evaluated(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        users, items, none = len(self._users), len(self.class_names), np.empty(0, np.int32)
        item = np.where(indices < items, indices, IGNORED).astype(np.int32)
        there = [user if user < users else None for user in indices.tolist()]
        found = self._of_users([(0 if user is None else user, None) for user in there], item)
        for name, each in (("seen", self._items), ("held", self._held)):
            found[name] = filled([none if user is None else each[user] for user in there], max(map(len, each)))
        return {**found, **self._beside(item, np.maximum(item, 0))}

    def _of_users(self, rows: Sequence[tuple[int, int | None]], item: np.ndarray) -> dict[str, np.ndarray]:
        """Lay out users whose histories end somewhere, beside items."""
        laid = [last_items(self._items[user][:end], self._length) for user, end in rows]
        tokens, segments = (np.stack(each) for each in zip(*laid, strict=True))
        found = {
            "user": self._users[[user for user, _ in rows]],
            "tokens": tokens,
            "segment_ids": segments,
            "item": item,
        }
        if self._words is not None:
            both = np.concatenate([np.where(segments > 0, tokens, IGNORED), item[:, None]], 1)
            found["words"] = np.where((both >= 0)[..., None], self._words[np.maximum(both, 0)], IGNORED)
        return found

    def describe(self) -> str:
        users, items = len(self._users), len(self.class_names)
        return f"{self.label}: {len(self):,} rows, {users:,} users and {items:,} items ({self.split})"


def words_of(names: Sequence[str], count: int, width: int) -> np.ndarray:
    """Hash the words of each name to numbers below `count`, (N, width); IGNORED where there are fewer."""
    found = np.full((len(names), width), IGNORED, np.int32)
    for row, name in zip(found, names, strict=True):
        words = [zlib.crc32(word.encode()) % count for word in re.findall(r"\w+", name.casefold())][:width]
        row[: len(words)] = words
    return found
