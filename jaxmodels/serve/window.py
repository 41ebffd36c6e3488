"""A window of records as a classifier sees them: what the inputs are like, and what it says of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmodels.data import given, pixels
from jaxmodels.data.files import TABLES, open_file
from jaxmodels.data.records import Bad
from jaxmodels.errors import UserError, nearest
from jaxmodels.generate.classes import class_names, class_shares
from jaxmodels.generate.prepare import kind_of, reader
from jaxmodels.train.saved import Run

COLUMNS = 32
"""Arrays of at most so many numbers are compared number by number, others by their mean, spread and extremes."""


@dataclass(frozen=True)
class Window:
    """Records, after the model has seen them. Shapes: N readable records, K classes."""

    features: dict[str, np.ndarray]
    """Numbers that say what each input is like, (N,) each, by name."""
    probabilities: np.ndarray
    """(N, K)."""
    unreadable: int
    """Records beside those N."""
    labels: np.ndarray | None = None
    """(N,): the true classes, -1 where there is none; None if no record has one."""
    groups: np.ndarray | None = None
    """(N,): the group of each record, as text; None if none is asked for."""

    def __len__(self) -> int:
        return len(self.probabilities)

    @property
    def predicted(self) -> np.ndarray:
        return self.probabilities.argmax(1)

    @property
    def confidence(self) -> np.ndarray:
        return self.probabilities.max(1)

    @property
    def right(self) -> np.ndarray:
        """(N,) whether the prediction is the label; False where there is no label."""
        return np.zeros(len(self), bool) if self.labels is None else self.predicted == self.labels


def read(run: Run, path: str, label_field: str, group_field: str) -> Window:
    """Read all records of a file or a folder, and what the run says of them.

    Raises:
        UserError: nothing in it can be read, or a column that was asked for is not there.
    """
    known = run.kept.field or run.config.data.input_field
    records = list(given.records((path,), kind_of(run), "", known))
    labels, groups = _columns(run, path, records, label_field, group_field)
    ready, shares = reader(run), jax.jit(class_shares(run))
    size, kept, found, features = run.config.eval.batch_size or run.config.data.batch_size, [], [], []
    why = ""

    def prepare(value: Any) -> Any:
        try:
            return value if isinstance(value, Bad) else ready(value)
        except (UserError, pixels.Unreadable) as error:
            return Bad(path, str(error))

    with ThreadPoolExecutor(run.config.data.threads) as threads:
        for first in range(0, len(records), size):
            made = list(threads.map(prepare, [value for _, value in records[first : first + size]]))
            good = [i for i, each in enumerate(made) if not isinstance(each, Bad)]
            why = why or next((str(each) for each in made if isinstance(each, Bad)), "")
            if good:
                batch = [made[i] for i in good]
                # padded, so that nothing is compiled for another batch size
                padded = [*batch, *[batch[0]] * (size - len(batch))]
                rows = {name: np.stack([each[name] for each in padded]) for name in padded[0]}
                found.append(np.asarray(shares(run.params["model"], rows))[: len(batch)])
                features.append(describe(batch))
                kept += [first + i for i in good]
    if not kept:
        why = why or "it is empty"
        raise UserError(f"got {path}, none of whose records can be read ({why}), expected some that can")
    joined = {name: np.concatenate([each[name] for each in features]) for name in features[0]}
    probability = np.concatenate(found)
    if not np.isfinite(probability).all():
        raise UserError(f"got {path}, of which the model's probabilities are no finite numbers, try another run")
    pick = lambda x: None if x is None else x[kept]  # noqa: E731
    return Window(joined, probability, len(records) - len(kept), pick(labels), pick(groups))


def _columns(
    run: Run, path: str, records: Sequence[given.Given], label: str, group: str
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Labels and groups of the records of a table, or the labels that folders of images are named by."""
    classes = run.model.config.classes
    number = {str(i): i for i in range(classes)} | {name: i for i, name in enumerate(class_names(run))}
    place = Path(path).expanduser()
    if place.suffix.lower() not in TABLES:
        if label or group:
            raise UserError(f"got --{'label' if label else 'group'}-field for {path}, expected a table, try it without")
        labels = np.array([number.get(Path(where).parent.name, -1) for where, _ in records])
        return (labels if place.is_dir() and (labels >= 0).any() else None), None
    rows = [values if isinstance(values, dict) else {} for values, _ in open_file(place).rows()]
    columns = dict.fromkeys(itertools.chain.from_iterable(rows))
    wanted = label or str(getattr(run.config.data, "label_field", "") or "label")
    for flag, name in (("label", label), ("group", group)):
        if name and name not in columns:
            raise UserError(
                f"got --{flag}-field {name}, expected one of the columns of {path}, {', '.join(columns)}"
                f"{nearest(name, columns)}"
            )
    labels = groups = None
    if wanted in columns:
        labels = np.array([_class(row.get(wanted), number, path) for row in rows])
    if group:
        groups = np.array([str(row.get(group, "")) for row in rows])
    return labels if labels is not None and (labels >= 0).any() else None, groups


