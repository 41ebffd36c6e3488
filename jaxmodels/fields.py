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
from jaxmodels.hints import member_of, odd_type, typename, unread
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
        bounds = " and ".join(f"{word} {bound}" for word, bound in named.items() if bound not in (None, MOST))
        return bounds if self.also is None else f"{bounds}, or {self.also}"


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
            raise _Misfit(self.registry.expected(self.also), near=nearest(name, known))
        self.registry.find(name)

    def __str__(self) -> str:
        return " ".join(f"`{name}`" for name in (*self.also, *self.registry.builtin)) + " or package.module:Name"


KVCache = Literal["int8"]
"""How a key-value cache is held other than in its model's compute dtype."""
Count = Annotated[int, Range(1, MOST)]
Natural = Annotated[int, Range(0, MOST)]
Seed = Annotated[int, Range(0, 2**32 - 1)]
Dim = Annotated[int, Range(1, 2**24)]
"""A dimension of an array, so bounded that two of them and a depth make a number of elements that fits into 64 bits."""
Depth = Annotated[int, Range(1, 2**14)]
"""Number of layers, heads or experts."""
Port = Annotated[int, Range(1, 65535)]
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
    tuples. A class whose values must also fit each other has its own `__post_init__`; its fields are checked before it.

    A section that comes in several kinds has a base class with `kinds`, the registry of its subclasses. The base has
    the fields that all kinds share, and is not a kind itself; `--SECTION NAME` chooses a kind. Abstract methods of the
    base are what each kind must implement: a kind that lacks one is refused when it is named or created. So is one
    with a field that could not be checked, saved or set on the command line (`unsupported`).
    """

    section: ClassVar[str] = ""
    kinds: ClassVar[Registry | None] = None

    def __init_subclass__(cls, section: str | None = None, kinds: Registry | None = None) -> None:
        if section is not None:
            cls.section = section
        if kinds is not None:
            derived = subclass_of(cls, kinds.what)
            cls.kinds, kinds.check = kinds, lambda found: derived(found) or unsupported(found)
        if own := vars(cls).get("__post_init__"):
            cls.__post_init__ = _after_check(own)  # pyright: ignore[reportAttributeAccessIssue]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        if isinstance(kinds := vars(cls).get("kinds"), Registry):
            raise UserError(
                f"got {cls.__name__}, which every {kinds.what} has in common, expected one of them: "
                f"{', '.join(kinds.names())}"
            )
        # the options of a command are sections too, without kinds, which are not saved
        if cls.kinds is not None and (wrong := incomplete(cls) or unsupported(cls)):
            what = cls.kinds.what if isinstance(cls.kinds, Registry) else "section"
            raise UserError(f"got {what} {cls.__module__}:{cls.__qualname__}, {wrong}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        hints = _hints(type(self))
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = checked(hints[field.name], getattr(self, field.name), field.name, self.section, field.default)
            object.__setattr__(self, field.name, value)


def _after_check(own: Callable[[Any], None]) -> Callable[[Any], None]:
    """Check the fields before a class's own `__post_init__`, which may not call that of its base."""

    @functools.wraps(own)
    def both(self: Any) -> None:
        Section.__post_init__(self)
        own(self)

    return both


@functools.cache
def unsupported(kind: type) -> str:
    """Say which field of a section's class could not be checked, saved or set on the command line; empty if none.

    The text is the end of "got task my.tasks:Mine, …".
    """
    if not dataclasses.is_dataclass(kind):
        return ""
    if not kind.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        return f"whose fields can be set later, expected them frozen, try @dataclass(frozen=True) above {kind.__name__}"
    try:
        hints = _hints(kind)
    except Exception as error:  # a name that is not there, or what is no type
        return unread(kind, error)
    fields = {field.name: hints[field.name] for field in dataclasses.fields(kind)}
    taken = list(inspect.signature(kind.__init__).parameters)[1:]  # type: ignore[misc]
    if odd := sorted(set(fields) ^ set(taken)):
        return (
            f"whose {odd[0]} is {'no argument' if odd[0] in fields else 'an argument that is no field'}, expected each "
            f"field to be an argument of {kind.__name__}, try a property, or {odd[0]} as a field with init=True"
        )
    for name, hint in fields.items():
        if base := member_of(kind, name):
            return f"whose field {name} has the name of a member of {base}, expected a name that is free, try {name}_"
        one = get_args(hint)[0] if get_origin(hint) is Annotated else hint
        if isinstance(one, type) and issubclass(one, Section):
            if inner := "" if isinstance(vars(one).get("kinds"), Registry) else unsupported(one):
                return f"whose field {name} is a section {one.__name__}, {inner}"
        elif wrong := odd_type(hint, Section, Range):
            return (
                f"whose field {name} is {typename(hint)}, expected bool, int, float, str, a Literal, a "
                f"tuple or union of these, or a section, try {wrong}"
            )
    return ""


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


def described(value: Any) -> str:
    """Format what a function from outside gave: arrays, traced or not, as float32[8, 2]."""
    if type(value) is tuple:
        return f"({', '.join(map(described, value))})"
    if type(value) is dict:
        return f"{{{', '.join(f'{name!r}: {described(each)}' for name, each in value.items())}}}"
    if inspect.isroutine(value) or isinstance(value, type):
        return f"the {'class' if isinstance(value, type) else 'function'} {value.__name__}"
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    return shown(value) if shape is None or dtype is None else f"{dtype}{list(shape)}"


def ranges(kind: Any) -> list[Range]:
    """Return the ranges in a field's type."""
    found = [note for note in getattr(kind, "__metadata__", ()) if isinstance(note, Range)]
    return found + [one for arg in get_args(kind) for one in ranges(arg)]


def default_of(field: dataclasses.Field[Any]) -> Any:
    """Return a field's default, from its factory if it has one; MISSING if it has none."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def docs(kind: type) -> dict[str, str]:
    """Return the docstring under each field of a dataclass, including inherited fields."""
    found: dict[str, str] = {}
    fields = {field.name for field in dataclasses.fields(kind)}  # and not what a class says of itself
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
    return {name: text for name, text in found.items() if name in fields}


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
    elif isinstance(kind, type) and kind is not Any and not _is_one(kind, value):
        kinds = getattr(kind, "kinds", None)
        known = [] if kinds is None else [address.partition(":")[2] + "()" for address in kinds.builtin.values()]
        raise _Misfit(f"one of {', '.join(known)}" if known else f"a {kind.__name__}")
    return value


def _is_one(kind: type, value: Any) -> bool:
    """Whether a value is of a class; a section without kinds is of no other, which nothing would name when saved."""
    return type(value) is kind if issubclass(kind, Section) and kind.kinds is None else isinstance(value, kind)


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
