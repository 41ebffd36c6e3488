"""Write a model and its parameters to a directory in Hugging Face's format."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.data import special
from jaxmodels.errors import UserError
from jaxmodels.hf import compressed_save, files, formats
from jaxmodels.hf.load import flatten, leaves_of
from jaxmodels.models.model import Model
from jaxmodels.parts import MARK, filled

SHARD = 5_000_000_000
"""The largest file of weights in bytes, as in transformers."""
OVERRIDE = ("id2label", "label2id", *special.NAMES, *special.FORCED)
"""Settings in which `more` of `save_pretrained` takes precedence over the model's config."""


@contextlib.contextmanager
def complete(directory: Path) -> Iterator[Path]:
    """Yield a folder to write into, which is renamed to `directory` once it is complete.

    Raises:
        UserError: the directory is not empty, or cannot be made.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"got {directory}, which is there already, expected no or an empty directory, try another")
    part = directory.with_name(directory.name + ".part")
    if part.exists() and any(part.iterdir() if part.is_dir() else [part]) and not (part / MARK).is_file():
        raise UserError(f"got {part}, which is there already and no unfinished {directory.name}, try another directory")
    made = [folder for folder in (part.parent, *part.parent.parents) if not folder.exists()]
    with filled(part, directory):
        try:
            yield part
            try:
                part.rename(directory)
            except OSError as error:
                raise UserError(f"got {directory}, which is there by now, expected no or an empty directory") from error
            (directory / MARK).unlink()  # not before, or another process could take the folder for its own
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            for folder in made:
                with contextlib.suppress(OSError):  # not empty
                    folder.rmdir()
            raise


def save_pretrained(
    directory: Path,
    model: Model,
    params: Any,
    stats: Any = None,
    *,
    shard_size: int = SHARD,
    more: Mapping[str, Any] | None = None,
    done: Callable[[int], Any] = lambda size: None,
    codes: bool = False,
) -> None:
    """Write the weights, tensor by tensor, and then config.json into a directory.

    With `codes`, those of coded parameters are written as compressed-tensors has them.

    `stats` are batch statistics, by default those of `model.stats()`. `more` are settings for config.json beside those
    of the model. `done` is called with the bytes of each tensor.

    Raises:
        UserError: transformers has no such model, or compressed-tensors no such codes.
    """
    form = formats.format_for(model.config)
    settings = {**form.describe(model.config), "torch_dtype": "float32"}
    settings |= {key: value for key, value in (more or {}).items() if key not in settings or key in OVERRIDE}
    rows = form.slots(model.config, {path: leaf.shape for path, leaf in leaves_of(model).items()})
    leaves = flatten(params, model.stats() if stats is None else stats)
    if codes:
        tensors, settings["quantization_config"] = compressed_save.written(model.config, leaves)
    else:
        tensors = {
            slot.name: files.Written(slot.shape, lambda slot=slot: slot.theirs(leaves)) for row in rows for slot in row
        }
    for name, shape in form.zeros(model.config).items():
        tensors[name] = files.Written(shape, lambda shape=shape: np.zeros(shape, np.float32))
    tensors = dict(sorted(tensors.items()))
    dtypes = {name: each.dtype for name, each in tensors.items()}
    shards = files.sharded({name: each.shape for name, each in tensors.items()}, shard_size)
    if codes:  # wider types first
        wide = lambda item: -files.BITS[dtypes[item[0]]]  # noqa: E731
        shards = {file: dict(sorted(shapes.items(), key=wide)) for file, shapes in shards.items()}
    counters = {file: form.counts(shapes) for file, shapes in shards.items()}
    for file, shapes in shards.items():
        for size in files.write(
            directory / file, shapes, (tensors[name].make() for name in shapes), counters[file], dtypes=dtypes
        ):
            done(size)
    if len(shards) > 1:
        total = sum(files.BITS[each.dtype] // 8 * int(np.prod(each.shape)) for each in tensors.values())
        total += 8 * sum(map(len, counters.values()))
        where = {name: file for file, shapes in shards.items() for name in (*shapes, *counters[file])}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (directory / files.INDEX).write_text(json.dumps(index, indent=2) + "\n")
    (directory / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
