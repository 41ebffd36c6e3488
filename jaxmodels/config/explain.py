"""Explaining configs: every field by name, where its value came from, and what it means."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxmodels.config.kinds import kind_name, kinds_of
from jaxmodels.config.sections import Config
from jaxmodels.fields import default_of, docs


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return every field by its dotted name; a section that comes in several kinds also appears, as its kind's name."""
    found: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if not dataclasses.is_dataclass(value):
            found[prefix + f.name] = value
            continue
        if kinds_of(value) is not None:
            found[prefix + f.name] = kind_name(value)
        found |= flatten(value, f"{prefix}{f.name}.")
    return found


def differences(a: Config, b: Config) -> dict[str, tuple[Any, Any]]:
    """Return the fields that differ, by dotted name: (in a, in b)."""
    left, right = flatten(a), flatten(b)
    return {
        name: (left.get(name), right.get(name)) for name in sorted(left | right) if left.get(name) != right.get(name)
    }


def provenance(config: Config, name: str, origin: Mapping[str, Any]) -> str:
    """Say where a field's value came from: the command line, the config file, or the default."""
    option = "--" + name.replace("_", "-")
    given = {arg.split("=")[0].replace("_", "-") for arg in origin.get("overrides", [])}
    if option in given:
        return "command line"
    *path, last = name.split(".")
    owner: Any = config
    for part in path:
        owner = getattr(owner, part)
    default = {f.name: default_of(f) for f in dataclasses.fields(owner)}[last]
    return "default" if default == getattr(owner, last) else f"config file {origin.get('file')}"


def documentation(config: Config, name: str) -> str:
    """Return the docstring under a field's definition."""
    *path, field = name.split(".")
    owner: Any = config
    for part in path:
        owner = getattr(owner, part)
    return docs(type(owner)).get(field, "")
