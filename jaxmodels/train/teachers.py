"""The teacher of a distillation: whether it fits what it is to teach, and its parameters, which no checkpoint holds."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import jax

from jaxmodels import config as configs
from jaxmodels import data
from jaxmodels.compress.distillation import Teaching
from jaxmodels.config import Config
from jaxmodels.data.tokenizer import FILE, Tokenizer, load_tokenizer
from jaxmodels.errors import UserError
from jaxmodels.hf import pixels
from jaxmodels.hf.load import described
from jaxmodels.models.families import family_of
from jaxmodels.train.arrays import named_leaves
from jaxmodels.train.bases import Base, fingerprint, is_published, read_published, read_trained
from jaxmodels.train.saved import read_kept

log = logging.getLogger("jaxmodels")


def teaching(cfg: Config) -> Teaching | None:
    """Return the teacher that a config names, without its parameters; None if it names none.

    Raises:
        UserError: it is not there, or does another task.
    """
    if cfg.distill.teacher is None:
        return None
    source = Path(cfg.distill.teacher)
    if not (source / "config.json").is_file():
        raise UserError(
            f"got distill.teacher {source}, which is no run and no published model, expected a directory with "
            "config.json, try --distill.teacher DIR"
        )
    if is_published(source):
        model = described(source)[1]
    else:
        theirs, _ = configs.read(source)
        model = theirs.model
        if theirs.task.answers != cfg.task.answers:
            there, here = (f"{task.kind} (answers: {task.answers or 'its own'})" for task in (theirs.task, cfg.task))
            raise UserError(
                f"got distill.teacher {source}, a run of {there}, expected one of {here}, try another teacher"
            )
    made = Teaching.of(cfg.distill, model)
    try:
        cfg.task.build(made.model, cfg.data)
    except UserError as error:
        raise UserError(f"got distill.teacher {source}, which this task could not train: {error}") from None
    return made


def stated(cfg: Config) -> str | None:
    """Return the teacher's model in words, by which plans are told apart."""
    found = teaching(cfg)
    return None if found is None else repr(found.model.config)


def check_data(cfg: Config, train: data.Source) -> None:
    """Refuse a teacher that takes tokens, pixels or classes for others than these data have.

    Raises:
        UserError: names the first difference.
    """
    source = Path(cfg.distill.teacher or "")
    what = f"got distill.teacher {source}"
    if train.tokenizer is not None and (source / FILE).is_file():
        ours, theirs = vocabulary(train.tokenizer), vocabulary(load_tokenizer(source))
        if ours != theirs:
            raise UserError(f"{what} with another vocabulary, expected that of data, try --data.tokenizer {source}")
    published = is_published(source)
    ours = tuple(map(str, train.class_names))
    classes = getattr(cfg.model, "classes", None) or 0
    theirs = pixels.names(source, classes) if published else read_kept(source).classes
    if ours and theirs and ours != theirs:
        at = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
        raise UserError(
            f"{what} whose class {at} is {theirs[at]!r}, expected {ours[at]!r} as in data, try data with the teacher's "
            "classes in their order"
        )
    if len(getattr(cfg.model, "input_shape", ())) != 3 or not cfg.data.real:
        return
    if published:
        family = family_of(described(source)[1]).name
        seen = pixels.read(source, family, cfg.model.input_shape) if pixels.known(family) else None  # pyright: ignore
    else:
        section = configs.read(source)[0].data
        seen = pixels.Pixels(section.mean, section.std)
    if seen is not None and not pixels.alike(seen, cfg):
        raise UserError(
            f"{what}, which sees pixels on another scale, expected that of data, "
            f"try {pixels.flags(seen.mean, seen.std)}"
        )


def vocabulary(tokenizer: Tokenizer) -> Any:
    """Return what a tokenizer's ids stand for, in a form that can be compared."""
    stated = json.loads(tokenizer.to_json())
    return stated["model"]["vocab"] if "vocab" in (stated.get("model") or ()) else stated


def read(cfg: Config, teaching: Teaching, layout: Any) -> Any:
    """Read the teacher's parameters, and its batch statistics, with the shardings of `layout`.

    Raises:
        UserError: they are not there, or do not fit its own config.
    """
    source, placed = Path(cfg.distill.teacher or ""), layout["teacher"]
    kept = {
        f"model/{name}": jax.ShapeDtypeStruct(leaf.shape, shape.dtype, sharding=leaf.sharding)
        for (name, leaf), shape in zip(
            named_leaves(placed["params"]).items(), jax.tree.leaves(teaching.model.shapes()), strict=True
        )
    }
    stats = {"model": placed["stats"]} if placed["stats"] else {}
    found, statistics, where = (read_published if is_published(source) else read_trained)(source, kept, stats)
    params = jax.tree.unflatten(jax.tree.structure(placed["params"]), [found[name] for name in kept])
    shardings = jax.tree.map(lambda leaf: leaf.sharding, placed["params"])
    params = jax.jit(teaching.stored, out_shardings=shardings)(params)
    leaves = jax.tree.leaves(params)
    name, count, size = type(teaching.model.config).__name__, sum(x.size for x in leaves), sum(x.nbytes for x in leaves)
    log.info("teacher: %s, %s parameters, %s bytes, from %s, %s", name[:-6], f"{count:,}", f"{size:,}", source, where)
    return {"teacher": {"params": params, "stats": statistics["model"] if statistics else {}}}


def named(cfg: Config, teacher: Any) -> Base:
    """Name a teacher by its source and by a hash of its values."""
    return Base(str(Path(cfg.distill.teacher or "").absolute()), fingerprint(teacher))


def check(found: Base | None, meta: Any, run: Path) -> None:
    """Refuse to resume a run with another teacher than its own, or with none, or with one that it did not have.

    Raises:
        UserError: the hashes differ.
    """
    given = meta.get("teacher") or {}
    theirs, ours = given.get("hash", ""), found.hash if found else ""
    if theirs != ours:
        names = [f"weights of the hash {each[:12]}" if each else "no teacher" for each in (ours, theirs)]
        where = f" (of {given['source']})" if theirs else ""
        raise UserError(
            f"got {names[0]} to teach {run}, expected {names[1]}{where}, with which it was begun, "
            f"try {'--distill.teacher DIR with that' if theirs else '--distill.teacher None'}, or another --run-dir"
        )
