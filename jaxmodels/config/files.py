"""Configs as files: loaded from Python, written to a run directory and read back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

from jaxmodels.config.formats import FORMAT, KIND, current
from jaxmodels.config.kinds import check_kinds, kind_name, kinds_of, section_of
from jaxmodels.config.sections import Config
from jaxmodels.errors import UserError, nearest
from jaxmodels.fields import Section, checked, default_of, shown
from jaxmodels.registry import given_by

ORIGIN = "origin"
"""The key, beside the sections, of where a saved config came from."""


def load(path: str | Path) -> Config:
    """Load the config that a file's `get_config()` returns.

    Raises:
        UserError: there is no such file, no `get_config` in it, or an error inside it.
    """
    config = given_by(path, "config", "get_config", "a Config")
    if not isinstance(config, Config):
        raise UserError(f"got {type(config).__name__} from get_config() in {path}, expected jaxmodels.config.Config")
    check_kinds(config)
    return config


def to_json(config: Config) -> dict[str, Any]:
    """Convert the config to JSON values: its sections, with their kinds' names where they have several, and the format.

    Raises:
        UserError: a section is of a kind that another process could not import.
    """
    return {"format": FORMAT, **{f.name: _encoded(getattr(config, f.name)) for f in dataclasses.fields(config)}}


def _encoded(value: Any) -> Any:
    if not dataclasses.is_dataclass(value):
        return value
    kind = {KIND: kind_name(value)} if kinds_of(value) is not None else {}
    return {**kind, **{f.name: _encoded(getattr(value, f.name)) for f in dataclasses.fields(value)}}


def from_json(value: Any) -> Config:
    """Rebuild the config that `to_json` wrote, in today's format or an older one.

    Raises:
        UserError: a section or a value is missing, unknown, or of another type, or a kind is not installed here.
    """
    sections = [f.name for f in dataclasses.fields(Config)]
    if not isinstance(value, Mapping):
        raise UserError(f"got a config that is {shown(value)}, expected an object with sections {', '.join(sections)}")
    value, hints = current(value), get_type_hints(Config)
    optional = [name for name in sections if type(None) in get_args(hints[name])]
    for name in sections:
        if not isinstance(value.get(name), Mapping) and not (name in optional and value.get(name) is None):
            what = f"is {shown(value[name])}" if name in value else "is missing"
            raise UserError(f"got a config whose section {name!r} {what}, expected an object")
    _check_known(value, [*sections, "format", ORIGIN], "section", "a config")
    return Config(**{name: _decoded(section_of(hints[name]), value.get(name), name) for name in sections})


def _decoded(hint: Any, value: Any, name: str) -> Any:
    """Decode a field's value: lists become tuples, and objects the sections that the type names."""
    if isinstance(value, list):
        return tuple(_decoded(None, item, name) for item in value)
    if not (isinstance(hint, type) and issubclass(hint, Section) and isinstance(value, Mapping)):
        return value
    kind: type = hint
    if hint.kinds is not None:
        kind = hint.kinds.find(checked(str, value.get(KIND), KIND, name))
        value = {key: item for key, item in value.items() if key != KIND}
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    _check_known(value, sorted(fields), "field", kind.__name__)
    if lacking := [key for key, f in fields.items() if key not in value and default_of(f) is dataclasses.MISSING]:
        raise UserError(
            f"got {kind.__name__} without its field {lacking[0]!r}, expected a value of it, "
            "try the version that wrote this config"
        )
    hints = get_type_hints(kind)
    return kind(**{key: _decoded(hints[key], item, f"{name}.{key}") for key, item in value.items()})


def _check_known(given: Iterable[str], known: Sequence[str], what: str, owner: str) -> None:
    if extra := sorted(set(given) - set(known)):
        raise UserError(
            f"got unknown {what} {extra[0]!r} for {owner}, expected one of {', '.join(known)}"
            f"{nearest(extra[0], known) or ', try the version that wrote this config'}"
        )


def save(config: Config, path: Path, origin: Mapping[str, Any]) -> None:
    """Write config.json: all fields, and where they came from (file, overrides, versions, commit)."""
    path.write_text(json.dumps({**to_json(config), ORIGIN: origin}, indent=2) + "\n")


def read(run: str | Path) -> tuple[Config, dict[str, Any]]:
    """Read the config of a run directory, and its origin.

    Raises:
        UserError: there is no run.
    """
    path = Path(run) / "config.json"
    if not path.is_file():
        near = [str(p.parent) for p in Path(run).parent.glob("*/config.json") if p.is_file()]
        raise UserError(f"got run {str(run)!r}, expected a directory with config.json{nearest(str(run), near)}")
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:  # truncated, binary, or nested too deep
        raise UserError(
            f"got {str(path)!r} that is not JSON ({error}), expected a run's config, try a copy of it"
        ) from error
    try:
        config = from_json(value)
    except UserError as error:
        raise UserError(f"{error} (in {path})") from error
    return config, _known(value.get(ORIGIN))


def _known(origin: Any) -> dict[str, Any]:
    """An origin without the parts that are not what `save` writes: a run needs none of them."""
    if not isinstance(origin, Mapping):
        return {}
    kinds = {"file": str, "overrides": list, "versions": Mapping, "commit": str}
    found = {name: value for name, value in origin.items() if isinstance(value, kinds.get(name, object))}
    if not all(isinstance(word, str) for word in found.get("overrides", [])):
        del found["overrides"]
    return found
