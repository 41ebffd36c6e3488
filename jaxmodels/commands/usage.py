"""The short form of `--help`: a command's own options, the fields that most experiments set, and the sections."""

from __future__ import annotations

import dataclasses
import shutil
import textwrap
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from jaxmodels import config as configs
from jaxmodels.config import Config

FREQUENT = (
    "data.path", "data.batch_size", "data.seq_len", "optim", "optim.peak_lr", "optim.weight_decay", "train.steps",
    "train.seed", "eval.every", "checkpoint.every", "mesh.data", "mesh.fsdp",
)  # fmt: skip
"""The fields that most experiments set, in the order of the sections."""


def short(prog: str, file: str, config: Config, more: type) -> str:
    """Format the help of a command that takes a config; the values shown are the config's."""
    width = min(shutil.get_terminal_size((80, 24)).columns, 120)
    own = [(_option(f.name, kind), text) for f, kind, text in _fields(more)]
    values = configs.flatten(config)
    frequent = [
        (f"--{name.replace('_', '-')} {_written(values[name])}".rstrip(), configs.documentation(config, name))
        for name in FREQUENT
        if name in values
    ]
    about = configs.docs(Config)
    sections = [(f.name, about[f.name]) for f in dataclasses.fields(Config)]
    parts = [
        f"usage: {prog} {file} [--OPTION VALUE ...]",
        _listed("", own, width, whole=True),
        _listed(f"fields that most experiments set, as {'they are by default' if file == FILE else 'they are in it'}:",
                frequent, width),
        _listed("sections of fields, --SECTION.FIELD VALUE:", [(n, text) for n, text in sections], width),
        f"  {prog} {file} --help SECTION     its fields\n  {prog} {file} --help all         every field",
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part)


FILE = "CONFIG.py"
"""The placeholder for a config that is not named."""


def _fields(kind: type) -> list[tuple[Any, Any, str]]:
    """List a class's fields with types, descriptions and defaults."""
    hints, docs = get_type_hints(kind), configs.docs(kind)
    return [
        (f, hints[f.name], docs[f.name] + (f" ({f.default})" if f.default not in (None, "", (), False) else ""))
        for f in dataclasses.fields(kind)
    ]


def _option(name: str, kind: Any) -> str:
    """Format an option and the values it takes."""
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if get_origin(kind) in (Union, UnionType):
        kind = next(each for each in get_args(kind) if each is not NoneType)
    takes = {bool: "", int: "N", float: "NUMBER", Path: "PATH"}
    text = "|".join(map(str, get_args(kind))) if get_origin(kind) is Literal else takes.get(kind, "TEXT")
    return f"--{name.replace('_', '-')} {text}{' ...' if get_origin(kind) is tuple else ''}".strip()


def _written(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _listed(title: str, rows: list[tuple[str, str]], width: int, whole: bool = False) -> str:
    """List names and descriptions in two columns: whole descriptions, or what fits on one line."""
    if not rows:
        return ""
    column = min(max(len(name) for name, _ in rows), 30) + 4
    lines = [title] if title else []
    for name, text in rows:
        room = width - column
        wrapped = textwrap.wrap(text, room) if whole else [_cut(text, room)]
        if len(name) + 3 > column:
            lines.append(f"  {name}")
            name = ""
        lines += [f"{f'  {name}' if i == 0 and name else '':{column}}{line}" for i, line in enumerate(wrapped)]
    return "\n".join(lines)


def _cut(text: str, room: int) -> str:
    """Return a text's first clause if it fits, or else as many words as fit."""
    for end in (". ", "; ", " ("):
        text = text.partition(end)[0] if len(text) > room else text
    return textwrap.shorten(text.rstrip("."), room, placeholder=" …")
