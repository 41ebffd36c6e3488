"""Purely functional models, one engine that trains any of them on any mesh, and a plan for hardware you don't have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jaxmodels.errors import UserError

if TYPE_CHECKING:
    from jaxmodels.hf import load_pretrained
    from jaxmodels.models.families import list_models
    from jaxmodels.models.functional import Model, create
    from jaxmodels.train import load_run
    from jaxmodels.train.loggers import Logger

__version__ = "0.1.0"
__all__ = ["Logger", "Model", "UserError", "create", "list_models", "load_pretrained", "load_run"]


def __getattr__(name: str) -> Any:
    """Imports what is asked for, so that the command line answers before jax is loaded."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "load_pretrained":
        from jaxmodels import hf as place
    elif name == "load_run":
        from jaxmodels import train as place
    elif name == "Logger":
        from jaxmodels.train import loggers as place
    else:
        from jaxmodels.models import functional as place
    return getattr(place, name)
