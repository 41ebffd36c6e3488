"""What config fields may hold: types and ranges, stated where a field is defined and checked in one place."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import math
import numbers
import os
import reprlib
import textwrap
import types
from abc import ABC
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, Union, get_args, get_origin, get_type_hints

from jaxmodels.errors import UserError, nearest
from jaxmodels.registry import Registry, incomplete, subclass_of

MOST = 2**31 - 1
"""Upper bound of an index on a device."""


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers that a field accepts: `least` and `most` are included, `above` and `below` are not."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None
    also: float | None = None
    """One more accepted number, with a meaning of its own."""

    def refusal(self, value: float) -> tuple[str, float | None]:
        """Return what was expected instead of the value, and a bound to try; nothing if the value is in range."""
        expected, bound = "", None
        if value == self.also:
            return "", None
        if self.least is not None and value < self.least:
            expected, bound = f"at least {self.least}", self.least
        elif self.most is not None and value > self.most:
            expected, bound = f"at most {self.most}", self.most
        elif self.above is not None and value <= self.above:
            expected = f"above {self.above}"
        elif self.below is not None and value >= self.below:
            expected = f"below {self.below}"
        return expected + (f", or {self.also}" if expected and self.also is not None else ""), bound

    def __str__(self) -> str:
        named = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        said = " and ".join(f"{word} {bound}" for word, bound in named.items() if bound not in (None, MOST))
        return said if self.also is None else f"{said}, or {self.also}"


@dataclasses.dataclass(frozen=True)
class Named:
    """The names that a field accepts: those in a registry, including `package.module:Name`, and those in `also`."""

    registry: Registry
    also: tuple[str, ...] = ()

    def check(self, name: str) -> None:
        """Refuse a name that stands for nothing; `package.module:Name` is imported."""
        if name in self.also or name in self.registry.builtin:
            return
        known = [*self.also, *self.registry.names()]
        if ":" not in name and name not in known:
            raise _Misfit(f"one of {', '.join(known)}, or package.module:Name", near=nearest(name, known))
        self.registry.find(name)

    def __str__(self) -> str:
        return " ".join(f"`{name}`" for name in (*self.also, *self.registry.builtin)) + " or package.module:Name"


Count = Annotated[int, Range(1, MOST)]
Natural = Annotated[int, Range(0, MOST)]
Seed = Annotated[int, Range(0, 2**32 - 1)]
Dim = Annotated[int, Range(1, 2**24)]
"""A dimension of an array, so bounded that two of them and a depth make a number of elements that fits into 64 bits."""
Depth = Annotated[int, Range(1, 2**14)]
"""Number of layers, heads or experts."""
Workers = Annotated[int, Range(1, 1024)]
"""Number of threads or processes on one machine."""
Beams = Annotated[int, Range(1, 1024)]
"""Width of a beam search for translations."""
Positive = Annotated[float, Range(above=0)]
Weight = Annotated[float, Range(0)]
"""Factor of a loss or a decay."""
Share = Annotated[float, Range(0, 1)]
Dropped = Annotated[float, Range(0, below=1)]
"""A fraction below 1."""
Shape = tuple[Dim, Dim, Dim]
"""Height, width and channels."""

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 60
_TINIEST, _GREATEST = 2.0**-126, 3.4e38  # of float32, in which they are used


class Section(ABC):  # noqa: B024
    """A dataclass whose fields are checked whenever one is created: from a file, the command line, JSON or Python.

    Its fields are options `--SECTION.FIELD`. Numbers are converted to their field's type (1 to a float), lists to
    tuples. A class whose values must also fit each other has its own `__post_init__`, which calls this one first.

    A section that comes in several kinds has a base class with `kinds`, the registry of its subclasses. The base has
    the fields that all kinds share, and is not a kind itself; `--SECTION NAME` chooses a kind. Abstract methods of the
    base are what each kind must implement: a kind that lacks one is refused when it is named or created.
    """

    section: ClassVar[str] = ""
    kinds: ClassVar[Registry | None] = None

    def __init_subclass__(cls, section: str | None = None, kinds: Registry | None = None) -> None:
        if section is not None:
            cls.section = section
        if kinds is not None:
            cls.kinds, kinds.check = kinds, subclass_of(cls, kinds.what)

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        if "kinds" in vars(cls) and cls.kinds is not None:
            raise UserError(
                f"got {cls.__name__}, which every {cls.kinds.what} has in common, expected one of them: "
                f"{', '.join(cls.kinds.names())}"
            )
        if lacking := incomplete(cls):
            raise UserError(
                f"got {cls.kinds.what if cls.kinds else cls.section} {cls.__module__}:{cls.__qualname__}, {lacking}"
            )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        fields = {f.name: f for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        for name, kind in _hints(type(self)).items():
            if name in fields:
                value = getattr(self, name)
                default = fields[name].default
                object.__setattr__(self, name, checked(kind, value, name, self.section, default))


def check_call(function: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Check the arguments of a command as fields are checked.

    Raises:
        UserError: an argument is not what its annotation says.
    """
    hints = get_type_hints(function, include_extras=True)
    for name, value in given.items():
        checked(hints[name], value, name, "", inspect.signature(function).parameters[name].default)


