"""Sources: finite sets of examples with random access."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from jaxmodels.data.contract import IGNORED
from jaxmodels.data.tokenizer import Tokenizer
from jaxmodels.data.values import number_dtype
from jaxmodels.errors import UserError
from jaxmodels.fields import described
from jaxmodels.registry import named

Split = Literal["train", "eval"]

_BLOCK, _BLOCKS, _WHOLE = 1 << 14, 256, 1 << 26
_MOST = 1 << 24  # more than any vocabulary
_GOLDEN = 2654435769  # 2^32 / golden ratio: multiples of it, mod 2^32, stay evenly spread


class Source(ABC):
    """A finite set of examples that can be read in any order.

    `fingerprint` is a short hash that changes when the data, the tokenizer, seq_len or the split does.
    """

    fingerprint: str
    tokenizer: Tokenizer | None = None
    vocab_size: int | None = None
    num_classes: int | None = None
    class_names: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    """Names of the groups that a batch's `group` (B,) numbers."""
    field: str = ""
    """The record field that is the model's input, if the records have fields."""
    kind: str = ""
    """What that field holds: image, text or array."""
    texts: Sequence[str] = ()
    """In evaluation, the text of each example as its record has it, if examples are texts."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batch(self, indices: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        """Return fresh arrays of the examples `indices`, each as it appears in its epoch.

        Shapes: each (N, …), as the fields of the task say (`Task.fields`). A target or label that does not count is
        `contract.IGNORED`. Rows of text have `segment_ids` (N, T), which are 0 for padding, and `positions` (N, T),
        which restart with each text in a row; targets that are texts of their own have `target_segment_ids`.
        """

    @abstractmethod
    def describe(self) -> str:
        """Describe the source and its size in one line."""


def spec(source: Source, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes and dtypes of a global batch, taken from one example.

    Raises:
        UserError: the source does not give arrays with a row for each example.
    """
    one: Any = source.batch(np.zeros(1, np.int64), np.zeros(1, np.int64))
    arrays = dict(one) if isinstance(one, Mapping) else {"batch": one}
    odd = [name for name, x in arrays.items() if not isinstance(x, np.ndarray) or x.shape[:1] != (1,)]
    if odd := odd or [name for name, x in arrays.items() if not number_dtype(x.dtype)]:
        raise UserError(
            f"got {named(type(source))}, whose batch of one example has {described(arrays[odd[0]])} as {odd[0]}, "
            "expected an array of numbers by the name of each field, with a row for each example"
        )
    return {name: jax.ShapeDtypeStruct((batch_size, *x.shape[1:]), x.dtype) for name, x in arrays.items()}


