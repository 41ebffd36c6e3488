"""Saved configs of an older format, turned into today's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxmodels.data.section import SOURCES
from jaxmodels.errors import UserError
from jaxmodels.fields import shown
from jaxmodels.registry import Registry
from jaxmodels.tasks.task import TASKS
from jaxmodels.train.optim import OPTIMIZERS
from jaxmodels.train.schedules import SCHEDULES

FORMAT = 3
"""The version of what is written today."""
ADDED = ("distill",)
"""Sections that have come since, without a new format: a config that lacks them has their defaults."""
KIND = "class"
"""The name of a section's kind in JSON, which no field can have."""


def current(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """A saved config in today's format.

    Raises:
        UserError: it is of a format that is not known here.
    """
    version = value.get("format", 1)
    if version in _LATER and type(version) is int:
        return current(_LATER[version](value))
    if version != FORMAT or type(version) is not int:
        known = ", ".join(map(str, [*_LATER, FORMAT]))
        raise UserError(
            f"got a config of format {shown(version)}, expected one of {known}, "
            "try the version of jaxmodels that wrote it"
        )
    return {**{name: {} for name in ADDED}, **value}


def _from_1(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """Kinds were fields with names of their own, and a section had the fields of all its kinds."""
    sections = {name: dict(each) if isinstance(each, Mapping) else each for name, each in value.items()}
    model, task, data, optim, metrics = (sections.get(name) for name in ("model", "task", "data", "optim", "metrics"))
    if isinstance(model, dict) and "family" in model:
        model[KIND] = model.pop("family")
    if isinstance(optim, dict) and "schedule" in optim:
        shape = {name: optim[name] for name in ("final_lr_fraction", "decay_fraction") if name in optim}
        optim["schedule"] = {"kind": optim["schedule"], **shape}
        _as_kind(optim["schedule"], "kind", SCHEDULES)
    for section, name, kinds in ((task, "name", TASKS), (data, "source", SOURCES), (optim, "name", OPTIMIZERS)):
        if isinstance(section, dict):
            _as_kind(section, name, kinds)
    if isinstance(metrics, dict) and "tensorboard" in metrics:
        metrics["loggers"] = ["tensorboard"] if metrics.pop("tensorboard") else []
    return {**sections, "format": 2}


def _as_kind(section: dict[str, Any], name: str, kinds: Registry) -> None:
    """Name the kind as today, and leave out the fields that it does not have, which meant nothing for it."""
    if not isinstance(kind := section.pop(name, None), str):
        return
    known = {field.name for field in dataclasses.fields(kinds.find(kind))}
    for other in section.keys() - known:
        del section[other]
    section[KIND] = kind


def _from_2(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """`eval.mode` was min where nothing was asked for."""
    sections, judged = dict(value), value.get("eval")
    if isinstance(judged, Mapping) and judged.get("mode") == "min":
        sections["eval"] = {**judged, "mode": None}
    return {**sections, "format": 3}


_LATER: dict[int, Callable[[Mapping[str, Any]], Mapping[str, Any]]] = {1: _from_1, 2: _from_2}
"""What turns a format into the next one."""
