"""Purely functional models, one engine that trains any of them on any mesh, and a plan for hardware you don't have."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jaxmodels.errors import UserError

if TYPE_CHECKING:
    from jaxmodels.config import Augment, Checkpoint, Config, Eval, Init, Mesh, Metrics, Profile, Train
    from jaxmodels.data.source import Source
    from jaxmodels.hf import load_pretrained
    from jaxmodels.models.families import create, list_models, register
    from jaxmodels.models.model import Family, Model
    from jaxmodels.tasks.task import Loss, Task
    from jaxmodels.train import load_run
    from jaxmodels.train.loggers import Logger

__version__ = "0.1.0"
__all__ = [
    "Augment", "Checkpoint", "Config", "Eval", "Family", "Init", "Logger", "Loss", "Mesh", "Metrics", "Model",
    "Profile", "Source", "Task", "Train", "UserError", "create", "list_models", "load_pretrained", "load_run",
    "register",
]  # fmt: skip

_HOMES = {
    "config": ("Augment", "Checkpoint", "Config", "Eval", "Init", "Mesh", "Metrics", "Profile", "Train"),
    "data.source": ("Source",),
    "hf": ("load_pretrained",),
    "models.families": ("create", "list_models", "register"),
    "models.model": ("Family", "Model"),
    "tasks.task": ("Loss", "Task"),
    "train": ("load_run",),
    "train.loggers": ("Logger",),
}
"""The module that each public name is defined in."""


def __getattr__(name: str) -> Any:
    """Imports what is asked for, so that the command line answers before jax is loaded."""
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"jaxmodels.{home}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
