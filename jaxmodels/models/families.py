"""The registry of model families: by name, by config, and by the names of published presets."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

from jaxmodels.errors import UserError, nearest
from jaxmodels.models.model import Family, Model, functional

FAMILIES = {
    name: f"jaxmodels.models.{name}"
    for name in (
        "gpt2",
        "llama",
        "mixtral",
        "mlp",
        "transformer",
        "cnn",
        "resnet",
        "vgg",
        "lstm",
        "vae",
        "gan",
        "bert",
        "vit",
        "clip",
    )
}
"""Family -> the module that registers it, so that a family is imported when it is asked for."""

_registered: dict[str, Family] = {}


def register(family: Family) -> None:
    """Make a family known to `create` and `list_models`."""
    _registered[family.name] = family


def family(name: str) -> Family:
    """The family of that name, imported if need be."""
    if name not in FAMILIES and name not in _registered:
        raise UserError(f"got model family {name!r}, expected one of {', '.join(FAMILIES)}{nearest(name, FAMILIES)}")
    if name not in _registered:
        importlib.import_module(FAMILIES[name])
    return _registered[name]


def family_of(config: Any) -> Family:
    """The family that a config belongs to."""
    for name in _registered:
        if type(config) is _registered[name].config:
            return _registered[name]
    raise UserError(f"got model config {config!r}, expected one of {', '.join(FAMILIES)}")


def list_models() -> dict[str, list[str]]:
    """Families and the names of their presets."""
    return {name: list(family(name).presets) for name in FAMILIES}


def preset(name: str) -> Any:
    """The config of a published model, or a family's default.

    Raises:
        UserError: no such name; says the nearest.
    """
    known: dict[str, Any] = {}
    for key in FAMILIES:
        known |= {key: family(key).config()} | dict(family(key).presets)
    if name not in known:
        hint = nearest(name, known) or ", try jaxmodels models, which lists them"
        raise UserError(f"got model {name!r}, expected one of {', '.join(FAMILIES)} or a preset{hint}")
    return known[name]


def create(model: Any, **overrides: Any) -> Model:
    """A model from a preset's name ("gpt2", "llama3-8b") or a family's config, with fields overridden.

    Raises:
        UserError: unknown name, unknown field, or values that do not fit together.
    """
    config = preset(model) if isinstance(model, str) else model
    kind = family_of(config)
    fields = [f.name for f in dataclasses.fields(config)]
    for name in overrides:
        if name not in fields:
            raise UserError(
                f"got {type(config).__name__} field {name!r}, expected one of {', '.join(fields)}"
                f"{nearest(name, fields)}"
            )
    return functional(dataclasses.replace(config, **overrides), kind)
