"""Keep the files beside weights, such as a tokenizer or a chat template, in a run, and write them back on export."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxmodels import data
from jaxmodels.config import Config
from jaxmodels.data import special
from jaxmodels.data.records import distinct
from jaxmodels.data.tokenizer import FILE
from jaxmodels.errors import UserError
from jaxmodels.hf import pixels, processors, sentences
from jaxmodels.hf import tokenizer as tokenizers
from jaxmodels.models.families import family_of

log = logging.getLogger("jaxmodels")

KEPT = "pretrained"
"""Folder in a run that holds these files unchanged."""
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model")
"""Files of a tokenizer."""
TEXT = (*TOKENIZER, "chat_template*", "generation_config.json")
"""Files that depend on the ids of a tokenizer."""
FILES = (*TEXT, *sentences.FILES, processors.FILE, processors.WHOLE, "config.json")
_NAMES = ("id2label", "label2id")
PROBLEM, SEVERAL = "problem_type", "multi_label_classification"
"""The setting that says what a classifier's outputs are, and its value for classes independent of each other."""


def keep(directory: Path, run: Path) -> None:
    """Copy the files beside the weights of a directory into a run.

    Raises:
        UserError: a file cannot be read, or links out of the directory. Links into the blobs of the same `models--*`
            folder, as in the cache of huggingface_hub, are allowed.
    """
    home = directory.resolve()
    cached = home.parent.name == "snapshots" and home.parents[1].name.startswith("models--")
    homes = (home, home.parents[1] / "blobs") if cached else (home,)
    found = sorted({path for pattern in FILES for path in directory.glob(pattern)})
    for path in found:
        target = path.resolve()
        if not any(target.is_relative_to(folder) for folder in homes):
            raise UserError(
                f"got {path}, a link to {target}, expected a file that lies in {directory}, try a copy of it there"
            )
    (run / KEPT).mkdir()
    for path in found:
        if path.is_file():  # a model does not come with folders or pipes
            try:
                content = path.read_bytes()
            except OSError as error:
                raise UserError(f"got {path}, which cannot be read ({error.strerror}), expected a file") from error
            copy = run / KEPT / path.relative_to(directory)
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(content)


def carry(source: Path, run: Path, fresh: Sequence[str]) -> None:
    """Copy into a run the files that its `init.source` has, whether that is a run or a directory of transformers.

    The names of classes are left out where a part of the model is `fresh`.
    """
    if (run / KEPT).exists():
        return  # the run is being resumed
    if (source / KEPT).is_dir():
        shutil.copytree(source / KEPT, run / KEPT)
    elif "model_type" in special.objects(source / "config.json"):
        keep(source, run)
    else:
        return
    if fresh:
        path = run / KEPT / "config.json"
        values = special.objects(path)
        path.write_text(json.dumps({name: value for name, value in values.items() if name not in _NAMES}, indent=2))


def back(run: Path, part: Path, cfg: Config, classes: Sequence[str] = ()) -> dict[str, Any]:
    """Write the files that a run keeps beside its weights into a folder; return more settings for config.json.

    `classes` are the names of those that it was trained on here; an imported run has its names among its files.
    """
    tokenizer = data.load_tokenizer(run) if (run / FILE).is_file() else None
    kept, settings = run / KEPT, {}
    # with a tokenizer of its own, the files that came with the weights, and their ids, no longer apply
    came = tokenizers.load(kept) if kept.is_dir() else None
    own = tokenizer is not None and not (came is not None and same(tokenizer, came))
    if kept.is_dir():
        left = {path for pattern in TEXT for path in kept.glob(pattern)} if own else set()
        files = {path for path in kept.rglob("*") if path.is_file()}
        for path in files - left - {kept / "config.json"}:  # written last, with the weights
            copy = part / path.relative_to(kept)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
        # these describe the weights as they came, not as they are exported
        how = {
            "dtype",
            "torch_dtype",
            "auto_map",
            "quantization_config",
            "transformers_version",
            *((*special.NAMES, *special.FORCED) if own else ()),
        }
        if len(special.objects(kept / "config.json").get("id2label") or ()) != getattr(cfg.model, "classes", None):
            how |= {*_NAMES}
        if getattr(cfg.model, "classes", 1) != 1 and cfg.task.answers == "class":
            how |= {PROBLEM}
        settings = {name: value for name, value in special.objects(kept / "config.json").items() if name not in how}
    _of_images(run, part, cfg)
    settings |= _names_of(cfg, classes)
    if cfg.task.answers == "classes":
        settings[PROBLEM] = SEVERAL  # otherwise transformers would take the likeliest alone
    if own and tokenizer is not None:
        # a transcript that no blanks are in is written token by token
        heard = cfg.task.answers == "transcript" and not hasattr(cfg.task, "blank")
        translates = heard or cfg.task.answers == "translation"
        tokenizers.save(tokenizer, part, translates)
        return settings | tokenizers.ids(tokenizer, translates)
    if not kept.is_dir() and cfg.task.answers in ("continuation", "translation"):
        return dict.fromkeys(special.NAMES)  # otherwise transformers would take its defaults
    return settings


def _of_images(run: Path, part: Path, cfg: Config) -> None:
    """Write how a run turns images into inputs, unless its files say so already."""
    family = family_of(cfg.model).name
    if pixels.known(family):
        shape = cfg.model.input_shape  # pyright: ignore
        came = pixels.read(part, family, shape) if processors.said_of(part, processors.IMAGES) else None
        if not (came and pixels.alike(came, cfg) and came.central == pixels.crops(cfg, family)):
            processors.write_images(part, pixels.describe(cfg, shape, family))
            if pixels.crops(cfg, family) and shape[0] != shape[1]:
                log.warning("%s: the central 7/8 of images that are not square is not in %s", run, processors.FILE)


def _names_of(cfg: Config, classes: Sequence[str]) -> dict[str, Any]:
    """The names of a classifier's classes, as transformers has them; of those without a name, the number."""
    count = getattr(cfg.model, "classes", None)
    if not count or not classes or len(classes) > count:
        return {}
    names = distinct([*classes, *map(str, range(len(classes), count))])
    return {"id2label": {str(i): name for i, name in enumerate(names)}, "label2id": {x: i for i, x in enumerate(names)}}


def same(a: data.Tokenizer, b: data.Tokenizer) -> bool:
    """Say whether two tokenizers give the same ids and end texts in the same way."""
    return a.to_json() == b.to_json() and a.special == b.special
