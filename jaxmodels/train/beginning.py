"""The state before the first step: at random, or from another run's parameters, or from published ones."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import jax

from jaxmodels import config as configs
from jaxmodels.config import Config
from jaxmodels.errors import UserError
from jaxmodels.tasks.task import Task
from jaxmodels.train import state as states
from jaxmodels.train.arrays import named_leaves, nest
from jaxmodels.train.checkpoint import Checkpointer
from jaxmodels.train.state import State

log = logging.getLogger("jaxmodels")


def initial(cfg: Config, task: Task, optimizers: states.Optimizers, layout: State) -> State:
    """The state before the first step, made where its arrays live; from `init.source` if one is given.

    Raises:
        UserError: the source lacks a parameter that does not start at random, or has it in another shape.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, layout)
    make = functools.partial(states.init, task, optimizers, ema=cfg.train.ema is not None)
    # random numbers of each shape take long to compile and, for few parameters on a CPU, no time to run
    quick = jax.default_backend() == "cpu" and sum(leaf.size for leaf in jax.tree.leaves(layout.params)) < 3e7
    options = {"xla_backend_optimization_level": 0} if quick else None
    state = jax.jit(make, out_shardings=shardings, compiler_options=options)(jax.random.key(cfg.train.seed))
    if cfg.init.source is None:
        return state
    source = Path(cfg.init.source)
    kept = named_leaves(layout.params)
    check(cfg.init.fresh, kept)
    kept = {name: leaf for name, leaf in kept.items() if not matches(cfg.init.fresh, name)}
    params, stats, where = (published if is_published(source) else trained)(source, kept, layout)
    log.info(
        "parameters from %s, %s%s", source, where, f"; at random: {', '.join(cfg.init.fresh)}" if cfg.init.fresh else ""
    )
    names = named_leaves(state.params)
    whole = jax.tree.unflatten(jax.tree.structure(state.params), [params.get(name, x) for name, x in names.items()])
    # a copy each: params are donated every step, the average lives on
    ema = None if state.ema is None else jax.tree.map(lambda x: x.copy(), whole)
    return dataclasses.replace(state, params=whole, stats=state.stats if stats is None else stats, ema=ema)


def matches(patterns: Sequence[str], name: str) -> bool:
    """Whether a parameter's path below its network, such as layers/attn/q/w, has one of these forms."""
    return any(fnmatchcase(name.partition("/")[2], pattern) for pattern in patterns)


def check(patterns: Sequence[str], names: Mapping[str, Any]) -> None:
    """Raises UserError where a pattern is that of no parameter."""
    for pattern in patterns:
        if not any(matches((pattern,), name) for name in names):
            tops = list(dict.fromkeys("/".join(name.split("/")[1:2]) for name in names))
            raise UserError(
                f"got init.fresh {pattern!r}, which is no parameter, expected some of {', '.join(tops)}, "
                f"try --init.fresh '{tops[-1]}/*'"
            )


def trained(source: Path, kept: Mapping[str, Any], layout: State) -> tuple[dict[str, Any], Any, str]:
    """These parameters of a run (the moving average where it has one), and its batch statistics if they fit."""
    kind = "params" if configs.read(source)[0].train.ema is None else "ema"
    checkpointer = Checkpointer(source / "checkpoints")
    tree, _, at = checkpointer.restore_params(
        subtree=kind, abstract=nest(kept), partial="try another --init.source or --init.fresh"
    )
    stats = None
    if jax.tree.leaves(layout.stats):
        stats, _, _ = checkpointer.restore_params(at, subtree="stats", abstract=layout.stats)
    return named_leaves(tree), stats, f"step {at}"


def is_published(source: Path) -> bool:
    """Whether a directory is one of Hugging Face's format and no run."""
    file = source / "config.json"
    return file.is_file() and not (source / "checkpoints").is_dir() and "model_type" in json.loads(file.read_text())


def published(source: Path, kept: Mapping[str, Any], layout: State) -> tuple[dict[str, Any], Any, str]:
    """These parameters of a model in Hugging Face's format, and its batch statistics."""
    from jaxmodels.hf import load_pretrained

    model, params = load_pretrained(source)
    found = named_leaves({"model": params})
    wrong = [
        f"{name} is {'missing' if name not in found else found[name].shape}, expected {leaf.shape}"
        for name, leaf in kept.items()
        if name not in found or found[name].shape != leaf.shape
    ]
    if wrong:
        raise UserError(
            f"got {source}, which does not fit: {'; '.join(wrong[:4])}, try --init.fresh with what starts at random"
        )
    placed = {name: jax.device_put(found[name].astype(leaf.dtype), leaf.sharding) for name, leaf in kept.items()}
    stats = {"model": model.stats()} if jax.tree.leaves(layout.stats) else None
    if stats is not None:
        stats = jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding), stats, layout.stats)
    return placed, stats, type(model.config).__name__.removesuffix("Config")
