"""The state before the first step: random, or from another run's parameters or published ones."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmodels import config as configs
from jaxmodels.config import Config
from jaxmodels.errors import UserError
from jaxmodels.hf import pixels
from jaxmodels.hf.load import described
from jaxmodels.models.families import create, family_of
from jaxmodels.registry import outside
from jaxmodels.train import adapters, teachers
from jaxmodels.train.arrays import named_leaves, named_parameters
from jaxmodels.train.bases import is_published, read_published, read_trained, with_parameters
from jaxmodels.train.job import Job
from jaxmodels.train.state import State

log = logging.getLogger("jaxmodels")


def initial(job: Job) -> State:
    """Make the state before the first step, on its devices, from `init.source` if one is given.

    Raises:
        UserError: the source lacks a parameter that does not start at random, or has it in another shape.
    """
    cfg, layout = job.config, job.layout
    kept = bases_of(job)
    if cfg.init.source is not None:
        check_fresh(cfg.init.fresh, kept)
        kept = {name: leaf for name, leaf in kept.items() if not matches(cfg.init.fresh, name)}
        check_same_model(cfg.model, Path(cfg.init.source), kept)
        if kept:
            compare_pixels(cfg, Path(cfg.init.source))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, layout)
    # compiling random numbers of each shape takes long and, for few parameters on a CPU, running them takes no time
    quick = jax.default_backend() == "cpu" and sum(leaf.size for leaf in jax.tree.leaves(layout.params)) < 3e7
    options = {"xla_backend_optimization_level": 0} if quick else None
    # a teacher, and what is frozen of a source, is read and need never be made
    random = dataclasses.replace(shardings, teacher={}) if cfg.init.source is None else shardings.saved

    def first(key: jax.Array) -> State:
        made = job.init(key)
        return dataclasses.replace(made, frozen=made.frozen if random.frozen else {}, teacher={})

    state = jax.jit(first, out_shardings=random, compiler_options=options)(jax.random.key(cfg.train.seed))
    if cfg.init.source is not None:
        state = with_source(job, state, kept, shardings)
    state = adapters.begun(cfg, state, layout) if cfg.adapter is not None and cfg.adapter.source else state
    return state if job.teaching is None else with_teacher(job, state)


def with_teacher(job: Job, state: State) -> State:
    """Return the state with its teacher, which is read again wherever training begins or goes on."""
    assert job.teaching is not None
    return dataclasses.replace(state, teacher=teachers.read(job.config, job.teaching, job.layout.teacher))


def with_source(job: Job, state: State, kept: Mapping[str, Any], shardings: State) -> State:
    """Return the state with these parameters, and batch statistics, from `init.source`."""
    cfg, layout = job.config, job.layout
    source = Path(cfg.init.source or "")
    wanted = deeper(job, kept) if cfg.init.blocks else kept
    found, stats, where = (read_published if is_published(source) else read_trained)(source, wanted, layout.stats)
    taken = np.array(cfg.init.blocks)
    for name, leaf in kept.items():
        if wanted[name] is not leaf:
            found[name] = jax.device_put(found[name][taken], leaf.sharding)
    chosen = f"; layers {' '.join(map(str, cfg.init.blocks))}" if cfg.init.blocks else ""
    random = f"; at random: {', '.join(cfg.init.fresh)}" if cfg.init.fresh else ""
    log.info("parameters from %s, %s%s%s", source, where, chosen, random)
    params, frozen = (with_parameters(tree, found) for tree in (state.params, layout.frozen))
    if job.adapter is not None:
        params = jax.jit(job.adapter.renewed, out_shardings=shardings.params)(frozen, params)
    # copied, because params are donated in every step while the average lives on
    ema = None if state.ema is None else jax.tree.map(lambda x: x.copy(), params)
    stats = state.stats if stats is None else stats
    return dataclasses.replace(state, params=params, frozen=frozen, stats=stats, ema=ema)


def deeper(job: Job, kept: Mapping[str, Any]) -> dict[str, Any]:
    """Return these parameters with as many layers as `init.source` has, from which `init.blocks` are taken.

    Raises:
        UserError: the model has no stack of that many layers, or its source has none of a number.
    """
    cfg, source = job.config, Path(job.config.init.source or "")
    layers, other = cfg.init.blocks, config_of(source)
    stacked = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, axes in jax.tree.leaves_with_path(job.task.axes(), is_leaf=lambda x: isinstance(x, tuple))
        if axes[:1] == ("layers",)
    ]
    if not stacked or any(name.split("/")[1] != "layers" for name in stacked):
        raise UserError(
            f"got init.blocks {as_option(layers)} with a {type(cfg.model).__name__}, expected a model of one stack of "
            "layers, try it without"
        )
    if len(layers) != cfg.model.layers:
        raise UserError(
            f"got {len(layers)} of the source's layers in init.blocks, expected {cfg.model.layers} as model.layers, "
            f"try --model.layers {len(layers)}"
        )
    if wrong := [each for each in layers if each >= other.layers]:
        raise UserError(
            f"got init.blocks {wrong[0]} of {source}, expected numbers below its model.layers {other.layers}, "
            f"try {other.layers - 1} for the last"
        )
    return {
        name: jax.ShapeDtypeStruct((other.layers, *leaf.shape[1:]), leaf.dtype, sharding=leaf.sharding)
        if name in stacked
        else leaf
        for name, leaf in kept.items()
    }


def config_of(source: Path) -> Any:
    """Return the config of the model in a run or in a directory in Hugging Face's format."""
    return described(source)[1] if is_published(source) else configs.read(source)[0].model