class Windows(Source):
    """Windows of T tokens, each with the tokens that follow them.

    In training, the windows of each epoch start at a different offset, so that epochs split the text differently; at
    most 2T - 1 tokens of an epoch are left out. In evaluation the offset is 0 and every token except the first is a
    target exactly once; the last window is padded with ignored targets.
    """

    def __init__(
        self,
        arrays: Sequence[np.ndarray],
        seq_len: int,
        *,
        split: Split,
        label: str,
        tokenizer: Tokenizer | None = None,
        vocab_size: int | None = None,
        check: int | None = None,
    ) -> None:
        """With `check`, tokens of this id or above are refused, which a file without a description may contain."""
        if seq_len < 1:
            raise UserError(f"got data.seq_len {seq_len}, expected at least 1, try --data.seq-len 256")
        self.arrays, self.seq_len, self.split, self.label, self._check = tuple(arrays), seq_len, split, label, check
        # created once, because creating such a view takes as long as reading a batch from it
        self._windows = [sliding_window_view(a, min(seq_len + 1, len(a))) for a in self.arrays]
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self._sizes = None if tokenizer is None else tokenizer.sizes()
        lengths = np.array([len(a) for a in self.arrays], np.int64)
        counts = lengths // seq_len - 1 if split == "train" else -(-(lengths - 1) // seq_len)
        self._counts = np.maximum(counts, 0)
        self._ends = np.cumsum(self._counts)
        self.tokens = int(lengths.sum())
        if not len(self):
            least = 2 * seq_len if split == "train" else 2
            raise UserError(
                f"got {self.tokens} tokens to {split} on ({label}), expected at least {least}, "
                "try more text, a smaller --data.seq-len or another --data.eval-fraction"
            )
        identity = tokenizer.to_json() if tokenizer else None
        self.fingerprint = fingerprint(self.arrays, "windows", split, seq_len, identity)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def batch(self, indices: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        which = np.searchsorted(self._ends, indices, side="right")
        starts = (indices - (self._ends - self._counts)[which]) * self.seq_len
        if self.split == "train":
            starts += shift(epochs, self.seq_len)
        tokens, targets = (np.empty((len(indices), self.seq_len), np.int32) for _ in range(2))
        for i in np.unique(which) if len(self.arrays) > 1 else (0,):
            here = which == i if len(self.arrays) > 1 else slice(None)
            rows = self._rows(i, starts[here])
            if self._check is not None and rows.max() >= self._check:
                raise UserError(_too_large(int(rows.max()), self._check, self.label))
            tokens[here], targets[here] = rows[:, :-1], rows[:, 1:]
        if self.split == "eval":
            np.maximum(tokens, 0, out=tokens)
        return {"tokens": tokens, "targets": targets, **self._bytes(targets)}

    def _rows(self, i: int, starts: np.ndarray) -> np.ndarray:
        """Return the tokens of an array from each start on, (B, T + 1), with IGNORED past its end."""
        array, width = self.arrays[i], self.seq_len + 1
        whole = starts + width <= len(array)
        if whole.all():
            return self._windows[i][starts]
        rows = np.full((len(starts), width), IGNORED, np.int32)
        for row, start in zip(rows, starts.tolist(), strict=True):
            part = array[start : start + width]
            row[: len(part)] = part
        return rows

    def _bytes(self, targets: np.ndarray) -> dict[str, np.ndarray]:
        """Return, in evaluation, how many bytes of text each target stands for, if the tokenizer knows."""
        if self._sizes is None or self.split == "train":
            return {}
        return {"bytes": self._sizes[np.clip(targets, 0, len(self._sizes) - 1)]}

    def describe(self) -> str:
        name = f"tokenizer {self.tokenizer}" if self.tokenizer else "no tokenizer"
        return f"{self.label}: {self.tokens:,} tokens, {len(self):,} examples of {self.seq_len} ({self.split}), {name}"


def shift(epochs: np.ndarray, seq_len: int) -> np.ndarray:
    """Return the offset of each epoch's windows, in [0, seq_len): a golden-ratio sequence, evenly spread."""
    share = epochs.astype(np.uint64) * np.uint64(_GOLDEN) % np.uint64(2**32)
    return (share * np.uint64(seq_len) >> np.uint64(32)).astype(np.int64)


def fingerprint(arrays: Sequence[np.ndarray], *facts: Any) -> str:
    """Hash `facts` and the arrays: all of each up to 64 MiB, and 256 evenly spread blocks of a larger one."""
    digest = hashlib.blake2b(repr(facts).encode(), digest_size=8)
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}".encode())
        for block in blocks(array):
            digest.update(np.ascontiguousarray(block).data)
    return digest.hexdigest()


def blocks(array: np.ndarray) -> list[np.ndarray]:
    """Return the whole array, flat, if it is small, and otherwise blocks spread over it, to save time."""
    flat = array.reshape(-1)
    if flat.nbytes <= _WHOLE:
        return [flat]
    size = _BLOCK // flat.itemsize
    return [flat[i : i + size] for i in np.linspace(0, len(flat) - size, _BLOCKS).astype(np.int64)]


def check_tokens(arrays: Sequence[np.ndarray], vocab_size: int, label: str) -> None:
    """Refuse arrays with a token of `vocab_size` or above; of a large array only some blocks are checked."""
    largest = max((int(block.max()) for array in arrays for block in blocks(array) if block.size), default=0)
    if largest >= vocab_size:
        raise UserError(_too_large(largest, vocab_size, label))


def _too_large(token: int, vocab_size: int, label: str) -> str:
    larger = f"--model.vocab-size {token + 1} or " if token < _MOST else ""
    return (
        f"got token {token} in {label}, expected all below vocab_size {vocab_size}, "
        f"try {larger}the dtype and vocab_size that the file was written with"
    )


def unigram_loss(train: Windows, held_out: Windows) -> float:
    """Return the cross-entropy, in nats per token, of the held-out tokens under the training tokens' frequencies.

    Each count is increased by one. A model that knows only how frequent each token is has this loss.
    """
    parts = [[block for a in source.arrays for block in blocks(a) if a.size] for source in (train, held_out)]
    size = 1 + max(int(block.max()) for group in parts for block in group)
    counts = [sum((np.bincount(b, minlength=size) for b in group), np.zeros(size, np.int64)) for group in parts]
    seen, limit = counts[0] + 1, counts[1]
    return float(-(limit * np.log(seen / seen.sum())).sum() / limit.sum())
