"""Classes of labels: whether there is anything to tell apart, and names that are probably meant to be the same."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from jaxmodels.data.records import Bad, Records, read
from jaxmodels.data.source import Source, Split
from jaxmodels.data.values import unfit
from jaxmodels.errors import UserError

_AT_ONCE = 1024
_SHOWN = 5
_MISSING = ("nan", "null", "none", "n/a", "#n/a", "<na>", "nil", "?", "-")

_log = logging.getLogger("jaxmodels")


def check_classes(source: Source, num_classes: int | None) -> None:
    """Raise UserError if the data have more classes than the model."""
    if num_classes is not None and source.num_classes is not None and source.num_classes > num_classes:
        shown = [*source.class_names[:5], *["..."] * (len(source.class_names) > 5)]
        names = f" ({', '.join(shown)})" if source.class_names else ""
        raise UserError(
            f"got a model of {num_classes} classes, expected at least the data's {source.num_classes}{names}, "
            f"try --model.classes {source.num_classes}"
        )


def check_differ(records: Records, label: str, split: Split) -> None:
    """Refuse to train on examples of one class; warn if those of an evaluation have only one.

    Records are read until two of them differ, the first ones from all over the set, since it may be sorted.

    Raises: UserError.
    """
    field, found, bad = records.fields[label], set[int](), list[Bad]()
    if field.kind != "label":  # each label of an example with several is its own class
        return
    size = len(records)
    spread = np.unique(np.linspace(0, size - 1, min(size, _AT_ONCE)).astype(np.int64)).tolist()
    for some in (spread, *(range(at, min(at + _AT_ONCE, size)) for at in range(0, size, _AT_ONCE))):
        rows = read(records, some, [label])
        good = [row for row in rows if not isinstance(row, Bad)]
        found |= {row[label] for row in good if not unfit(label, row[label], field) and row[label] >= 0}
        if len(found) > 1:
            return
        bad += [row for row in rows if isinstance(row, Bad)] if some is not spread else []
    for only in found:
        name = field.names[only] if only < len(field.names) else str(only)
        if split == "eval":
            _log.warning("evaluation has one class alone (%s is %r throughout %s)", label, name, records.label)
            continue
        # a split by hash may have put all others aside
        others = [other for at, other in enumerate(field.names) if at != only]
        left = f" that can be read (the first of {len(bad):,} others: {bad[0]})" if bad else ""
        none = f" (there is no record of {_listed([repr(other) for other in others])})" if others else ""
        raise UserError(
            f"got {records.label}, where {label} is {name!r} in all {size - len(bad):,} records to train on{left}, "
            f"expected two classes or more{none}, "
            f"try {'another split or more data' if others else 'another --data.label-field or other data'}"
        )


def tell_unlearned(train: Records, held_out: Records, label: str) -> None:
    """Warn of classes that occur in evaluation alone, since nothing can learn them.

    Records to train on are read until every class of the others is found.
    """
    field = train.fields[label]
    if field.kind not in ("label", "labels"):
        return
    left = Counter(at for each in _labels(held_out, label) for at in each)
    for each in _labels(train, label):
        if not left:
            return
        for at in each:
            left.pop(at, None)
    if left:
        ordered = sorted(left.items())
        names = [f"{field.names[at] if at < len(field.names) else at} ({often:,})" for at, often in ordered]
        _log.warning(
            "classes of %s that are held out to evaluate on, and of which there are none to train on: %s",
            label,
            _listed(names),
        )


def _labels(records: Records, label: str) -> Iterator[tuple[int, ...]]:
    """The known labels of each record."""
    size = len(records)
    for at in range(0, size, _AT_ONCE):
        for row in read(records, range(at, min(at + _AT_ONCE, size)), [label]):
            if not isinstance(row, Bad) and not unfit(label, row[label], records.fields[label]):
                value = row[label]
                yield tuple(each for each in (value if isinstance(value, tuple) else (value,)) if each >= 0)


def _listed(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f", and {more:,} more" if more > 0 else "")


def tell_similar(names: Iterable[str], label: str, where: str) -> None:
    """Warn of classes whose names differ only in case, or often stand for a missing value."""
    names = list(names)
    if missing := [name for name in names if name.casefold() in _MISSING]:
        _log.warning("%s of %s is taken for the name of a class: %s", label, where, _listed(list(map(repr, missing))))
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(name.casefold(), []).append(name)
    if pairs := [" and ".join(map(repr, same)) for same in alike.values() if len(same) > 1]:
        more = f", and {len(pairs) - 1:,} more such" if len(pairs) > 1 else ""
        _log.warning("classes of %s in %s that differ only by case are kept apart: %s%s", label, where, pairs[0], more)


def spaced(values: Iterable[Any]) -> Counter[str]:
    """Count the names that have white space around them."""
    return Counter(value for value in values if isinstance(value, str) and value != value.strip())


def tell_trimmed(names: Counter[str], label: str, where: str) -> None:
    """Log once per set that white space around names of classes was left out, if there was any."""
    if names:
        count, example = names.total(), min(names)
        _log.warning("left out white space around %s of %s in %s, such as %r", f"{count:,}", label, where, example)