def _class(value: Any, number: dict[str, int], path: str) -> int:
    """The number of a class by its name or number; -1 where there is none yet."""
    if value is None or value == "" or value == -1:
        return -1
    text = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    if text not in number:
        raise UserError(
            f"got the label {text!r} in {path}, expected a class of the run, such as {next(iter(number))!r}"
        )
    return number[text]


# ---- what an input is like


def describe(batch: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Numbers that say what prepared inputs are like, each (B,): of texts, images, or arrays.

    They are functions of one input alone, so that a window is not compared with what was fitted to another.
    """
    if "segment_ids" in batch[0]:
        return _texts(np.stack([x["inputs"] for x in batch]), np.stack([x["segment_ids"] for x in batch]))
    inputs = np.stack([x["inputs"] for x in batch])
    if inputs.dtype == np.uint8 and inputs.ndim == 4:
        return _images(inputs)
    flat = inputs.reshape(len(inputs), -1).astype(np.float64)
    if flat.shape[1] <= COLUMNS:
        return {f"x[{i}]": flat[:, i] for i in range(flat.shape[1])}
    return {"mean": flat.mean(1), "spread": flat.std(1), "least": flat.min(1), "greatest": flat.max(1)}


def _texts(ids: np.ndarray, segments: np.ndarray) -> dict[str, np.ndarray]:
    real = segments > 0
    count = real.sum(1)
    # vocabularies list what is frequent first, so that the mean logarithm of the ids says how rare the tokens are
    rank = (np.log1p(ids) * real).sum(1) / np.maximum(count, 1)
    distinct = np.array([len(np.unique(row[own])) for row, own in zip(ids, real, strict=True)])
    return {"tokens": count.astype(float), "rank of tokens": rank, "distinct tokens": distinct / np.maximum(count, 1)}


def _images(inputs: np.ndarray) -> dict[str, np.ndarray]:
    x = inputs.astype(np.float64) / 255
    gray = x.mean(-1)
    H, W, rest = *gray.shape[1:], 1e-9
    across = np.abs(np.diff(gray, axis=2)).sum((1, 2))
    down = np.abs(np.diff(gray, axis=1)).sum((1, 2))
    rows, columns = np.linspace(-1, 1, H)[:, None], np.linspace(-1, 1, W)[None]
    # moments of what differs from the usual brightness, so that light and dark backgrounds are alike
    weight = np.abs(gray - np.median(gray, axis=(1, 2), keepdims=True)) + rest
    weight /= weight.sum((1, 2), keepdims=True)
    y, z = (weight * rows).sum((1, 2)), (weight * columns).sum((1, 2))
    own_rows, own_columns = rows - y[:, None, None], columns - z[:, None, None]
    spread = np.sqrt((weight * own_rows**2).sum((1, 2)) * (weight * own_columns**2).sum((1, 2))) + rest
    found = {
        "brightness": gray.mean((1, 2)),
        "contrast": gray.std((1, 2)),
        "detail": (across + down) / (H * W),
        "upright edges": across / (across + down + rest),
        "slant": (weight * own_rows * own_columns).sum((1, 2)) / spread,
        "height of the middle": -y,
        "right of the middle": z,
    }
    if x.shape[-1] == 3:
        found |= {
            f"share of {name}": x[..., i].mean((1, 2)) - gray.mean((1, 2)) for i, name in ((0, "red"), (2, "blue"))
        }
    return found
