"""Sections that come in several kinds: their names, and replacing one kind by another."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

from jaxmodels.config.sections import Config
from jaxmodels.errors import UserError
from jaxmodels.fields import Section, default_of
from jaxmodels.registry import Registry

_KIND = ("name", "kind", "class", "type", "source", "family")
NONE = "none"
"""The kind by which a section that may be None is left out."""


def section_of(hint: Any) -> Any:
    """Return the section's class in a field's type, of which it may be the optional form; None if it is none."""
    found = [kind for kind in (hint, *get_args(hint)) if isinstance(kind, type) and issubclass(kind, Section)]
    return found[0] if found else None


def kinds_of(section: Any) -> Registry | None:
    """Return the registry of the kinds of a section, or of a section's class; None if it has only one."""
    return getattr(section, "kinds", None)


def kind_name(section: Any) -> str:
    """Return the name of a section's kind.

    Raises:
        UserError: another process could not import it.
    """
    kinds = kinds_of(section)
    return kinds.name_of(type(section)) if kinds is not None else ""


def with_kinds(owner: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the sections that come in several kinds by their dotted names, outer ones first.

    In place of one that is left out, its class is given.
    """
    for field in dataclasses.fields(owner):
        value = getattr(owner, field.name)
        if value is None and (kind := section_of(get_type_hints(type(owner))[field.name])) is not None:
            yield prefix + field.name, kind
        elif dataclasses.is_dataclass(value):
            if kinds_of(value) is not None:
                yield prefix + field.name, value
            yield from with_kinds(value, f"{prefix}{field.name}.")


def meant_kind(config: Config, field: str, value: str) -> str:
    """The section whose kind is given as if it were a field (task.name, data.source), "" where none is."""
    section, _, last = field.rpartition(".")
    owner = dict(with_kinds(config)).get(section)
    if owner is None or last in {each.name for each in dataclasses.fields(owner)}:
        return ""
    return section if last in _KIND and value in owner.kinds.names() else ""


def of_kind(section: Any, name: str) -> Any:
    """Return a section of the named kind, with the fields that `section` has set and both kinds have.

    `section` is a class where the section is left out.

    Raises:
        UserError: there is no such kind, it is a kind of another section, or a field of it has no value.
    """
    kinds = kinds_of(section)
    assert kinds is not None
    kind = kinds.find(name)
    if kind is type(section):
        return section
    before = () if isinstance(section, type) else dataclasses.fields(section)
    usual = {field.name: default_of(field) for field in before}
    own = {field.name: default_of(field) for field in dataclasses.fields(kind)}
    values = {field: getattr(section, field) for field in own.keys() & usual.keys()}
    carried = {field: value for field, value in values.items() if value != usual[field]}
    if lacking := [field for field, value in own.items() if value is dataclasses.MISSING and field not in carried]:
        raise UserError(
            f"got {kinds.what} {name} without its {lacking[0]}, which has no default, expected it in a config file, "
            f"try {kind.__name__}({lacking[0]}=…) there"
        )
    return kind(**carried)


def replaced(owner: Any, field: str, value: Any) -> Any:
    """Return a config with one field, given by its dotted name, set to a value; a section is set by its kind's name.

    Raises:
        UserError: the section's kind has no such field.
    """
    name, _, rest = field.partition(".")
    if name not in {each.name for each in dataclasses.fields(owner)}:
        raise UserError(f"got a value for {name}, which {type(owner).__name__} does not have, expected a field of it")
    inner, optional = getattr(owner, name), type(None) in get_args(get_type_hints(type(owner))[name])
    if rest and inner is None:
        kind = section_of(get_type_hints(type(owner))[name])
        raise UserError(
            f"got a value for {field}, but no {name}, expected a kind of it, try --{name} {kind.kinds.names()[0]}"
        )
    if rest:
        value = replaced(inner, rest, value)
    elif optional and isinstance(value, str) and (kind := section_of(get_type_hints(type(owner))[name])) is not None:
        value = None if value == NONE else of_kind(kind if inner is None else inner, value)
    elif dataclasses.is_dataclass(inner) and isinstance(value, str):
        value = of_kind(inner, value)
    return dataclasses.replace(owner, **{name: value})


def check_kinds(config: Config) -> None:
    """Raise UserError if a section is of a kind that other processes cannot import."""
    for _, section in with_kinds(config):
        if not isinstance(section, type):
            kind_name(section)
