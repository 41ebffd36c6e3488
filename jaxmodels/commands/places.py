"""The arguments of `jaxmodels launch`: a place and its fields, and after `--` the command to run there."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from jaxmodels import commands
from jaxmodels.commands.parsing import HELP, Given, parse
from jaxmodels.errors import UserError, nearest
from jaxmodels.launch.place import PLACES, Place
from jaxmodels.launch.record import place_in
from jaxmodels.registry import OUTSIDE

_COMMANDS = ("train", "eval", "tune", "doctor", "benchmarks")
_EXAMPLE = "train configs/gpt_stdlib.py --mesh.fsdp 2"


@dataclass(frozen=True)
class Placed(Given):
    """The place that a command was given, with the command line's changes, and what follows `--`."""

    place: Place
    file: str
    """The file that defines the place; empty if the place was named."""
    command: tuple[str, ...]

    @classmethod
    def read(cls, argv: list[str], prog: str, more: type) -> tuple[Placed, Any]:
        return placed(argv, prog, more)


def placed(argv: list[str], prog: str, more: type) -> tuple[Placed, Any]:
    """Return the place named first in `argv`, overridden by its options, the command after `--`, and a `more` of the
    other options.

    Raises:
        UserError: no place is named, an option is wrong, or the command cannot be launched.
    """
    split = argv.index("--") if "--" in argv else len(argv)
    own, command = argv[:split], tuple(argv[split + 1 :])
    if not own or own[0] in HELP:
        print(_help(prog))
        raise SystemExit(0 if own else 2)
    if own[0].startswith("-"):
        raise UserError(f"got {own[0]}, expected a place first, try {prog} local -- {_EXAMPLE}")
    place = _place(own[0])
    file = own[0] if own[0].endswith(".py") else ""
    kind = place if isinstance(place, type) else type(place)
    default: Any = dataclasses.MISSING if isinstance(place, type) else place
    from tyro.conf import arg

    if taken := {f.name for f in dataclasses.fields(more)} & {f.name for f in dataclasses.fields(kind)}:
        raise UserError(f"got a place {kind.__name__} with a field {min(taken)!r}, which is an option of {prog}")
    fields = [("place", Annotated[kind, arg(name="")], dataclasses.field(default=default))]
    both = dataclasses.make_dataclass("Options", fields, bases=(more,), frozen=True, kw_only=True)
    both.__doc__ = kind.__doc__
    value = parse(both, own[1:], f"{prog} {own[0]}")
    if not command:
        raise UserError(f"got nothing to launch, expected a command after --, try {prog} {' '.join(own)} -- {_EXAMPLE}")
    check(value.place, command)
    options = more(**{f.name: getattr(value, f.name) for f in dataclasses.fields(more)})
    return Placed(value.place, file, command), options


def _place(name: str) -> Place | type[Place]:
    """Return the place that a file or a name stands for; its class, if it has fields without a default."""
    if name.endswith(".py") or "/" in name:
        return place_in(name)
    known = PLACES.names()
    if name not in known and not OUTSIDE.fullmatch(name):
        files = [str(path) for path in sorted(Path("launch").glob("*.py"))]
        near = nearest(name, [*known, *commands.members("launch")])
        stem = [path for path in files if Path(path).stem == name]
        hint = f", did you mean {stem[0]!r}?" if stem else near or f", try jaxmodels launch local -- {_EXAMPLE}"
        raise UserError(
            f"got place {name!r}, expected a file with get_place(), one of {', '.join(known)}, or package.module:Name"
            f"{hint}"
        )
    kind = PLACES.find(name)
    if not isinstance(kind, type) or not issubclass(kind, Place) or not dataclasses.is_dataclass(kind):
        raise UserError(f"got place {name!r}, expected a frozen dataclass that derives from Place")
    required = [f for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING]
    return kind if required else kind()


def check(place: Place, command: Sequence[str]) -> None:
    """Check a command before it is submitted.

    Raises:
        UserError: it is no command that can be launched; or, at a place where it may wait for machines, its config or
            an option is wrong.
    """
    name = command[0]
    if name not in _COMMANDS:
        raise UserError(
            f"got command {name!r} after --, expected one of {', '.join(_COMMANDS)}"
            f"{nearest(name, _COMMANDS) or f', try -- {_EXAMPLE}'}"
        )
    inside = place.from_image and len(command) > 1 and not Path(command[1]).exists()  # a file of the image
    waits = not place.stays or place.from_image  # the others start the command at once, which checks itself
    if waits and not inside and name != "benchmarks":
        commands.check(name, list(command[1:]))


def _help(prog: str) -> str:
    places = []
    for name in PLACES.names():
        try:
            about = (PLACES.find(name).__doc__ or "").partition("\n")[0]
        except UserError as error:  # another package's
            about = str(error)
        places.append((name, about))
    for path in sorted(Path("launch").glob("*.py")):
        with contextlib.suppress(OSError, SyntaxError, ValueError):
            about = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
            places.append((str(path), about))
    width = max(len(name) for name, _ in places)
    listed = "\n".join(f"  {name:{width}}  {about}".rstrip() for name, about in places)
    return f"""usage: {prog} PLACE [--OPTION VALUE ...] [--name NAME] [--dry-run] -- COMMAND ...
       {prog} status [NAME]
       {prog} logs NAME [--follow]
       {prog} cancel NAME

Run a command on many processes, which are supervised and restarted after failures. COMMAND is one of
{", ".join(_COMMANDS)}, with its arguments: -- {_EXAMPLE}

places: a file with get_place(), a name, or package.module:Name
{listed}

  --help after a place   its fields, each an option
  --name NAME            name of the job; by default made from its command and the time
  --dry-run              print what would be submitted without submitting it

exit codes: 0 done (or submitted, if the place has a queue), 2 a mistake in what was asked, 75 stopped but saved (run it
again), 1 anything else

  {prog} local --processes 2 -- {_EXAMPLE}"""
