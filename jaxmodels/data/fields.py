"""Finding the input, label and group among the fields of a set's records."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from jaxmodels.data.records import Field, Joined, Kind, Records
from jaxmodels.data.section import RecordsConfig
from jaxmodels.errors import UserError


def input_field(records: Records, cfg: RecordsConfig, kinds: Sequence[Kind]) -> str:
    """Return the field that `data.input_field` names or, by default, the only field of the first available of `kinds`.

    Raises: UserError that lists the candidates.
    """
    if cfg.input_field:
        # with several sets, the first one's name stands for all
        name = cfg.input_field.split("+")[0] if isinstance(records, Joined) else cfg.input_field
        return named_field(records, "input_field", name, kinds)
    taken = {cfg.target_field, cfg.group_field, cfg.label_field}
    found = {kind: _of_kinds(records, [kind], taken) for kind in kinds}
    candidates = next((names for names in found.values() if names), [])
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        known = ", ".join(f"{name} ({field.kind})" for name, field in sorted(records.fields.items()))
        raise UserError(
            f"got {records.label} with the fields {known}, expected {_article(kinds)} field, "
            "try other data, or a model and a task for these"
        )
    raise UserError(
        f"got no data.input_field, expected one of {', '.join(candidates)}, try --data.input-field {candidates[0]}"
    )


def named_field(records: Records, option: str, name: str, kinds: Sequence[Kind], taken: Sequence[str] = ()) -> str:
    """Check that the records have a field of this name and of one of these kinds, and return the name.

    Raises: UserError that lists the candidates, without those `taken` for something else; `option` is the option that
    named the field, such as label_field.
    """
    flag = f"--data.{option.replace('_', '-')}"
    candidates = _of_kinds(records, kinds, {name, *taken})
    if name not in records.fields:
        if candidates:
            raise UserError(unknown(f"data.{option}", name, candidates, flag))
        known = ", ".join(sorted(records.fields)) or "no field that can be used"
        raise UserError(
            f"got data.{option} {name!r} for {records.label}, which has {known}, expected {_article(kinds)} field, "
            "try another set, or another task"
        )
    if (kind := records.fields[name].kind) not in kinds:
        hint = f"{flag} {candidates[0]}" if candidates else "another set, or another task"
        numbers = " (numbers that are not whole)" if kind == "array" and option == "label_field" else ""
        raise UserError(
            f"got data.{option} {name!r}, which is {_article([kind])}{numbers}, not {_article(kinds)}, "
            f"expected one of {', '.join(candidates) or 'none: the set has no such field'}, try {hint}"
        )
    return name


def _of_kinds(records: Records, kinds: Sequence[Kind], taken: set[str]) -> list[str]:
    return sorted(name for name, field in records.fields.items() if field.kind in kinds and name not in taken)


def _article(kinds: Sequence[Kind]) -> str:
    return " or ".join(f"{'an' if kind[0] in 'aio' else 'a'} {kind}" for kind in kinds)


def unknown(what: str, got: str, known: Sequence[str], flag: str, where: str = "") -> str:
    """Format the message about an unknown name, with the known ones, nearest first."""
    near = difflib.get_close_matches(got, known, 1, cutoff=0.3) or list(known[:1])
    hint = f"{flag} {near[0]}" if near else flag
    return f"got {what} {got!r}, expected one of {', '.join(known)}{where}, try {hint}"


def numbered(records: Records, name: str, values: Iterable[Any]) -> int:
    """Count classes without names: a field's values must be their numbers, from 0 on.

    Raises: UserError if one is below 0.
    """
    seen = {int(number) for value in values for number in np.atleast_1d(value)}
    if seen and min(seen) < 0:
        raise UserError(
            f"got {min(seen)} as {name} in {records.label}, expected numbers of classes from 0 on, "
            "try a set whose classes have names, or labels that count from 0"
        )
    return 1 + max(seen, default=-1)


def named_groups(field: Field, values: Callable[[], Iterable[Any]]) -> tuple[tuple[str, ...], Callable[[Any], int]]:
    """Return the names of a field's groups, and the number of each value's group; without names, those of `values`."""
    if field.kind == "label" and field.names:
        return field.names, int

    def own(value: Any) -> Any:
        return value.strip() if isinstance(value, str) else value

    known = sorted({own(value) for value in values()})
    numbers = {value: at for at, value in enumerate(known)}
    return tuple(map(str, known)), lambda value: numbers[own(value)]
