"""The commands of `jaxmodels`: one module each, found by one table.

A command is a function: its parameters are its arguments and options, its docstring is its help, and it returns an exit
code or None. If its first parameter is a `options.Configured`, it takes a config file and any of its fields, and its
own options are a dataclass, the second parameter. The first line of its module gives its usage and purpose; `jaxmodels
--help` reads that line without importing the module.
"""

from __future__ import annotations

import ast
import functools
import importlib.abc
import importlib.util
import inspect
import re
from collections.abc import Callable
from importlib import metadata
from typing import get_type_hints

from jaxmodels.errors import UserError, nearest
from jaxmodels.registry import OUTSIDE, Registry, function

COMMANDS = Registry(
    "command",
    "jaxmodels.commands",
    {
        "train": "jaxmodels.commands.train:train",
        "eval": "jaxmodels.commands.eval:evaluate",
        "tune": "jaxmodels.commands.tune:tune",
        "plan": "jaxmodels.commands.plan:plan",
        "predict": "jaxmodels.commands.predict:predict",
        "sample": "jaxmodels.commands.sample:sample",
        "models": "jaxmodels.commands.models:models",
        "report": "jaxmodels.commands.report:report",
        "monitor": "jaxmodels.commands.monitor:monitor",
        "goodput": "jaxmodels.commands.goodput:goodput",
        "doctor": "jaxmodels.commands.doctor:doctor",
        "import": "jaxmodels.commands.import_:import_run",
        "serve": "jaxmodels.commands.serve:serve",
        "export": "jaxmodels.commands.export:export_run",
        "compress": "jaxmodels.commands.compress:compress",
        "data inspect": "jaxmodels.commands.data_inspect:inspect",
        "data prepare": "jaxmodels.commands.data_prepare:prepare",
        "data clean": "jaxmodels.commands.data_clean:clean",
        "data train-tokenizer": "jaxmodels.commands.data_train_tokenizer:train_tokenizer",
        "config explain": "jaxmodels.commands.config_explain:explain",
        "config diff": "jaxmodels.commands.config_diff:diff",
        "launch": "jaxmodels.commands.launch:launch",
        "launch status": "jaxmodels.commands.launch_status:status",
        "launch logs": "jaxmodels.commands.launch_logs:logs",
        "launch cancel": "jaxmodels.commands.launch_cancel:cancel",
    },
    function,
)
"""A name of two words is a command in a group. Installed packages add theirs by entry points."""

began: float | None = None
"""Unix seconds at which this process started, if it is a command's own (`cli.process`)."""


def split(argv: list[str]) -> tuple[str, list[str]]:
    """Split arguments into the name of the command, of one word or two, and the rest.

    Raises:
        UserError: there is no such command.
    """
    heads = [(" ".join(argv[:words]), argv[words:]) for words in (2, 1)]
    for name, rest in heads:
        if name in COMMANDS.builtin or OUTSIDE.fullmatch(name):
            return name, rest
    known = COMMANDS.names()
    for name, rest in heads:
        if name in known:
            return name, rest
    word, group = argv[0], members(argv[0])
    if group:
        raise UserError(
            f"got jaxmodels {' '.join(argv[:2])}, expected one of {', '.join(group)}{nearest(argv[1], group)}"
        )
    words = list(dict.fromkeys(name.partition(" ")[0] for name in known))
    raise UserError(f"got command {word!r}, expected one of {', '.join(words)}{nearest(word, words)}")


def members(group: str) -> list[str]:
    """Return the commands in a group such as `data`, without its name."""
    return [name.partition(" ")[2] for name in COMMANDS.names() if name.startswith(f"{group} ")]


def run(name: str, argv: list[str]) -> int:
    """Run a command with its arguments; return the exit code.

    Raises:
        UserError: an argument is wrong, or the command finds a mistake.
    """
    return _bound(name, argv)() or 0


def check(name: str, argv: list[str]) -> None:
    """Check a command's arguments without running it.

    Raises:
        UserError: an argument is wrong.
    """
    _bound(name, argv)


def _bound(name: str, argv: list[str]) -> Callable[[], int | None]:
    """Return the call of a command with its arguments, once they are known to be valid."""
    from jaxmodels.commands.parsing import Given, NoOptions, bind

    function, prog = COMMANDS.find(name), f"jaxmodels {name}"
    kinds = [get_type_hints(function)[each] for each in inspect.signature(function).parameters]
    if not (kinds and isinstance(kinds[0], type) and issubclass(kinds[0], Given)):
        return bind(function, argv, prog)
    given, options = kinds[0].read(argv, prog, kinds[1] if len(kinds) > 1 else NoOptions)
    return functools.partial(function, given, *[options] * (len(kinds) > 1))


def listed(group: str = "") -> str:
    """List the commands, or those in a group such as `data`, with the purpose of each."""
    rows = [summary(name) for name in COMMANDS.names() if name.startswith(group)]
    width = max(len(form) for form, _ in rows if len(form) <= 32)
    return "\n".join(f"  {form:{width}}  {purpose}".rstrip() for form, purpose in rows)


def summary(name: str) -> tuple[str, str]:
    """Return a command's usage and purpose, from the first line of its module."""
    outside = {entry.name: entry.value for entry in metadata.entry_points(group=COMMANDS.group)}
    module = COMMANDS.builtin.get(name, outside.get(name, "")).partition(":")[0]
    try:
        spec = importlib.util.find_spec(module)
    except Exception as error:  # a package from outside may raise anything
        return name, f"cannot be imported: {error}"
    source = spec.loader.get_source(module) if spec and isinstance(spec.loader, importlib.abc.InspectLoader) else None
    first = (ast.get_docstring(ast.parse(source or "")) or "").partition("\n")[0]
    found = re.fullmatch(r"`jaxmodels (.*?)`: (.*?)\.?", first)
    return (found[1], found[2]) if found else (name, first.rstrip("."))
