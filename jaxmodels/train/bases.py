"""The parameters that a run begins with, or beside which an adapter is trained, read from runs or published weights.

The base of an adapter is in no checkpoint. Checkpoints name it by its source and by a hash of its values, which depends
on neither mesh nor format, and it is read again wherever the adapter is used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels import config as configs
from jaxmodels import tasks
from jaxmodels.compress.adapters import Adaptation
from jaxmodels.compress.codes import encoded_on_host
from jaxmodels.config import Config
from jaxmodels.data import special
from jaxmodels.errors import UserError
from jaxmodels.hf import load
from jaxmodels.models.adapted import join, merge
from jaxmodels.models.coded import is_coded, value
from jaxmodels.train.arrays import named_leaves, named_parameters, nest
from jaxmodels.train.checkpoint import Checkpointer
from jaxmodels.train.state import adapted, coded

log = logging.getLogger("jaxmodels")

OWN = "base"
"""Folder in a run of the frozen parameters that started at random, and so are nowhere else."""


@dataclasses.dataclass(frozen=True)
class Base:
    """The name of an adapter's frozen parameters."""

    source: str
    """Directory of a run or of published weights; empty: the run's own, which started at random."""
    hash: str

    @staticmethod
    def of(cfg: Config, frozen: Any) -> Base:
        """Name frozen parameters that were read from `init.source`."""
        source = cfg.init.source
        return Base("" if source is None else str(Path(source).absolute()), fingerprint(frozen))

    @staticmethod
    def read(meta: Mapping[str, Any], run: Path) -> Base:
        """Return the base that a checkpoint of an adapter names.

        Raises:
            UserError: it names none.
        """
        found = meta.get("base")
        if not isinstance(found, Mapping) or {*found} != {"source", "hash"} or not all(map(_is_text, found.values())):
            raise UserError(
                f"got a checkpoint in {run} that names no base of its adapter, expected one that train has saved, "
                "try another run"
            )
        return Base(**found)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def fingerprint(tree: Any) -> str:
    """Return a hash of arrays and of their names, the same on any mesh."""
    found = jax.device_get(jax.jit(lambda tree: jax.tree.map(_digest, tree))(tree))
    digest = hashlib.sha256()
    for name, words in sorted(named_leaves(found).items()):
        digest.update(f"{name} ".encode() + np.asarray(words, "<u4").tobytes())
    return digest.hexdigest()[:32]


def _digest(x: jax.Array) -> jax.Array:
    """Return four sums of mixed words: integers, whose sum depends neither on its order nor on where they are."""
    if jnp.issubdtype(x.dtype, jnp.floating):  # its bits, since most of its values are below 1
        x = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])
    words = x.astype(jnp.uint32)
    place = jnp.full(x.shape, 1, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    sums = [_mix(words * jnp.uint32(odd) ^ _mix(place + jnp.uint32(odd))).sum(dtype=jnp.uint32) for odd in _ODD]
    return jnp.stack(sums)


_ODD = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F)


