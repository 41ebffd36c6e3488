"""Writes docs/config.md from the dataclasses: `python docs/generate.py`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from jaxmodels import config
from jaxmodels.fields import ranges
from jaxmodels.models import families

HERE = Path(__file__).parent


def typename(kind: Any) -> str:
    """A type as a reader writes it, with the range of a number."""
    if get_origin(kind) is Annotated:
        said = str(ranges(kind)[0])
        return f"{typename(get_args(kind)[0])} {said}".strip()
    if kind is type(None):
        return "None"
    if str(get_origin(kind)) == "typing.Literal":
        return " ".join(f"`{value}`" for value in get_args(kind))
    if dataclasses.is_dataclass(kind):
        return " ".join(f"{f.name}" for f in dataclasses.fields(kind))
    if get_origin(kind) is tuple:
        return "several: " + typename(get_args(kind)[0])
    if args := [a for a in get_args(kind)]:
        return " or ".join(typename(a) for a in args)
    return getattr(kind, "__name__", str(kind))


def table(kind: type, section: str) -> list[str]:
    """One row a field."""
    hints, docs, default = get_type_hints(kind, include_extras=True), config.docs(kind), kind()
    rows = ["| option | type | default | |", "| --- | --- | --- | --- |"]
    for f in dataclasses.fields(kind):
        value = getattr(default, f.name)
        if dataclasses.is_dataclass(value):
            inner = config.docs(type(value))
            for g in dataclasses.fields(value):
                option = f"--{section}.{f.name}.{g.name}".replace("_", "-")
                kind_of = typename(get_type_hints(type(value), include_extras=True)[g.name])
                rows.append(f"| `{option}` | {kind_of} | `{getattr(value, g.name)}` | {inner[g.name]} |")
            continue
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        option = f"--{section}.{f.name}".replace("_", "-")
        shown = f"`{shown}`" if shown else ""
        rows.append(f"| `{option}` | {typename(hints[f.name])} | {shown} | {docs[f.name].replace('|', '/')} |")
    return rows


def page() -> str:
    """docs/config.md."""
    lines = [
        "# Every field of an experiment",
        "",
        "Generated from the dataclasses by `python docs/generate.py`; a test fails when it is out of date.",
        "A config file defines `get_config() -> Config`; each field is an option of `jaxmodels train CONFIG.py`.",
        "",
    ]
    hints = get_type_hints(config.Config)
    for f in dataclasses.fields(config.Config):
        if f.name != "model":
            kind = hints[f.name]
            lines += [f"## {f.name}", "", (kind.__doc__ or "").splitlines()[0], "", *table(kind, f.name), ""]
    lines += ["# Models", "", "`model` is a family's config; its fields are `--model.…`.", ""]
    for name in families.FAMILIES.names():
        family = families.family(name)
        lines += [
            f"## {name}: {family.config.__name__}",
            "",
            (family.config.__doc__ or "").splitlines()[0],
            "",
            *table(family.config, "model"),
            "",
            "Presets: " + ", ".join(f"`{p}`" for p in family.presets) + ".",
            "",
        ]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    (HERE / "config.md").write_text(page())
