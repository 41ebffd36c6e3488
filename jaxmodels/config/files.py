"""Configs as files: loaded from Python, written to a run directory and read back."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

from jaxmodels.config.sections import Config
from jaxmodels.errors import UserError, nearest


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
    except (SyntaxError, ImportError, AttributeError, TypeError) as error:
        raise UserError(f"got config {str(path)!r} that fails with {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    if not hasattr(module, "get_config"):
        raise UserError(f"got config {str(path)!r} without get_config(), expected get_config() -> Config")
    config = module.get_config()
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


def from_json(value: Mapping[str, Any]) -> Config:
    """The config that `to_json` wrote."""
    from jaxmodels.models.functional import family

    model = dict(value["model"])
    kind = family(model.pop("family")).config
    sections = {
        f.name: _decode(get_type_hints(Config)[f.name], value[f.name])
        for f in dataclasses.fields(Config)
        if f.name != "model" and f.name in value
    }
    return Config(model=_decode(kind, model), **sections)


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
    value = json.loads(path.read_text())
    return from_json(value), value.get("origin", {})