def _mix(x: jax.Array) -> jax.Array:
    """The last steps of MurmurHash3 (Appleby 2011)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def keep(run: Path, frozen: Any) -> None:
    """Write frozen parameters that started at random into their run."""
    (run / OWN).mkdir(exist_ok=True)
    checkpointer = Checkpointer(run / OWN)
    checkpointer.save(0, {"params": frozen}, {})
    checkpointer.wait()


def frozen(run: Path, cfg: Config, named: Base, layout: Any) -> Any:
    """Read the frozen parameters of an adapted run again, with the shapes and shardings of `layout`.

    Raises:
        UserError: they are not there, or are not those that the adapter was trained beside.
    """
    if not named.source:
        tree, _, _ = Checkpointer(run / OWN).restore_params(0, abstract=layout)
        where = run / OWN
    else:
        given = Path(cfg.init.source or named.source)
        where = given if given.exists() else Path(named.source)
        if not where.is_dir():
            raise UserError(
                f"got {run}, an adapter of {where}, which is not there, expected the weights that it was trained "
                f"beside, try jaxmodels train with --init.source DIR, where they are now"
            )
        params, _, _ = (read_published if is_published(where) else read_trained)(where, named_parameters(layout), {})
        tree = with_parameters(layout, params)
    check(named, fingerprint(tree), where, run)
    return tree


def check(named: Base, found: str, where: Path, run: Path) -> None:
    """Refuse another base than the one that an adapter was trained beside.

    Raises:
        UserError: the hashes differ.
    """
    if found != named.hash:
        raise UserError(
            f"got {where} with weights of the hash {found[:12]}, expected {named.hash[:12]}, those that the adapter in "
            f"{run} was trained beside, try the base that it names, {named.source or run / OWN}"
        )


def restore(
    run: Path,
    cfg: Config,
    adapter: Adaptation,
    step: int | Literal["best"] | None = None,
    subtree: str = "params",
) -> tuple[Any, Any, Any, int]:
    """Read an adapted run: its frozen parameters, its trained ones, what was saved beside them, and the step.

    Raises:
        UserError: there is no checkpoint, or its base is not there or is another one.
    """
    layout, shapes = adapter.shapes()
    checkpointer = Checkpointer(run / "checkpoints")
    trained, meta, at = checkpointer.restore_params(step, subtree=subtree, abstract=shapes)
    return frozen(run, cfg, Base.read(meta, run), layout), trained, meta, at


def merged(frozen: Any, trained: Any, axes: Any) -> Any:
    """Return the parameters of an adapted run as those of an ordinary one, in host memory.

    Those that are coded stay so, with their factors beside them.
    """
    if any(map(is_coded, jax.tree.leaves(frozen, is_leaf=is_coded))):
        return jax.device_get(join(frozen, trained))
    return jax.device_get(jax.jit(lambda frozen, trained: merge(join(frozen, trained), axes))(frozen, trained))


def read_trained(source: Path, kept: Mapping[str, Any], stats: Any) -> tuple[dict[str, Any], Any, str]:
    """Read these parameters of a run (its moving average if it has one), and the batch statistics if any are needed.

    Those of an adapted run are merged.
    """
    cfg, _ = configs.read(source)
    kind = "params" if cfg.train.ema is None else "ema"
    checkpointer = Checkpointer(source / "checkpoints")
    if cfg.adapter is None:
        held = {}
        if cfg.compress is not None:
            task = tasks.build(cfg.task, cfg.model, cfg.data, cfg.train, cfg.eval.metrics)
            coding = coded(cfg, task.networks)
            held = {} if coding is None else named_parameters(coding.shapes())
        # in one piece on the host, what is coded here or there
        wanted = {
            name: leaf if not (is_coded(leaf) or is_coded(held.get(name))) else held.get(name, float32(leaf))
            for name, leaf in kept.items()
        }
        tree, _, at = checkpointer.restore_params(
            subtree=kind, abstract=nest(wanted), partial="try another --init.source or --init.fresh"
        )
        found = named_parameters(tree)
        if held or any(map(is_coded, kept.values())):
            found = fitted(source, found, kept)
    else:
        task = tasks.build(cfg.task, cfg.model, cfg.data, cfg.train, cfg.eval.metrics)
        adapter = adapted(cfg, task)
        assert adapter is not None
        base, trained, _, at = restore(source, cfg, adapter, subtree=kind)
        found = fitted(source, named_parameters(merge(join(base, trained), task.axes())), kept)
    statistics = None
    if jax.tree.leaves(stats):
        statistics, _, _ = checkpointer.restore_params(at, subtree="stats", abstract=stats)
    return found, statistics, f"step {at}"


def float32(leaf: Any) -> jax.ShapeDtypeStruct:
    """Return the shape of a parameter without codes, on the host."""
    return jax.ShapeDtypeStruct(leaf.shape, jnp.float32)


def is_published(source: Path) -> bool:
    """Whether a directory is in Hugging Face's format rather than a run."""
    file = source / "config.json"
    return file.is_file() and not (source / "checkpoints").is_dir() and "model_type" in special.objects(file)


def read_published(source: Path, kept: Mapping[str, Any], stats: Any) -> tuple[dict[str, Any], Any, str]:
    """Read these parameters of a model in Hugging Face's format, and its batch statistics if any are needed.

    Each tensor is coded as it comes, so that no more than one of them is there as numbers.
    """
    wanted = [name.removeprefix("model/") for name in kept]
    wanted += [f"stats/{name}".replace("stats/model/", "stats/") for name in named_leaves(stats)]
    opened = load.open_source(source, wanted=wanted)
    coded = {name.removeprefix("model/"): leaf for name, leaf in kept.items() if is_coded(leaf)}
    params, statistics = load.nested(load.read(opened, coded=coded))
    placed = fitted(source, named_parameters({"model": params}), kept)
    if not jax.tree.leaves(stats):
        return placed, None, type(opened.model.config).__name__.removesuffix("Config")
    statistics = jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding), {"model": statistics}, stats)
    return placed, statistics, type(opened.model.config).__name__.removesuffix("Config")


def fitted(source: Path, found: Mapping[str, Any], kept: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters that are needed, where they are needed, and as codes where codes are.

    Raises:
        UserError: one is missing, has another shape, or is coded in another way.
    """
    wrong = [
        f"{name} is {'missing' if name not in found else found[name].shape}, expected {leaf.shape}"
        for name, leaf in kept.items()
        if name not in found or found[name].shape != leaf.shape
    ]
    if wrong:
        raise UserError(
            f"got {source}, which does not fit: {'; '.join(wrong[:4])}, try --init.fresh with what starts at random"
        )
    return {name: placed(source, name, found[name], leaf) for name, leaf in kept.items()}


def placed(source: Path, name: str, x: Any, leaf: Any) -> Any:
    """Return a parameter with the shapes and shardings of `leaf`, of which either may be coded."""
    if not is_coded(leaf):
        return jax.device_put(value(x).astype(leaf.dtype), leaf.sharding)
    x = x if is_coded(x) else encoded_on_host(x, leaf)
    if jax.tree.structure(x) != jax.tree.structure(leaf) or any(
        a.shape != b.shape for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(leaf), strict=True)
    ):
        raise UserError(
            f"got {source} with {name.partition('/')[2]} in codes of another form ({x.kind}, scales of shape "
            f"{x.scales.shape}), expected what compress asks for ({leaf.kind}, {leaf.scales.shape}), try the options "
            "of that run"
        )
    return jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding), x, leaf)


def with_parameters(tree: Any, found: Mapping[str, Any]) -> Any:
    """Return a tree with the parameters of these names in place of its own."""
    kept = named_parameters(tree)
    return jax.tree.unflatten(
        jax.tree.structure(tree, is_leaf=is_coded), [found.get(name, leaf) for name, leaf in kept.items()]
    )
