"""From a model and its parameters to a directory in Hugging Face's format."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels import hf
from jaxmodels.errors import UserError
from jaxmodels.hf import files
from jaxmodels.hf.load import flatten, leaves_of
from jaxmodels.models.functional import Model, family_of

SHARD = 5_000_000_000
"""Bytes of a file of weights, as transformers has it."""


@contextlib.contextmanager
def complete(directory: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `directory` at one blow when all is there.

    Raises:
        UserError: there is something already.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"got {directory}, which is there already, expected no or an empty directory, try another")
    part = directory.with_name(directory.name + ".part")
    shutil.rmtree(part, ignore_errors=True)  # of one that was killed
    part.mkdir(parents=True)
    try:
        yield part
        part.rename(directory)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def save_pretrained(
    directory: Path,
    model: Model,
    params: Any,
    stats: Any = None,
    *,
    shard_size: int = SHARD,
    more: Mapping[str, Any] | None = None,
    done: Callable[[int], Any] = lambda size: None,
) -> None:
    """Write weights, tensor by tensor, and then config.json into a directory.

    `stats`: batch statistics; those of `model.stats()` when not given. `more`: settings of config.json beside those of
    the model. `done` is told the bytes of each tensor.

    Raises:
        UserError: transformers has no such model.
    """
    form = hf.format_of(family_of(model.config).name)
    settings = {**form.describe(model.config), "torch_dtype": "float32"}
    names = {
        key: value for key, value in (more or {}).items() if key not in settings or key in ("id2label", "label2id")
    }
    settings |= names
    rows = form.slots(model.config, {path: leaf.shape for path, leaf in leaves_of(model).items()})
    leaves = flatten(params, model.stats() if stats is None else stats)
    slots = {slot.name: slot for slot in sorted((slot for row in rows for slot in row), key=lambda slot: slot.name)}
    shards = files.sharded({name: slot.shape for name, slot in slots.items()}, shard_size)
    for file, shapes in shards.items():
        for size in files.write(directory / file, shapes, (slots[name].theirs(leaves) for name in shapes)):
            done(size)
    if len(shards) > 1:
        total = sum(4 * int(np.prod(slot.shape)) for slot in slots.values())
        where = {name: file for file, shapes in shards.items() for name in shapes}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (directory / files.INDEX).write_text(json.dumps(index, indent=2) + "\n")
    (directory / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
