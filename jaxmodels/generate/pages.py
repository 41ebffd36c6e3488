"""Which pages of a key-value cache are free, held, or kept because a later text may begin in the same way."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np


def digests(tokens: Sequence[int], size: int, salt: str = "") -> list[bytes]:
    """The names of the full pages of a text: each is a hash of all tokens up to the end of its page.

    Texts of another `salt`, such as those of another adapter, share no page.
    """
    found, before = [], salt.encode()
    ids = np.asarray(tokens, np.int32)
    for first in range(0, len(ids) - size + 1, size):
        before = hashlib.blake2b(before + ids[first : first + size].tobytes(), digest_size=16).digest()
        found.append(before)
    return found


class Pages:
    """A pool of pages with counts of their holders; a page that nobody holds keeps what it has until it is needed."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size
        self._held = [0] * count
        self._empty = list(range(count))[::-1]
        self._kept: OrderedDict[int, None] = OrderedDict()
        """Pages without a holder whose contents are known, the one that was let go first in front."""
        self._known: dict[bytes, int] = {}
        self._names: dict[int, bytes] = {}

    @property
    def free(self) -> int:
        """How many pages can be taken."""
        return len(self._empty) + len(self._kept)

    @property
    def use(self) -> float:
        """The share of pages that are held."""
        return 1 - self.free / self.count

    def take(self, count: int) -> list[int]:
        """Take pages, the empty ones first; there must be as many."""
        assert count <= self.free
        taken = []
        for _ in range(count):
            if self._empty:
                page = self._empty.pop()
            else:
                page, _ = self._kept.popitem(last=False)
                del self._known[self._names.pop(page)]
            self._held[page] = 1
            taken.append(page)
        return taken

    def find(self, names: Sequence[bytes]) -> list[int]:
        """Return the pages that have the beginning of a text, without holding them."""
        found = []
        for name in names:
            if name not in self._known:
                break
            found.append(self._known[name])
        return found

    def hold(self, pages: Sequence[int]) -> None:
        """Add a holder to pages that were found."""
        for page in pages:
            self._held[page] += 1
            self._kept.pop(page, None)

    def name(self, page: int, name: bytes) -> None:
        """Say what a page that is held has, so that others find it; nothing if another page has the same."""
        if name not in self._known and page not in self._names:
            self._known[name], self._names[page] = page, name

    def release(self, pages: Sequence[int]) -> None:
        """Give up the hold of pages; of a text's pages the last ones are the first to be taken again."""
        for page in reversed(pages):
            self._held[page] -= 1
            if self._held[page]:
                continue
            if page in self._names:
                self._kept[page] = None
            else:
                self._empty.append(page)

    def unheld(self, pages: Sequence[int]) -> int:
        """How many of these pages count as free now."""
        return sum(not self._held[page] for page in pages)
