"""Records as a source gives them, before texts become tokens and images are changed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["image", "text", "label", "labels", "array"]


@dataclass(frozen=True)
class Field:
    """What one field of every record holds.

    image: bytes of an image file, or uint8 (H, W, C); text: str; label: int; labels: a tuple of ints; array: numbers.
    """

    kind: Kind
    names: tuple[str, ...] = ()
    """Of a label's classes, as far as they have names."""
    shape: tuple[int | None, ...] = ()
    """Of an image or an array; None where records differ."""
    dtype: str = ""
    """Of an array."""


@dataclass(frozen=True)
class Bad:
    """In the place of a record that cannot be read."""

    where: str
    """File and row, or the file alone."""
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


class Records(ABC):
    """A finite set of records that can be read in any order.

    `fingerprint` is a short hash that changes when the records do.
    """

    label: str
    """What it is, in a few words."""
    fields: Mapping[str, Field]
    fingerprint: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, indices: Sequence[int], fields: Sequence[str]) -> list[dict[str, Any] | Bad]:
        """These fields of these records, each with the kind of value that its `Field` says; thread-safe."""
