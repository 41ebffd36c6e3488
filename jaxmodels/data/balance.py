"""Balancing: each class appears equally often."""

from __future__ import annotations

import numpy as np

from jaxmodels.data.source import Source, fingerprint
from jaxmodels.errors import UserError


class Balanced(Source):
    """A source in which every class has as many examples in an epoch as the largest one.

    Example j belongs to class j mod K, of the K classes present. Each class goes through its examples in epochs of its
    own, shorter for smaller classes, so that the numbers of appearances of its examples differ by one at most; an image
    that appears twice is augmented in two ways.
    """

    def __init__(self, source: Source, labels: np.ndarray) -> None:
        """`labels` (N,) are those of all of the source's examples; examples whose label is below 0 are left out.

        Raises: UserError if examples may have several labels, or none has one.
        """
        if labels.ndim != 1:
            raise UserError("got several labels per example, expected one class each, try --data.balance False")
        classes = np.unique(labels[labels >= 0])
        if not len(classes):
            raise UserError(f"got {source.describe()} without a label, expected some, try --data.balance False")
        self.source = source
        self.tokenizer, self.vocab_size, self.groups = source.tokenizer, source.vocab_size, source.groups
        self.num_classes, self.class_names = source.num_classes, source.class_names
        self._members = np.concatenate([np.flatnonzero(labels == c) for c in classes])
        self._sizes = np.array([int((labels == c).sum()) for c in classes], np.int64)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._largest = int(self._sizes.max())
        self.fingerprint = fingerprint([self._members, self._sizes], "balanced", source.fingerprint)

    def __len__(self) -> int:
        return self._largest * len(self._sizes)

    def batch(self, indices: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        turn, which = np.divmod(np.asarray(indices, np.int64), len(self._sizes))
        inner, place = np.divmod(np.asarray(epochs, np.int64) * self._largest + turn, self._sizes[which])
        return self.source.batch(self._members[self._starts[which] + place], inner)

    def describe(self) -> str:
        sizes = f"{self._sizes.min():,} to {self._largest:,}"
        return f"{self.source.describe()}; balanced: {len(self):,} examples per epoch, from classes of {sizes}"
