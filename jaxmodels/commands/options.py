"""The arguments of a command that takes a config: the file, the kinds of its sections, and any of its fields."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxmodels.commands import usage
from jaxmodels.commands.parsing import HELP, Given, NoOptions, parse
from jaxmodels.config import AnyModel, Config, kind_name, kinds_of, load, meant_kind, replaced, with_kinds
from jaxmodels.errors import UserError, nearest

__all__ = ["Configured", "NoOptions", "configured", "take_kinds"]


@dataclass(frozen=True)
class Configured(Given):
    """The config file that a command was given, and the config with the command line's changes."""

    config: Config
    file: str
    overrides: list[str]
    """The arguments after the file."""

    @classmethod
    def read(cls, argv: list[str], prog: str, more: type) -> tuple[Configured, Any]:
        config, options = configured(argv, prog, more)
        return Configured(config, argv[0], argv[1:]), options


def take_kinds(config: Config, argv: Sequence[str], prog: str) -> tuple[Config, list[str]]:
    """Apply options such as `--task vae` that name sections' kinds; return the config and the other arguments.

    Raises:
        UserError: there is no such kind, an option names none, or two options name one section.
    """
    given: dict[str, str] = {}
    rest: list[str] = []
    known = {name: section.kinds for name, section in with_kinds(config)}
    absent = {name: section.kinds for name, section in with_kinds(config) if isinstance(section, type)}
    arguments = iter(argv)
    for argument in arguments:
        option, equals, kind = argument.partition("=")
        name = option.removeprefix("--").replace("-", "_")
        if not option.startswith("--") or name not in known:
            rest.append(argument)
            continue
        kind = kind if equals else next(arguments, "")
        if not kind or kind.startswith("-"):
            raise UserError(f"got {option} without a kind, expected one of {', '.join(known[name].names())}")
        if name in given:
            raise UserError(f"got {option} twice, expected it once, try {prog} with one of the two")
        given[name] = kind
    for name, kinds in absent.items():
        if name not in given and (own := [arg for arg in rest if arg.startswith(f"--{name}.")]):
            option = own[0].partition("=")[0]
            raise UserError(
                f"got {option} without --{name}, expected a kind of it, one of {', '.join(kinds.names())}, "
                f"try --{name} {kinds.names()[0]} {option}"
            )
    for name in sorted(given, key=lambda name: name.count(".")):  # nested kinds belong to the new kind
        config = replaced(config, name, given[name])
    for argument, value in itertools.pairwise([*rest, ""]):
        option, equals, own = argument.partition("=")
        if section := meant_kind(config, option.removeprefix("--"), own if equals else value):
            raise UserError(
                f"got {option} {own or value}, expected a kind as the option of its section, "
                f"try --{section} {own or value}"
            )
    return config, rest


def configured(argv: list[str], prog: str, more: Any) -> tuple[Config, Any]:
    """Return the config named first in `argv`, overridden by the other arguments, and `more` with the command's own
    options.

    `--help` prints the short form, `--help SECTION` the fields of one section, and `--help all` all fields.

    Raises:
        UserError: no config is named, or an option is wrong.
    """
    helped = next((i for i, arg in enumerate(argv) if arg in HELP), None)
    if not argv or (argv[0].startswith("-") and helped != 0):
        raise UserError(
            f"got {argv[0] if argv else 'no config'}, expected a config file first, try {prog} configs/gpt_stdlib.py"
        )
    from tyro.conf import FlagConversionOff

    config = load(argv[0]) if helped != 0 else Config(model=AnyModel())
    file = argv[0] if helped != 0 else usage.FILE
    config, rest = take_kinds(config, argv[1:], f"{prog} {file}")
    argv = [*argv[:1], *rest]
    helped = next((i for i, arg in enumerate(argv) if arg in HELP), None)
    topic = None if helped is None else "".join(argv[helped + 1 : helped + 2])
    if topic is not None and (not topic or topic.startswith("-")):
        print(usage.short(prog, file, config, more))
        raise SystemExit(0)
    # with each section's own type, so that the fields of its kind are options; a bool takes a value too
    sections = {f.name: value for f in dataclasses.fields(Config) if (value := getattr(config, f.name)) is not None}
    fields = [
        (name, FlagConversionOff[type(value)], dataclasses.field(default=value)) for name, value in sections.items()
    ]
    if topic is not None and topic != "all":
        names = [name for name, *_ in fields]
        if topic in (left := {name: kind.kinds for name, kind in with_kinds(config) if isinstance(kind, type)}):
            kind = left[topic].names()[0]
            raise UserError(
                f"got --help {topic}, of which the config has none, expected a kind of it, "
                f"try --{topic} {kind} --help {topic}"
            )
        if topic not in names:
            raise UserError(f"got --help {topic}, expected all or one of {', '.join(names)}{nearest(topic, names)}")
        only = dataclasses.make_dataclass("Options", [fields[names.index(topic)]], frozen=True)
        kinds = kinds_of(getattr(config, topic))
        of = f", here of the kind {kind_name(getattr(config, topic))}, of {', '.join(kinds.names())}" if kinds else ""
        only.__doc__ = f"Options of the section {topic}{of}."
        parse(only, ["--help"], f"{prog} {file}", only())
    both = dataclasses.make_dataclass("Options", fields, bases=(more,), frozen=True)
    both.__doc__ = more.__doc__
    value = parse(both, argv[1:] if helped is None else ["--help"], f"{prog} {file}", both())
    own = more(**{f.name: getattr(value, f.name) for f in dataclasses.fields(more)})
    return Config(**{name: getattr(value, name) for name in sections}), own
