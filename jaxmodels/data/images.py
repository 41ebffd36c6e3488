"""Images with their labels or with what is marked on them, decoded and augmented on demand."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from jaxmodels.data import pixels, transforms
from jaxmodels.data.contract import IGNORED
from jaxmodels.data.fields import named_field, named_groups, numbered
from jaxmodels.data.marks import Marks
from jaxmodels.data.opening import Opening
from jaxmodels.data.records import Reader, Records, Row
from jaxmodels.data.section import Augment
from jaxmodels.data.source import Source, fingerprint
from jaxmodels.errors import UserError

IN_MEMORY = 1 << 30
"""Most bytes of decoded pixels to keep in memory."""

_SMALL = 64 * 64
_Arrays = dict[str, np.ndarray]
_AT_ONCE = 8  # few, so that the first are decoded while others are read


class Pictures(Source):
    """Images of one size, uint8, with their labels or marks; in training, as the epoch augments them.

    Marks are moved along with the pixels.

    If all pixels of a set fit into 1 GiB, they are kept once decoded: at the model's size or, if training crops, at the
    single size at which all are stored. Otherwise threads decode each batch. An unreadable image is replaced by the
    next good one; in evaluation, its label is then -1, and nothing that counts is marked on it.
    """

    def __init__(
        self, records: Records, opening: Opening, *, field: str, label: str | None, marks: Marks | None = None
    ) -> None:
        """`field` and `label` name the image and its class or classes; without `label` and `marks` all labels are 0.

        Raises: UserError if the images cannot be given the model's shape or be augmented as configured.
        """
        cfg: Any = opening.data
        augment, split = opening.augment, opening.split
        self.split, self.shape = split, model_shape(records, field, opening.inputs_shape)
        transforms.check_channels(augment, self.shape[2])
        if marks is not None:
            transforms.check_marks(augment)
        pixels.check_library(cfg.pixels)
        # what is marked on an image is looked for in all of it
        self._cfg = augment if split == "train" else Augment(crop=augment.crop if marks is None else None)
        self._changed = split == "train" and bool(transforms.describe(augment))
        self._records, self._seed, self._threads, self._limit = records, opening.seed, cfg.threads, cfg.bad_records
        self._library: pixels.Library = cfg.pixels
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="jaxmodels-images")
        self._field, self._label, self._group, self._marks = field, label, cfg.group_field, marks
        if label is not None:
            named_field(records, "label_field", label, ("label", "labels"))
        if self._group:
            named_field(records, "group_field", self._group, ("label", "text"))
        read = (field, label, self._group, marks and marks.field)
        self._reader = Reader(records, [name for name in dict.fromkeys(read) if name], self._limit)
        self._several = label is not None and records.fields[label].kind == "labels"
        self.class_names = records.fields[label].names if label is not None else ()
        self.num_classes = len(self.class_names) or (self._number(label) if label is not None else None)
        self._width = max(opening.num_classes or 0, self.num_classes or 0)
        self.groups, self._group_of = self._name_groups()
        self._kept = self._keep()
        more = () if self._library == "pillow" else (self._library,)
        more += () if marks is None else (repr(marks),)
        self.fingerprint = fingerprint(
            [],
            "images",
            records.fingerprint,
            field,
            label,
            self._group,
            self.shape,
            self._cfg,
            split,
            *more,
        )

    def __len__(self) -> int:
        return len(self._records)

    def batch(self, indices: np.ndarray, epochs: np.ndarray) -> dict[str, np.ndarray]:
        numbers = transforms.draws(self._seed, epochs, indices, transforms.needed(self._cfg))

        def change(image: Any, marked: Mapping[str, np.ndarray], place: int) -> _Arrays:
            return self._make(image, marked, self.shape, numbers[place])

        if self._kept is None:
            found = self._read(indices, self.shape, change if self._changed else self._still)
        else:
            found = self._remembered(indices)
            if self._changed:
                found |= self._change(found, numbers)
        return {**found, "inputs": self._own(found["inputs"], epochs, indices)}

    def _change(self, kept: Mapping[str, np.ndarray], numbers: np.ndarray) -> _Arrays:
        """Augment kept images, and what is marked on them, by rows of `draws`."""
        if transforms.together(self._cfg) and self.shape[0] * self.shape[1] <= _SMALL:
            found = {"inputs": transforms.augment_all(kept["inputs"], self._cfg, numbers)}
            if self._marks is None:
                return found
            size = self.shape[:2]
            return found | self._marks.move(kept, transforms.matrices(self._cfg, size, numbers), size)
        found = self._room(len(numbers), self.shape)

        def put(k: int) -> None:
            marked = {name: kept[name][k] for name in found if name != "inputs"}
            for name, value in self._make(kept["inputs"][k], marked, self.shape, numbers[k]).items():
                found[name][k] = value

        self._each(put, range(len(numbers)))
        return found

    def _make(
        self, image: Any, marked: Mapping[str, np.ndarray], shape: tuple[int, ...], row: np.ndarray | None
    ) -> _Arrays:
        """Make an example of an opened image or an array: augmented by a row of draws, or without one as evaluation
        sees it, or as it is kept."""
        cfg = self._cfg if row is not None or self.split == "eval" else Augment()
        full = pixels.size_of(image)
        plain = row is None and cfg.crop is None and isinstance(image, np.ndarray) and image.shape == shape
        if not plain:
            opened = pixels.decode(image, self._library) if isinstance(image, np.ndarray) else image
            size: Any = (shape[0], shape[1], shape[2])
            if row is None:
                image = transforms.center(opened, Augment(crop=cfg.crop), size, self._library)
            else:
                image = transforms.augment(opened, cfg, size, row, self._library)
        if self._marks is None:
            return {"inputs": image}
        matrix = transforms.affine(cfg, full, (shape[0], shape[1]), row)
        moved = self._marks.move({name: x[None] for name, x in marked.items()}, matrix[None], (shape[0], shape[1]))
        return {"inputs": image, **{name: x[0] for name, x in moved.items()}}

    def _room(self, count: int, shape: tuple[int, ...]) -> _Arrays:
        """Allocate images of a shape and what is marked on them."""
        marked = {} if self._marks is None else self._marks.room(count, (shape[0], shape[1]))
        return {"inputs": np.empty((count, *shape), np.uint8), **marked}

    def _own(self, images: np.ndarray, epochs: np.ndarray, indices: np.ndarray) -> np.ndarray:
        return transforms.apply_own(images, self._cfg, self._seed, epochs, indices)

    def labels(self) -> np.ndarray:
        """Return the class of every record, int32 (N,), or -1 if it cannot be read.

        Raises: UserError if records do not have one class each.
        """
        if self._label is None or self._several:
            raise UserError(
                f"got {self._records.label}, whose records have {'several labels' if self._several else 'no label'}, "
                "expected one class each, try --data.balance False"
            )
        labels = np.full(len(self), IGNORED, np.int32)
        for rows in Reader(self._records, (self._label,), self._limit).all():
            labels[[row.index for row in rows]] = [row[self._label] for row in rows]
        return labels

    def describe(self) -> str:
        shape = "x".join(map(str, self.shape))
        classes = f", {self.num_classes} classes" if self.num_classes else ""
        changes = "; " + ", ".join(transforms.describe(self._cfg)) if self._changed else ""
        return f"{self._records.label}: {len(self):,} images of {shape}{classes} ({self.split}){changes}"

    def _read(
        self,
        indices: np.ndarray,
        shape: tuple[int, ...],
        make: Callable[[Any, Mapping[str, np.ndarray], int], _Arrays],
    ) -> _Arrays:
        """Return examples of `shape`, made from what is stored and the index in the batch, with labels and groups."""
        found = self._room(len(indices), shape)
        rows = [Row({}, -1)] * len(indices)
        replaced, left = np.zeros(len(indices), bool), np.arange(len(indices))

        def stored() -> Iterator[int]:
            for start in range(0, len(left), _AT_ONCE):
                places = left[start : start + _AT_ONCE]
                good, replaced[places] = self._reader.rows(indices[places])
                for place, row in zip(places.tolist(), good, strict=True):
                    rows[place] = row
                    yield place

        def fill(place: int) -> None:
            row, image = rows[place], rows[place][self._field]
            try:
                if not isinstance(image, np.ndarray):
                    image = pixels.decode(image, self._library)
                full, marks = pixels.size_of(image), self._marks
                marked = {} if marks is None else marks.read(row[marks.field], full)
                for name, value in make(image, marked, place).items():
                    found[name][place] = value
            except pixels.Unreadable as error:
                self._reader.bad(row.index, str(error))
                again.append(place)

        while left.size:
            again: list[int] = []
            self._each(fill, stored())
            left = np.sort(np.array(again, np.int64))
        if self.split == "eval" and self._marks is not None and replaced.any():
            for name, nothing in self._marks.room(1, (shape[0], shape[1])).items():
                found[name][replaced] = nothing
        return {**found, **self._facts(rows, replaced)}

    def _facts(self, rows: list[Row], replaced: np.ndarray) -> _Arrays:
        groups: _Arrays = {}
        if self._group:
            groups = {"group": np.array([self._group_of(row[self._group]) for row in rows], np.int32)}
        if self._marks is not None and self._label is None:
            return groups
        labels = np.zeros((len(rows), self._width), np.float32) if self._several else np.zeros(len(rows), np.int32)
        if self._label is not None:
            for k, row in enumerate(rows):
                if self._several:
                    labels[k, list(row[self._label])] = 1
                else:
                    labels[k] = row[self._label]
        if self.split == "eval":
            labels[replaced] = IGNORED
        return {"labels": labels, **groups}

    def _still(self, image: Any, marked: Mapping[str, np.ndarray], place: int) -> _Arrays:
        """Make an example that is not augmented: as evaluation sees it, or as it is kept."""
        shape = self.shape if self._kept is None else self._kept[0]
        return self._make(image, marked, shape, None)

    def _keep(self) -> tuple[tuple[int, ...], np.ndarray, _Arrays] | None:
        """Return the shape in which to keep all pixels, which are present, and room for them; None if they are too
        many."""
        shape: tuple[int | None, ...] = self.shape
        if self.split == "train" and self._cfg.crop is not None:
            shape = (*self._records.fields[self._field].shape[:2], self.shape[2])
        known = tuple(n for n in shape if n is not None)
        if len(known) < 3 or len(self) * sum(x.nbytes for x in self._room(1, known).values()) > IN_MEMORY:
            return None
        return known, np.zeros(len(self), bool), self._room(len(self), known)

    def _remembered(self, indices: np.ndarray) -> _Arrays:
        assert self._kept is not None
        shape, there, every = self._kept
        missing = np.unique(indices[~there[indices]])
        if missing.size:
            # two threads may read the same images, but then they write the same values
            for name, values in self._read(missing, shape, self._still).items():
                every.setdefault(name, np.zeros((len(self), *values.shape[1:]), values.dtype))[missing] = values
            there[missing] = True
        return {name: values[indices] for name, values in every.items()}

    def _each(self, do: Callable[[int], Any], places: Iterable[int]) -> None:
        """Call `do` for each place, in threads that take the next one as soon as they are free."""
        if self._threads == 1:
            for place in places:
                do(place)
            return
        lock, rest = threading.Lock(), iter(places)

        def work() -> None:
            while True:
                with lock:
                    place = next(rest, None)
                if place is None:
                    return
                do(place)

        for done in [self._pool.submit(work) for _ in range(self._threads)]:
            done.result()

    def _number(self, label: str) -> int:
        return numbered(self._records, label, self._values(label))

    def _name_groups(self) -> tuple[tuple[str, ...], Callable[[Any], int]]:
        if not self._group:
            return (), int
        group = self._group
        return named_groups(self._records.fields[group], lambda: self._values(group))

    def _values(self, name: str) -> list[Any]:
        """Return a field of every record that can be read."""
        return [row[name] for rows in Reader(self._records, (name,), self._limit).all() for row in rows]


def model_shape(records: Records, field: str, shape: tuple[int, ...] | None) -> tuple[int, int, int]:
    """Return height, width and channels of the model's images, or of the stored ones.

    Raises: UserError if they are unknown, or the stored images cannot be converted to them.
    """
    stored = records.fields[field].shape
    wanted = stored if shape is None else shape
    known = tuple(n for n in wanted if n is not None)
    if len(known) != 3 or len(wanted) != 3:
        got = "a model without an input shape" if shape is None else f"a model of inputs {wanted}"
        raise UserError(
            f"got {got} for the images of {records.label}, expected (height, width, channels), try a model of images"
        )
    channels = stored[2] if len(stored) == 3 else None
    plain = stored == known
    if not plain and (known[2] not in (1, 3) or channels not in (None, 1, 3, 4)):
        sizes = "x".join("?" if n is None else str(n) for n in stored)
        raise UserError(
            f"got images of {sizes or 'any size'} in {records.label} for a model of {known}, "
            "expected 1 (gray) or 3 (RGB) channels where their size has to change, try a model of their own shape"
        )
    return known[0], known[1], known[2]