def checked(kind: Any, value: Any, name: str, section: str, default: Any = None) -> Any:
    """Return the value converted to its field's type.

    Raises:
        UserError: it is of another type or out of range.
    """
    try:
        return _fit(kind, value)
    except _Misfit as wrong:
        full = f"{section}.{name}" if section else name
        hint = wrong.better
        if not hint and default not in (dataclasses.MISSING, inspect.Parameter.empty, None, "", ()):
            hint = _argument(default)
        tried = f", try --{full.replace('_', '-')} {hint}" if hint else ""
        raise UserError(f"got {full} {shown(value)}, expected {wrong.expected}{wrong.near or tried}") from None


def shown(value: Any) -> str:
    """Format a value for a message, however long or deep it is."""
    try:
        return _REPR.repr(value)
    except Exception:  # a user's object may raise anything when converted to text
        return f"a {type(value).__name__}"


def ranges(kind: Any) -> list[Range]:
    """Return the ranges in a field's type."""
    found = [note for note in getattr(kind, "__metadata__", ()) if isinstance(note, Range)]
    return found + [one for arg in get_args(kind) for one in ranges(arg)]


def docs(kind: type) -> dict[str, str]:
    """Return the docstring under each field of a dataclass, including inherited fields."""
    found: dict[str, str] = {}
    for cls in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(cls):
            continue
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
        except (OSError, TypeError):  # defined without a file
            continue
        for node, after in itertools.pairwise(body):
            if (
                isinstance(node, ast.AnnAssign)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
            ):
                found[node.target.id] = " ".join(str(after.value.value).split())  # type: ignore[union-attr]
    return found


class _Misfit(Exception):
    def __init__(self, expected: str, better: str = "", near: str = "") -> None:
        self.expected, self.better, self.near = expected, better, near


_hints = functools.cache(functools.partial(get_type_hints, include_extras=True))


def _argument(value: Any) -> str:
    """Format a value as on the command line; empty if it is a section of its own."""
    if dataclasses.is_dataclass(value):
        return ""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _fit(kind: Any, value: Any) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        value = _fit(args[0], value)
        for note in args[1:]:
            if isinstance(note, Range):
                expected, bound = note.refusal(value)
                if expected:
                    raise _Misfit(expected, "" if bound is None else str(type(value)(bound)))
            elif isinstance(note, Named):
                note.check(value)
        return value
    if origin in (Union, types.UnionType):
        return _fit_one(args, value)
    if origin is Literal:
        if not any(type(value) is type(name) and value == name for name in args):
            near = nearest(value, map(str, args)) if isinstance(value, str) else ""
            raise _Misfit(f"one of {', '.join(map(str, args))}", near=near)
        return value
    if origin is tuple:
        return _fit_tuple(args, value)
    if kind is bool:
        if not isinstance(value, bool):
            raise _Misfit("True or False")
    elif kind is int:
        if not isinstance(value, numbers.Integral) or isinstance(value, bool):
            whole = isinstance(value, float) and value.is_integer()
            raise _Misfit("a whole number", str(int(value)) if whole else "")  # type: ignore[arg-type]
        return int(value)
    elif kind is float:
        return _fit_float(value)
    elif kind is str:
        if not isinstance(value, str):
            raise _Misfit("text", os.fspath(value) if isinstance(value, Path) else "")
        if "\0" in value:
            raise _Misfit("text without zero bytes")
    elif isinstance(kind, type) and kind is not Any and not isinstance(value, kind):
        kinds = getattr(kind, "kinds", None)
        known = [] if kinds is None else [address.partition(":")[2] + "()" for address in kinds.builtin.values()]
        raise _Misfit(f"one of {', '.join(known)}" if known else f"a {kind.__name__}")
    return value


def _fit_one(kinds: tuple[Any, ...], value: Any) -> Any:
    """The value as the first type of a union that it is of."""
    if value is None and type(None) in kinds:
        return None
    wrong = []
    for kind in kinds:
        if kind is not type(None):
            try:
                return _fit(kind, value)
            except _Misfit as misfit:
                wrong.append(misfit)
    expected = [misfit.expected for misfit in wrong] + (["None"] if type(None) in kinds else [])
    raise _Misfit(" or ".join(expected), wrong[0].better, wrong[0].near)


def _fit_tuple(kinds: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
    several = len(kinds) == 2 and kinds[1] is Ellipsis
    if not isinstance(value, list | tuple) or not (several or len(value) == len(kinds)):
        raise _Misfit("several values" if several else f"{len(kinds)} values")
    return tuple(_fit(kinds[0] if several else kinds[i], one) for i, one in enumerate(value))


def _fit_float(value: Any) -> float:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise _Misfit("a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not abs(number) <= _GREATEST:
        raise _Misfit("a finite number that float32 holds" if number == number else "a number")
    if 0 < abs(number) < _TINIEST:
        raise _Misfit(f"0 or a number that float32 holds, at least {_TINIEST:.2g}")
    return number
