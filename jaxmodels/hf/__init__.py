"""Read and write weights in Hugging Face's format: one engine, and one table per family."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxmodels.hf.formats import TYPES, family_of, format_for, format_of, supported

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from jaxmodels.models.model import Model

__all__ = ["TYPES", "family_of", "format_for", "format_of", "load_pretrained", "supported"]


def load_pretrained(
    directory: str | Path, *, mesh: Mesh | None = None, codes: bool = False, **overrides: Any
) -> tuple[Model, Any]:
    """Load a model and its parameters from a directory in Hugging Face's format (config.json, model.safetensors).

    Parameters become float32, whatever their type in the file, unless `codes` keeps those that files in the format
    compressed-tensors hold as codes (`models.coded.Coded`). With a mesh, each parameter is placed by the table of
    `parallel.rules`, and each process holds only its own part. `overrides` are config fields that do not change the
    weights (dtype, attention, remat, dropout). `model.stats()` returns loaded batch statistics, where there are any.

    Raises:
        UserError: settings that are not computed here, or tensors that do not fit; all are named before any is read.
    """
    from jaxmodels.hf import load

    return load.load_pretrained(Path(directory), mesh, overrides, codes)
