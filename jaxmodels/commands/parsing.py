"""Parse the command line into typed objects: tyro over frozen dataclasses, with mistakes as one line."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import functools
import inspect
import io
import os
import re
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Self, Union, get_args, get_origin, get_type_hints

from jaxmodels.errors import UserError, nearest
from jaxmodels.fields import check_call

HELP = {"-h", "--help"}


class Given(ABC):
    """The first parameter of a command whose options depend on what it is given, such as a config or a place."""

    @classmethod
    @abstractmethod
    def read(cls, argv: list[str], prog: str, more: type) -> tuple[Self, Any]:
        """Read all arguments; return what was given, and the command's own options, a `more`.

        Raises:
            UserError: an argument is wrong.
        """


@dataclass(frozen=True)
class NoOptions:
    """The fields of the experiment."""


def parse(kind: Any, argv: Sequence[str], prog: str, default: Any = None, about: str | None = None) -> Any:
    """Parse command-line arguments into a typed object (tyro), with mistakes as one-line `UserError`s.

    `--help` prints the help, which begins with `about` or the type's docstring, and exits with 0.
    """
    import tyro

    given: dict[str, Any] = {"description": about}
    if default is not None:
        given |= {"default": default, "config": (tyro.conf.FlagCreatePairsOff,)}
    argv = once(kind, argv, prog, default)
    printed = io.StringIO()
    try:
        # help is wrapped for the reader's terminal, an error is one line
        width = contextlib.nullcontext() if HELP & set(argv) else _wide_terminal()
        with contextlib.redirect_stderr(printed), width:
            value, unknown = tyro.cli(kind, prog=prog, args=list(argv), return_unknown_args=True, **given)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(_one_line(printed.getvalue(), prog)) from None
    if unknown:
        raise UserError(_unknown(unknown[0].split("=")[0], sorted({"--help", *options(kind, default)}), prog))
    return value


def bind(function: Callable[..., Any], argv: Sequence[str], prog: str) -> Callable[[], Any]:
    """Return the call of a function with arguments from the command line, once all of them are known to be valid."""

    @functools.wraps(function)
    def arguments(*args: Any, **kwargs: Any) -> inspect.BoundArguments:
        return inspect.signature(function).bind(*args, **kwargs)

    found = parse(arguments, argv, prog)
    check_call(function, found.arguments)
    return functools.partial(function, *found.args, **found.kwargs)


def options(kind: Any, default: Any = None) -> dict[str, bool]:
    """Return the options that tyro makes of a dataclass or a function: whether each takes any number of values."""
    return dict(_options(kind, default, "--", pairs=default is None))


def _options(kind: Any, default: Any, prefix: str, pairs: bool) -> Iterator[tuple[str, bool]]:
    from tyro.conf import Positional

    hints = get_type_hints(kind, include_extras=True)
    for name, parameter in inspect.signature(kind).parameters.items():
        hint, *marks = get_args(hints[name]) if get_origin(hints[name]) is Annotated else (hints[name],)
        if parameter.kind is parameter.POSITIONAL_ONLY or Positional in marks:
            continue
        path = prefix + name
        for mark in marks:  # tyro.conf.arg(name=…, prefix_name=False)
            if getattr(mark, "name", None) is not None:
                path = (prefix if mark.prefix_name is not False else "--") + mark.name
        value = getattr(default, name, parameter.default)
        owner = type(value) if dataclasses.is_dataclass(value) else hint  # a kind of section, by its default
        if dataclasses.is_dataclass(owner):
            yield from _options(owner, value, f"{path}." if path != prefix else prefix, pairs)
            continue
        kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        yield path.replace("_", "-"), any(get_origin(each) is tuple and ... in get_args(each) for each in kinds)
        if hint is bool and pairs:
            yield f"{path[: -len(name)]}no-{name}".replace("_", "-"), False


def once(kind: Any, argv: Sequence[str], prog: str, default: Any = None) -> list[str]:
    """Merge repeated options: several values of one option that are given in parts are put together.

    Raises:
        UserError: an option that takes one value is given twice.
    """
    parts: list[list[str]] = [[]]
    for arg in argv:
        name, equals, value = arg.partition("=")
        if re.match("--[a-zA-Z]", arg):
            parts.append([name.replace("_", "-"), *([value] if equals else [])] if equals else [arg])
        else:
            parts[-1].append(arg)
    names = [part[0].replace("_", "-") for part in parts[1:]]
    if len(set(names)) == len(names):
        return list(argv)
    known = options(kind, default)
    if not set(names) <= set(known):  # the one that does not exist is refused as that
        return list(argv)
    several = {name for name in known if known[name]}
    merged: dict[str, list[str]] = {}
    for name, part in zip(names, parts[1:], strict=True):
        if name in merged and name not in several:
            raise UserError(f"got {name} twice, expected it once, try {prog} with one of the two")
        merged.setdefault(name, [part[0]]).extend(part[1:])
    return [*parts[0], *(arg for part in merged.values() for arg in part)]


@contextlib.contextmanager
def _wide_terminal() -> Iterator[None]:
    """Make the terminal so wide that tyro does not wrap its messages."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "1000"
    try:
        yield
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before


