"""Annotations of a section's fields: those that `fields` cannot check are found and named."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
import types
from collections.abc import Collection, Mapping
from enum import Enum
from pathlib import PurePath
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from jaxmodels.registry import NOT_IMPORTABLE

_PLAIN = (bool, int, float, str, types.NoneType)


def typename(kind: Any) -> str:
    """Format a type as its annotation, without modules."""
    return kind.__name__ if isinstance(kind, type) and not get_args(kind) else re.sub(r"(\w+\.)+", "", str(kind))


def unread(kind: type, error: Exception) -> str:
    """Say which annotation of a class cannot be evaluated."""
    if sys.modules.get(kind.__module__) is None:
        return NOT_IMPORTABLE
    missing = getattr(error, "name", None) or str(error)
    for base in kind.__mro__:
        for name, note in inspect.get_annotations(base).items():
            if re.search(rf"\b{re.escape(missing)}\b", str(note)):
                return (
                    f"whose field {name} is {note}, where {missing} is not defined when it runs, expected a type that "
                    f"is, try importing {missing} above, outside of `if TYPE_CHECKING`"
                )
    return f"whose annotations fail with {type(error).__name__}: {error}, expected types"


def member_of(kind: type, name: str) -> str:
    """Name the base class that uses a field's name for something else; empty if none does.

    What a base class assigns without an annotation stands for a field that only some of its kinds have.
    """
    for base in kind.__mro__[1:]:
        notes, member = inspect.get_annotations(base), vars(base).get(name)
        if "ClassVar" in str(notes[name]) if name in notes else hasattr(member, "__get__"):
            return base.__name__
    return ""


def odd_type(kind: Any, section: type, bounds: type) -> str:
    """Say what to try instead of a type that fields do not support; empty if they do.

    `section` is the base class of sections, `bounds` the class of the notes that bound a number.
    """

    def odd(kind: Any) -> str:
        origin, args = get_origin(kind), get_args(kind)
        if origin is Annotated:
            if args[0] not in (int, float) and any(isinstance(note, bounds) for note in args[1:]):
                return f"Annotated[int, {bounds.__name__}(…)] for the number alone"
            return odd(args[0])
        if origin in (Union, types.UnionType) or (origin is tuple and args):
            return next(filter(None, (odd(arg) for arg in args if arg is not Ellipsis)), "")
        if origin is Literal:
            return "" if all(type(arg) in _PLAIN for arg in args) else "a Literal of texts or numbers"
        if kind in _PLAIN:
            return ""
        sort: Any = origin or kind
        if not isinstance(sort, type):
            return "a str that stands for it"
        if issubclass(sort, section):
            return f"{sort.__name__} alone"
        if issubclass(sort, Enum):
            return f"Literal[{', '.join(repr(each.name) for each in sort)}]"
        if issubclass(sort, Mapping):
            return "a section with a field for each key"
        if issubclass(sort, PurePath):
            return "str"
        if dataclasses.is_dataclass(sort):
            return f"class {sort.__name__}({section.__name__})"
        if issubclass(sort, Collection) and not issubclass(sort, bytes | bytearray):
            return f"tuple[{typename(args[0]) if args and not odd(args[0]) else 'int'}, ...]"
        return "a str that stands for it"

    return odd(kind)
