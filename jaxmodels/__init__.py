"""Purely functional models, one engine that trains any of them on any mesh, and a plan for hardware you don't have."""

from jaxmodels.errors import UserError
from jaxmodels.hf import load_pretrained
from jaxmodels.models.functional import Model, create, list_models
from jaxmodels.train import load_run

__version__ = "0.1.0"
__all__ = ["Model", "UserError", "create", "list_models", "load_pretrained", "load_run"]
