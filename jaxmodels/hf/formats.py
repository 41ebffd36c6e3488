"""The families whose weights can be read and written, and the module with the table of each."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jaxmodels.errors import UserError, nearest
from jaxmodels.models import families

if TYPE_CHECKING:
    from jaxmodels.hf.table import Format

TYPES: Mapping[str, tuple[str, ...]] = {
    "gpt2": ("gpt2",),
    "llama": ("llama", "mistral", "qwen2", "qwen3"),
    "mixtral": ("mixtral",),
    "transformer": ("t5", "bart"),
    "bert": ("bert",),
    "vit": ("vit",),
    "resnet": ("resnet",),
    "segformer": ("segformer",),
    "detr": ("detr",),
    "rt_detr": ("rt_detr",),
    "clip": ("clip",),
    "wav2vec2": ("wav2vec2",),
    "whisper": ("whisper",),
    "multimodal": ("llava", "idefics3", "smolvlm", "qwen2_audio"),
}
"""Each family, which is also the name of a module here, and the `model_type`s of config.json that it reads."""
_OWN = ("bart",)
"""Those with a table in a module of their own; they are also variants of their family."""


def supported() -> dict[str, tuple[str, ...]]:
    """Return the families whose weights can be read and written, with their `model_type`s in config.json."""
    return dict(TYPES)


def format_for(config: Any) -> Format:
    """Return the format of a model with this config.

    Raises:
        UserError: transformers has no such model.
    """
    return format_of(families.family_of(config).name, getattr(config, "variant", ""))


def format_of(family: str, kind: str = "") -> Format:
    """Return the format of one of our families, or of a kind of it: a `model_type`, or a variant.

    Raises:
        UserError: transformers has no such model.
    """
    if family not in TYPES:
        raise UserError(
            f"got a model of family {family}, which transformers does not have, expected one of {', '.join(TYPES)}"
        )
    return importlib.import_module(f"jaxmodels.hf.{kind if kind in _OWN else family}").FORMAT


def family_of(model_type: Any) -> str:
    """Return our family for a `model_type` of config.json.

    Raises:
        UserError: no family reads it.
    """
    for family, kinds in TYPES.items():
        if model_type in kinds:
            return family
    known = [kind for kinds in TYPES.values() for kind in kinds]
    raise UserError(
        f"got model_type {model_type!r}, expected one of {', '.join(known)}{nearest(str(model_type), known)}"
    )
