"""Writes docs/config.md from the dataclasses: `python docs/generate.py`."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from jaxmodels import config
from jaxmodels.fields import Named, ranges
from jaxmodels.launch.place import PLACES, Place
from jaxmodels.models.families import FAMILIES, family
from jaxmodels.registry import Registry

HERE = Path(__file__).parent


def typename(kind: Any) -> str:
    """A type as a reader writes it, with the range of a number."""
    if get_origin(kind) is Annotated:
        if named := [str(note) for note in kind.__metadata__ if isinstance(note, Named)]:
            return named[0]
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


def table(kind: type, section: str, without: Collection[str] = ()) -> list[str]:
    """One row a field, but for those of a base class that stand elsewhere; none, no table.

    Fields of a place are options without a section.
    """
    hints, docs = get_type_hints(kind, include_extras=True), config.docs(kind)
    rows = []
    for f in dataclasses.fields(kind):
        if f.name in without:
            continue
        option, hint = f"--{section + '.' if section else ''}{f.name}".replace("_", "-"), hints[f.name]
        if dataclasses.is_dataclass(f.default) and config.kinds_of(f.default) is None:
            inner = type(f.default)
            rows += table(inner, f"{section}.{f.name}")[2:]
            continue
        if (kinds := config.kinds_of(f.default)) is not None:
            typed, shown = "one of those below", kinds.name_of(type(f.default))
        else:
            typed, shown = typename(hint), "" if f.default is dataclasses.MISSING else f.default
        shown = " ".join(map(str, shown)) if isinstance(shown, tuple) else str(shown)
        shown = f"`{shown}`" if shown else ""
        rows.append(f"| `{option}` | {typed} | {shown} | {docs[f.name].replace('|', '/')} |")
    return ["| option | type | default | |", "| --- | --- | --- | --- |", *rows] if rows else []


def about(kind: type) -> str:
    """The first sentence of a class's documentation."""
    return (kind.__doc__ or "").splitlines()[0]


def by_kind(base: type, kinds: Registry, section: str) -> list[str]:
    """What all kinds of a section share, then what is each one's own."""
    shared = [f.name for f in dataclasses.fields(base)]
    option = f"--{section}".replace("_", "-")
    lines = [
        f"## {section}", "", about(base), "",
        f"`{option} KIND` chooses the {kinds.what}: {', '.join(f'`{name}`' for name in kinds.builtin)}, or one from "
        "outside, `package.module:Name`.", "", *(table(base, section) or ["No field is common to all."]), "",
    ]  # fmt: skip
    for name in kinds.builtin:
        kind = kinds.find(name)
        rows = table(kind, section, shared) or ["It has no fields of its own."]
        lines += [f"### `{option} {name}`: {kind.__name__}", "", about(kind), "", *rows, ""]
    hints = get_type_hints(base)
    for f in dataclasses.fields(base):
        if (inner := config.kinds_of(f.default)) is not None:
            lines += by_kind(hints[f.name], inner, f"{section}.{f.name}")
    return lines


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
        if f.name == "model":
            continue
        if (registry := config.kinds_of(kind := config.section_of(hints[f.name]))) is not None:
            lines += by_kind(kind, registry, f.name)
        else:
            lines += [f"## {f.name}", "", about(hints[f.name]), "", *table(hints[f.name], f.name), ""]
    lines += ["# Models", "", "`model` is a family's config; its fields are `--model.…`.", ""]
    for name in FAMILIES.builtin:
        found = family(name)
        lines += [
            f"## {name}: {found.config.__name__}",
            "",
            about(found.config),
            "",
            *table(found.config, "model"),
            "",
            "Presets: " + ", ".join(f"`{p}`" for p in found.presets) + ".",
            "",
        ]
    lines += ["# Places to launch on", "", "Fields of `jaxmodels launch PLACE`. All places have these:", ""]
    lines += [*table(Place, ""), ""]
    shared = [f.name for f in dataclasses.fields(Place)]
    for name in PLACES.builtin:
        kind = PLACES.find(name)
        lines += [f"## {name}: {kind.__name__}", "", about(kind), "", *table(kind, "", shared), ""]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    (HERE / "config.md").write_text(page())