def bases_of(job: Job) -> dict[str, Any]:
    """Return the layout of the networks' own parameters by name, without an adapter's factors.

    Raises:
        UserError: parameters that start at random would stay so.
    """
    if job.adapter is None:
        return named_leaves(job.layout.params)
    frozen, params = named_parameters(job.layout.frozen), named_leaves(job.layout.params)
    for pattern in job.config.init.fresh if job.config.init.source is not None else ():
        if held := [name.partition("/")[2] for name in frozen if matches((pattern,), name)]:
            raise UserError(
                f"got init.fresh {pattern!r}, by which {held[0]} starts at random, and an adapter that leaves it "
                f"frozen, expected it trained, try --adapter.full '{pattern}'"
            )
    return {**frozen, **{name: leaf for name, leaf in params.items() if name in job.adapter.chosen}}


def matches(patterns: Sequence[str], name: str) -> bool:
    """Whether a parameter's path below its network, such as layers/attn/q/w, matches one of these patterns."""
    return any(fnmatchcase(name.partition("/")[2], pattern) for pattern in patterns)


def check_fresh(patterns: Sequence[str], names: Mapping[str, Any]) -> None:
    """Raise UserError if a pattern matches no parameter."""
    for pattern in patterns:
        if not any(matches((pattern,), name) for name in names):
            tops = list(dict.fromkeys("/".join(name.split("/")[1:2]) for name in names))
            raise UserError(
                f"got init.fresh {pattern!r}, which matches no parameter, expected some of {', '.join(tops)}, "
                f"try --init.fresh '{tops[-1]}/*'"
            )


FREE = (
    "dropout", "embed_dropout", "attention_dropout", "stochastic_depth", "balance_loss", "z_loss",  # training alone
    "routing", "capacity_factor",  # which tokens an expert has room for in training
    "dtype", "attention", "remat", "unroll",  # how it is computed, not what
)  # fmt: skip
"""Fields in which a model may differ from the one whose parameters it takes."""
SHAPED = (
    "vocab_size", "context", "types", "classes", "head", "patch", "experts", "embedding", "latents", "stem_width",
    "layers", "decoder_layers", "image_layers", "text_layers", "heads", "kv_heads", "image_heads", "text_heads",
    "width", "head_dim", "mlp_width", "image_width", "text_width", "image_mlp_width", "text_mlp_width",
    "relative_buckets",
)  # fmt: skip
"""Fields of our families that show in the names and shapes of the parameters, which are compared one by one; those of
others are asked (`shows`)."""


def check_same_model(model: Any, source: Path, kept: Mapping[str, Any]) -> None:
    """Check that parameters mean the same in this model as in the source's.

    Raises:
        UserError: the models belong to different families, or differ in a field that changes what is computed.
    """
    if not kept:
        return
    other = config_of(source)
    if type(model) is not type(other):
        raise UserError(
            f"got init.source {source} with a {type(other).__name__}, expected a {type(model).__name__}, "
            "try another --init.source"
        )
    idle, wrong, own = model.idle(kept), {}, outside(model)
    for name, ours in flat_fields(model).items():
        theirs = flat_fields(other)[name]
        if ours == theirs or name in FREE or name in idle:
            continue
        if shows(model, name, theirs) if own else name in SHAPED and (name != "layers" or model.stacked):
            continue
        if name == "input_shape" and (math.prod(ours) != math.prod(theirs) or ours[-1] != theirs[-1]):
            continue  # shows in the parameters' shapes, or does not affect them
        wrong[name] = (ours, theirs)
    if wrong:
        differ = ", ".join(f"model.{name} {ours!r} for {theirs!r}" for name, (ours, theirs) in wrong.items())
        same = " ".join(f"--model.{name.replace('_', '-')} {as_option(theirs)}" for name, (_, theirs) in wrong.items())
        raise UserError(
            f"got {differ} of init.source {source}, expected what its parameters were trained with, try {same}"
        )


def shows(model: Any, name: str, value: Any) -> bool:
    """Whether a field of a model from outside changes the shape of a parameter, so that the shapes tell of it.

    A number that adds parameters and leaves all others as they are is a depth: of more layers some would be left out.
    """
    try:
        before, after = (
            {name: leaf.shape for name, leaf in named_leaves(create(each).shapes()).items()}
            for each in (model, dataclasses.replace(model, **{name: value}))
        )
    except (UserError, TypeError):  # the value does not fit the other fields, or belongs to a section below
        return False
    if any(before[name] != after[name] for name in before.keys() & after.keys()):
        return True
    return before.keys() != after.keys() and not isinstance(value, int)


def compare_pixels(cfg: Config, source: Path) -> None:
    """Warn if a model of images sees pixels on another scale than its source did: training may adapt to that."""
    family = family_of(cfg.model).name
    if not pixels.known(family) or not cfg.data.real:
        return
    if is_published(source):
        theirs = pixels.read(source, family, cfg.model.input_shape)  # pyright: ignore
    else:
        section = configs.read(source)[0].data
        theirs = pixels.Pixels(section.mean, section.std)
    if not pixels.alike(theirs, cfg):
        log.warning(
                    "%s: its parameters were trained on pixels of another scale, that of %s; this run has %s",
            source, pixels.flags(theirs.mean, theirs.std), pixels.flags(cfg.data.mean, cfg.data.std),
        )  # fmt: skip


def flat_fields(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return the fields of a model's config by their dotted names."""
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found |= flat_fields(value, f"{prefix}{field.name}.")
        else:
            found[prefix + field.name] = value
    return found


def as_option(value: Any) -> str:
    """Format a value as the command line takes it."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