def _unknown(name: str, known: Sequence[str], prog: str) -> str:
    """Format the message about an unknown option, with the nearest one of its section, or of all."""
    section, _, field_name = name.rpartition(".")
    here = {option.rpartition(".")[2]: option for option in known if section and option.startswith(section + ".")}
    close = [here[found] for found in difflib.get_close_matches(field_name, here, n=1, cutoff=0.5)]
    if not close:  # an option of another section, or of none
        close = [option for option in known if option.endswith("." + field_name.lstrip("-"))]
    if not close and not here:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f", did you mean {close[0]!r}?" if close else f", try {_help(prog, name if here else '')}"
    what = "an option" if name.startswith("-") else "options only"
    return f"got {name!r}, expected {what} of {prog}{hint}"


def _help(prog: str, option: str) -> str:
    """Return the command that shows what an option takes: for a config's field, the help of its section."""
    section, dot, _ = option.lstrip("-").partition(".")
    return f"{prog} --help" + (f" {section}" if dot and ".py" in prog else "")


def _one_line(message: str, prog: str) -> str:
    """Convert tyro's boxed error to one line: got, expected, try."""
    # remove colors, and the box in either of tyro's styles
    lines = [re.sub(r"\x1b\[[0-9;]*m|-{5,}", "", line).strip("│╭╮╰╯─| ") for line in message.splitlines()]
    lines = [
        line
        for line in lines
        if line
        and "--help" not in line
        and not re.search(r"(^(Parsing|Value|Invalid|Missing|Required|Unrecognized)[\w ]*|helptext:|options?)$", line)
    ]
    text = " ".join(lines)
    if choice := re.match(r"invalid choice '(.*)' for argument '(.*)'. Expected one of \((.*)\)", text):
        got, option, names = choice.groups()
        known = names.replace("'", "").split(", ")
        if "None" in known:  # tyro lists these in an order that differs from process to process
            known = [*sorted(name for name in known if name != "None"), "None"]
        return f"got {option} {got!r}, expected one of {', '.join(known)}{nearest(got, known)}"
    if missing := re.match(r"Missing from .*?: (.*)", text):
        wanted, _, unknown = missing[1].partition("Unrecognized options:")
        parts = [part.strip().rstrip(".") for part in wanted.split("(required)")[:-1]]
        # a positional argument is shown by its description
        parts = [part if part.startswith("--") else part.partition(" ")[2] for part in parts]
        got = repr(unknown.split()[0]) if unknown else "too few arguments"
        close = nearest(got.strip("'"), [part.split()[0] for part in parts])
        return f"got {got}, expected {' and '.join(parts)}{close or f', try {prog} --help'}"
    if own := re.match(r"Error parsing \w+: (got .*)", text):  # from a section's own check
        return own[1]
    if few := re.match(r"Missing value for argument '(--[\w.-]+)'\. (Expected \d+ values?)", text):
        return f"got {few[1]} with fewer values, {few[2].lower()}, try {_help(prog, few[1])}"
    if wrong := re.match(r"Error parsing (--[\w.-]+): .*?(\['.*?'\]|'[^']*')", text):
        option, given = wrong[1], ast.literal_eval(wrong[2])
        value = " ".join(given) if isinstance(given, list) else given
        kind = next((line.partition(" ")[2] for line in lines if line.startswith(f"{option} ")), "another value")
        kind, optional = re.subn(r"^\{None\}\|", "", kind)
        kind = re.sub(r"^\{?\[(.*)\]\}?$", r"\1", kind)
        spaced = value.replace(",", " ")
        better = f"{option} {spaced}" if spaced != value and " " in kind else _help(prog, option)
        return f"got {option} {value!r}, expected {kind}{' or None' * optional}, try {better}"
    return f"got {text}, try {prog} --help" if text else message
