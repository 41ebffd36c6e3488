"""What the files beside weights say of how images and sounds become a model's inputs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmodels.data.special import objects
from jaxmodels.errors import UserError
from jaxmodels.hf.table import Settings

FILE = "preprocessor_config.json"
WHOLE = "processor_config.json"
"""The file in which transformers writes all parts of a processor since version 5, each in a section of its own."""
IMAGES, SOUNDS = "image_processor", "feature_extractor"
"""Its sections."""


def said_of(directory: Path, section: str) -> tuple[Path, dict[str, Any]] | None:
    """Return what is said of images or of sounds, and the file that says it; as in transformers, a section counts
    before a file of its own.

    Raises:
        UserError: the file is damaged.
    """
    whole, alone = directory / WHOLE, directory / FILE
    inner = objects(whole).get(section) if whole.is_file() else None
    if inner is None:
        return (alone, objects(alone)) if alone.is_file() else None
    if not isinstance(inner, dict):
        shown = json.dumps(inner)[:60]
        raise UserError(f"got {whole} with {section} {shown}, expected an object, try another copy")
    return whole, inner


def write_images(directory: Path, settings: Mapping[str, Any]) -> None:
    """Write what is said of images, in place of what the directory says of them."""
    (directory / FILE).write_text(json.dumps(settings, indent=2) + "\n")
    whole = directory / WHOLE
    if whole.is_file() and IMAGES in (values := objects(whole)):
        del values[IMAGES]
        whole.write_text(json.dumps(values, indent=2) + "\n")


def check_sounds(directory: Path, computed: Mapping[str, Any]) -> None:
    """Refuse sounds that are turned into inputs otherwise than here; `computed` are the settings of what is done here.

    Raises:
        UserError: names all settings that differ.
    """
    if computed and (found := said_of(directory, SOUNDS)):
        settings = Settings(found[1], str(found[0]))
        for name, value in computed.items():
            settings.only(name, value)
        settings.check()
