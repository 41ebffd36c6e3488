"""Configs as files: loaded from Python, written to a run directory and read back."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

from jaxmodels.config.sections import Config
from jaxmodels.errors import UserError, nearest
from jaxmodels.fields import checked, shown


def load(path: str | Path) -> Config:
    """The config that a file's `get_config()` returns.

    Raises:
        UserError: no such file, no `get_config`, or an error inside it.
    """
    path = Path(path)
    if not path.is_file():
        near = [str(p) for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise UserError(f"got config {str(path)!r}, expected a Python file with get_config(){nearest(str(path), near)}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"got config {str(path)!r}, expected a Python file with get_config()")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))  # so that a config can build on its neighbour
    try:
        spec.loader.exec_module(module)
        if not callable(getattr(module, "get_config", None)):
            raise UserError(f"got config {str(path)!r} without get_config(), expected get_config() -> Config")
        config = module.get_config()
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # whatever a file of the user's does
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f" in line {lines[-1]}" if lines else ""
        raise UserError(
            f"got config {str(path)!r} that fails with {type(error).__name__}{where}: {error}, "
            "expected a Python file whose get_config() gives a Config"
        ) from error
    finally:
        sys.path.pop(0)
    if not isinstance(config, Config):
        raise UserError(f"got {type(config).__name__} from get_config() in {path}, expected jaxmodels.config.Config")
    return config


def to_json(config: Config) -> dict[str, Any]:
    """The config as JSON values, with the model's family."""
    from jaxmodels.models.functional import family_of

    return {
        **dataclasses.asdict(config),
        "model": {"family": family_of(config.model).name, **dataclasses.asdict(config.model)},
    }


def from_json(value: Any) -> Config:
    """The config that `to_json` wrote.

    Raises:
        UserError: it is not that: a section or a value is missing, unknown, or of another type.
    """
    from jaxmodels.models.functional import family

    sections = [f.name for f in dataclasses.fields(Config)]
    if not isinstance(value, Mapping):
        raise UserError(f"got a config that is {shown(value)}, expected an object with sections {', '.join(sections)}")
    for name in sections:
        if not isinstance(value.get(name), Mapping):
            what = f"is {shown(value[name])}" if name in value else "is missing"
            raise UserError(f"got a config whose section {name!r} {what}, expected an object")
    model = dict(value["model"])
    kind = family(checked(str, model.pop("family", None), "family", "model")).config
    hints = get_type_hints(Config)
    return Config(
        model=_decode(kind, model), **{name: _decode(hints[name], value[name]) for name in sections if name != "model"}
    )


def _decode(kind: Any, value: Any) -> Any:
    options = [arg for arg in getattr(kind, "__args__", ()) if dataclasses.is_dataclass(arg)]
    kind = options[0] if options and isinstance(value, Mapping) else kind
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        hints = get_type_hints(kind)
        known = {f.name for f in dataclasses.fields(kind)}
        if extra := set(value) - known:
            raise UserError(
                f"got unknown field {sorted(extra)[0]!r} for {kind.__name__}, expected one of "
                f"{', '.join(sorted(known))}, try the version that wrote this config"
            )
        return kind(**{name: _decode(hints[name], item) for name, item in value.items()})
    return tuple(_decode(None, item) for item in value) if isinstance(value, list) else value


def save(config: Config, path: Path, origin: Mapping[str, Any]) -> None:
    """Write config.json: all fields, and where they came from (file, overrides, versions, commit)."""
    path.write_text(json.dumps({**to_json(config), "origin": origin}, indent=2) + "\n")


def read(run: str | Path) -> tuple[Config, dict[str, Any]]:
    """The config of a run directory, and its origin.

    Raises:
        UserError: no run there.
    """
    path = Path(run) / "config.json"
    if not path.is_file():
        near = [str(p.parent) for p in Path(run).parent.glob("*/config.json")]
        raise UserError(f"got run {str(run)!r}, expected a directory with config.json{nearest(str(run), near)}")
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:  # cut off, binary, or nested without end
        raise UserError(
            f"got {str(path)!r} that is not JSON ({error}), expected a run's config, try a copy of it"
        ) from error
    try:
        config = from_json(value)
    except UserError as error:
        raise UserError(f"{error} (in {path})") from error
    origin = value.get("origin", {})
    return config, origin if isinstance(origin, dict) else {}
