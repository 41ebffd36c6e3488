"""Random batches of the right shape, to measure everything except the data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from jaxmodels.data.contract import BatchField, Contract
from jaxmodels.data.opening import Opening
from jaxmodels.data.order import mix
from jaxmodels.data.section import DataConfig
from jaxmodels.data.source import Source, Split, fingerprint
from jaxmodels.errors import UserError

_TRAIN_EXAMPLES, _EVAL_BATCHES = 1 << 20, 4


@dataclass(frozen=True)
class Synthetic(DataConfig):
    """Random batches, drawn according to the task's contract."""

    real: ClassVar[bool] = False

    def examples(self, opening: Opening, task: Any) -> Source:
        if opening.fields is None:
            raise ValueError("got no contract of the task's batches, expected one to draw them from")
        fields = {name: field for name, field in opening.fields.items() if not field.optional}
        used = [*(opening.reads if any(_drawn(field) in "uf" for field in fields.values()) else ())]
        if any("seq" in field.axes for field in fields.values()):
            used.append("seq_len")
        opening.check(used, "random examples")
        size = _TRAIN_EXAMPLES if opening.split == "train" else _EVAL_BATCHES * self.batch_size
        return Drawn(fields, opening.split, size)


class Drawn(Source):
    """Examples that are a function of their index, drawn according to a contract."""

    def __init__(self, fields: Contract, split: Split, size: int) -> None:
        """Raises UserError if an integer field has no bound."""
        for name, field in fields.items():
            if field.below is None and _drawn(field) == "i":
                raise UserError(
                    f"got data synthetic for a task whose {name} has no bound, expected one to draw numbers below, "
                    "try a model with a vocabulary, or another --data"
                )
        self._fields, self._split, self._n = dict(fields), split, size
        self._key = np.uint64(0 if split == "train" else 1 << 62)
        facts = [(name, field.shape, np.dtype(_dtype(field)).name, field.below) for name, field in fields.items()]
        self.fingerprint = fingerprint([], "synthetic", split, facts)

    def __len__(self) -> int:
        return self._n

    def batch(self, indices: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        keys = mix(indices.astype(np.uint64) + self._key)[:, None]
        found, used = {}, 0
        for name, field in self._fields.items():
            shape = field.shape or ()
            size = math.prod(shape)
            noise = mix(keys + np.arange(used, used + size, dtype=np.uint64)).reshape(len(indices), *shape)
            used += size
            found[name] = _values(field, noise)
        return found

    def describe(self) -> str:
        shapes = {name: "x".join(map(str, field.shape or ())) for name, field in self._fields.items()}
        parts = (f"{name} {shape}".rstrip() for name, shape in shapes.items())
        return f"synthetic: {self._n:,} random examples of {', '.join(parts)} ({self._split})"


def _dtype(field: BatchField) -> Any:
    return field.dtype if field.stored is None else field.stored


def _drawn(field: BatchField) -> str:
    """Return how a field's numbers are drawn: i: integers below a bound, u: bytes, f: from 0 to 1."""
    kind = np.dtype(_dtype(field)).kind
    return "u" if np.dtype(_dtype(field)) == np.uint8 else "i" if kind in "iu" or field.below else "f"


def _values(field: BatchField, noise: np.ndarray) -> np.ndarray:
    """Convert uniform uint64 to a field's numbers."""
    how, dtype = _drawn(field), _dtype(field)
    if how == "i":
        return (noise % np.uint64(field.below or 1)).astype(dtype)
    top = (noise >> np.uint64(56)).astype(np.uint8)
    return top if how == "u" else (top / np.float32(255)).astype(dtype)
