"""The commands of `jaxmodels`: one module each, found by one table.

A command is a function: its parameters are its arguments and options, its docstring is its help, and it returns an exit
code or None. One whose first parameter is a `Configured` takes a config file and any of its fields; the options that it
has beside them are a dataclass, its second parameter. The first line of its module says how it is called and what it is
for; `jaxmodels --help` reads that line without importing the module.
"""

from __future__ import annotations

import ast
import importlib
import importlib.abc
import importlib.util
import inspect
import re
from collections.abc import Callable
from typing import Any, get_type_hints

COMMANDS = {
    "train": "jaxmodels.commands.train:train",
    "eval": "jaxmodels.commands.eval:evaluate",
    "tune": "jaxmodels.commands.tune:tune",
    "plan": "jaxmodels.commands.plan:plan",
    "predict": "jaxmodels.commands.predict:predict",
    "sample": "jaxmodels.commands.sample:sample",
    "models": "jaxmodels.commands.models:models",
    "report": "jaxmodels.commands.report:report",
    "import": "jaxmodels.commands.import_:import_run",
    "export": "jaxmodels.commands.export:export_run",
    "data inspect": "jaxmodels.commands.data_inspect:inspect",
    "data prepare": "jaxmodels.commands.data_prepare:prepare",
    "data clean": "jaxmodels.commands.data_clean:clean",
    "data train-tokenizer": "jaxmodels.commands.data_train_tokenizer:train_tokenizer",
    "config explain": "jaxmodels.commands.config_explain:explain",
    "config diff": "jaxmodels.commands.config_diff:diff",
}


def find(name: str) -> Callable[..., Any]:
    """The function of a command."""
    module, _, attribute = COMMANDS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def run(name: str, argv: list[str]) -> int:
    """Run a command with its arguments; returns the exit code.

    Raises:
        UserError: an argument that is wrong, or a mistake that the command finds.
    """
    from jaxmodels.commands.options import Configured, NoOptions, configured, parse

    function, prog = find(name), f"jaxmodels {name}"
    kinds = [get_type_hints(function)[each] for each in inspect.signature(function).parameters]
    if kinds[:1] != [Configured]:
        return parse(function, argv, prog) or 0
    more = kinds[1] if len(kinds) > 1 else NoOptions
    config, options = configured(argv, prog, more)
    given = Configured(config, argv[0], argv[1:])
    return function(given, *[options] * (len(kinds) > 1)) or 0


def listed(group: str = "") -> str:
    """The commands, or those of a group such as `data`, with what each is for, as lines of text."""
    rows = [summary(name) for name in COMMANDS if name.startswith(group)]
    width = max(len(form) for form, _ in rows if len(form) <= 32)
    return "\n".join(f"  {form:{width}}  {purpose}".rstrip() for form, purpose in rows)


def summary(name: str) -> tuple[str, str]:
    """How a command is called and what it is for, as its module says in its first line."""
    module = COMMANDS[name].partition(":")[0]
    spec = importlib.util.find_spec(module)
    source = spec.loader.get_source(module) if spec and isinstance(spec.loader, importlib.abc.InspectLoader) else None
    first = (ast.get_docstring(ast.parse(source or "")) or "").partition("\n")[0]
    found = re.fullmatch(r"`jaxmodels (.*?)`: (.*?)\.?", first)
    return (found[1], found[2]) if found else (name, first.rstrip("."))
