"""The registry of model families: by name, by config, and by the names of published presets."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from jaxmodels.errors import UserError, nearest
from jaxmodels.fields import shown
from jaxmodels.models.config import FAMILIES, ModelConfig
from jaxmodels.models.model import Family, Model, functional
from jaxmodels.registry import outside

_registered: dict[type, Family] = {}


def register(family: Family) -> None:
    """Make a family known to `create`, to configs and to the command line.

    Raises:
        UserError: its name belongs to another family, its config is no `ModelConfig`, or another part is not what it
            should be.
    """
    if not isinstance(family, Family):
        raise UserError(f"got model family {shown(family)}, expected a Family, try register(Family('mine', …))")
    if not isinstance(family.name, str) or not re.fullmatch(r"\w[\w.-]*", family.name):
        raise UserError(f"got model family {shown(family.name)}, expected a name of letters, digits, - and .")
    if not isinstance(family.config, type) or not issubclass(family.config, ModelConfig):
        raise UserError(f"got {shown(family.config)} for model family {family.name!r}, expected a ModelConfig")
    for part in (family.network, family.inputs, family.cache, family.unembedding, family.longest):
        if part is not None and not callable(part):
            raise UserError(f"got {shown(part)} as a part of model family {family.name!r}, expected a function")
    for name, preset in family.presets.items():
        if type(preset) is not family.config:
            whose = f"preset {name!r} of model family {family.name!r}"
            raise UserError(f"got {shown(preset)} as {whose}, expected a {family.config.__name__}")
    if FAMILIES.builtin.get(family.name) != f"{family.config.__module__}:{family.config.__qualname__}":
        FAMILIES.register(family.name)(family.config)
    _registered[family.config] = family


def family(name: str) -> Family:
    """The family of that name, imported if need be.

    Raises:
        UserError: no such family.
    """
    config = FAMILIES.find(name)
    if config not in _registered:
        raise UserError(
            f"got model family {name!r}, expected the config of a family, try register(Family(...)) in its module"
        )
    return _registered[config]


def family_of(config: Any) -> Family:
    """The family whose config this is.

    Raises:
        UserError: it is that of none.
    """
    if type(config) not in _registered:
        own = f", try register(Family(…, config={type(config).__name__}, …)) below the class" if outside(config) else ""
        raise UserError(f"got model config {config!r}, expected one of {', '.join(FAMILIES.names())}{own}")
    return _registered[type(config)]


def list_models() -> dict[str, list[str]]:
    """Families and the names of their presets."""
    return {name: list(family(name).presets) for name in FAMILIES.names()}


def preset(name: str) -> Any:
    """The config of a published model, or a family's default.

    Raises:
        UserError: no such name; says the nearest. Or two families have a preset of that name.
    """
    if ":" in name:
        return family(name).config()
    known: dict[str, Any] = {}
    for key in FAMILIES.names():
        own = {key: family(key).config(), **family(key).presets}
        if name in own and name in known:
            raise UserError(
                f"got preset {name!r} twice, the second time of model family {key!r}, expected a name that is free, "
                "try another one there"
            )
        known |= own
    if name not in known:
        hint = nearest(name, known) or ", try jaxmodels models, which lists them"
        raise UserError(f"got model {name!r}, expected one of {', '.join(FAMILIES.names())} or a preset{hint}")
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
