"""The optimizer of an experiment, from Optax's parts."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from jaxmodels.config import OptimConfig
from jaxmodels.errors import UserError

_BEFORE = ("embed", "patches", "positions", "relative", "types", "class_token")
"""How the names of parameters begin that come before a stack of layers."""
_STACKED = ("layers", "expert", "gates")
"""Logical axes along which parameters of their own lie."""


def schedule(cfg: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate of each step, counted from 0: linear warm-up, then the configured shape.

    Step k of W steps of warm-up has (k + 1) / W of the peak: the line begins at 0 one step before the run, so that no
    step is without effect. The first step after the warm-up has the peak, the last one of the run
    `final_lr_fraction` of it; the only step of a run of one has the peak.
    Source: wsd is MiniCPM's warmup-stable-decay (Hu et al. 2024).
    """
    warmup, last, final = cfg.warmup_steps, steps - 1, cfg.final_lr_fraction
    begin = warmup  # of the decay: the last step at the peak
    if cfg.schedule == "wsd":
        begin = max(last - round(steps * cfg.decay_fraction), warmup)

    def rate(step: Any) -> Any:
        at = jnp.asarray(step, jnp.float32)
        if last > begin:
            done = jnp.clip((at - begin) / (last - begin), 0.0, 1.0)
        else:  # no step is left to come down over
            done = (at >= last) * jnp.float32(last == begin > 0)
        share = jnp.minimum((at + 1) / warmup, 1.0) if warmup else jnp.float32(1)
        if cfg.schedule == "cosine":
            share *= final + (1 - final) * 0.5 * (1 + jnp.cos(math.pi * done))
        elif cfg.schedule != "constant":
            share *= 1 - (1 - final) * done
        return cfg.peak_lr * share

    return rate


def kinds(axes: Any) -> Any:
    """The kind of each parameter, from its name and logical axes: matrix, embedding, bias or norm."""

    def kind(path: tuple[Any, ...], names: tuple[str | None, ...]) -> str:
        leaf = path[-1].key
        if leaf == "b":
            return "bias"
        if leaf != "w":
            return "norm"
        return "embedding" if {"vocab", "positions"} & set(names) else "matrix"

    return jax.tree_util.tree_map_with_path(kind, axes, is_leaf=lambda x: isinstance(x, tuple))


def matrices(axes: Any, *kind_names: str) -> Any:
    """Which dimensions of each parameter of these kinds are its matrix's inputs and which its outputs; None elsewhere.

    Stacked layers, experts and gates are a batch of matrices; heads and their width are one dimension of a matrix.
    """

    def dims(kind: str, names: tuple[str | None, ...]) -> contrib.MuonDimensionNumbers | None:
        if kind not in kind_names:
            return None
        used = [i for i, name in enumerate(names) if name not in _STACKED]
        outputs = used[-2:] if names[-1] == "head_dim" else used[-1:]
        return contrib.MuonDimensionNumbers(tuple(i for i in used if i not in outputs), tuple(outputs))

    return jax.tree.map(dims, kinds(axes), axes)


def factors(cfg: OptimConfig, shapes: Any, axes: Any) -> Any:
    """What each parameter's updates are multiplied by: arrays that broadcast to them; None where it is 1 for all.

    0 for what `optim.freeze` names. `optim.layer_decay` to the power of the layers above: none for what comes behind
    the stack of layers (head, norm, pooler, …), all of them for embeddings before it.

    Raises:
        UserError: a layer decay for a model without a stack of layers.
    """
    leaves = jax.tree_util.tree_leaves_with_path(axes, is_leaf=lambda x: isinstance(x, tuple))
    names = {jax.tree_util.keystr(path, simple=True, separator="/"): axis for path, axis in leaves}
    sizes = [leaf.shape for leaf in jax.tree.leaves(shapes)]
    stacks = {
        name.partition("layers/")[0]: shape[0]
        for (name, axis), shape in zip(names.items(), sizes, strict=True)
        if axis[:1] == ("layers",)
    }
    if cfg.layer_decay != 1 and not stacks:
        raise UserError(
            f"got optim.layer_decay {cfg.layer_decay} for a model without a stack of layers, expected 1, "
            "try --optim.layer-decay 1"
        )

    def above(name: str) -> int:
        # of its own tower, or of the deepest one that it feeds
        return max([depth for tower, depth in stacks.items() if name.startswith(tower)] or stacks.values())

    def factor(name: str, axis: tuple[str | None, ...], shape: tuple[int, ...]) -> Any:
        stacked = axis[:1] == ("layers",)
        scale = np.ones(shape[0] if stacked else 1)
        if cfg.layer_decay != 1:
            if stacked:
                scale = cfg.layer_decay ** np.arange(shape[0] - 1, -1, -1.0)
            elif any(part.startswith(_BEFORE) for part in name.split("/")[:-1]):
                scale = np.array([cfg.layer_decay ** above(name)])
        hold = frozen(cfg.freeze, name, len(scale))
        scale = np.where(hold, 0.0, scale)
        return scale.astype(np.float32).reshape((-1, *(1,) * (len(shape) - 1)) if shape else ())

    if not cfg.freeze and cfg.layer_decay == 1:
        return None
    found = [factor(name, axis, shape) for (name, axis), shape in zip(names.items(), sizes, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(shapes), found)


def check_freeze(patterns: Sequence[str], networks: Mapping[str, Any]) -> None:
    """Refuse patterns that hold nothing, and those that leave nothing to train, of all networks' shapes together.

    Raises:
        UserError: there are such.
    """
    held: dict[str, np.ndarray] = {}
    for network, tree in networks.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            held[f"{network}/{name}"] = np.stack([frozen([p], name, (*leaf.shape, 1)[0]) for p in patterns])
    for index, pattern in enumerate(patterns):
        if not any(each[index].any() for each in held.values()):
            tops = list(dict.fromkeys(name.split("/")[1] for name in held))
            raise UserError(
                f"got optim.freeze {pattern!r}, which is no parameter, expected some of {', '.join(tops)}, "
                f"try --optim.freeze '{tops[0]}/*'"
            )
    if all(each.any(0).all() for each in held.values()):
        raise UserError(
            f"got optim.freeze {' '.join(map(repr, patterns))}, which is every parameter, expected some left to train, "
            "try without it"
        )


def frozen(patterns: Sequence[str], name: str, layers: int) -> np.ndarray:
    """Which layers of a stack (or the one parameter) patterns such as embed/* and layers[:6]/* hold, bool (layers,)."""
    hold = np.zeros(layers, bool)
    for pattern in patterns:
        if cut := re.fullmatch(r"([^\[]*)\[(-?\d*):(-?\d*)\](.*)", pattern):
            if fnmatchcase(name, cut[1] + cut[4]):
                hold[slice(*(int(end) if end else None for end in cut.group(2, 3)))] = True
        elif fnmatchcase(name, pattern):
            hold[:] = True
    return hold


FACTORED = 128
"""Adafactor keeps a matrix's second moments whole where it has fewer rows or columns: little would be saved."""


class Factored(NamedTuple):
    """Adafactor's state; of each parameter either rows and columns or the whole, None for the other."""

    count: jax.Array
    rows: Any
    """Mean squares of each row of a matrix, over its columns."""
    columns: Any
    whole: Any


def scale_by_adafactor(axes: Any) -> optax.GradientTransformation:
    """Updates divided by the root of a factored second moment, each then clipped to a root mean square of 1.

    Optax's `scale_by_factored_rms` factors the two largest dimensions, which are no matrix where a projection has
    heads or layers are stacked: then it keeps all of 64-wide heads, or joins layers. Here the logical axes say what is
    a row and what a column.
    Source: Shazeer & Stern 2018, algorithm 4 and equation 6, with the decay of section 7.2 (1 - t^-0.8).
    """

    dimensions = matrices(axes, "matrix", "embedding")

    def factors(dims: contrib.MuonDimensionNumbers | None, shape: tuple[int, ...]) -> Any:
        """Dimensions of rows and of columns of what is factored, else None."""
        if dims is None:
            return None
        sides: Any = (dims.reduction_axis, dims.output_axis)
        return sides if all(math.prod(shape[i] for i in side) >= FACTORED for side in sides) else None

    def each(function: Any, *trees: Any) -> list[Any]:
        """`function(dimensions, names, leaf, …)` of each parameter; None is a leaf."""
        leaf = lambda x: x is None or isinstance(x, tuple)  # noqa: E731
        found = [jax.tree.leaves(tree, is_leaf=leaf) for tree in (dimensions, axes, *trees)]
        return [function(*leaves) for leaves in zip(*found, strict=True)]

    def init(params: Any) -> Factored:
        def one(dims: Any, names: Any, x: jax.Array) -> tuple[Any, Any, Any]:
            sides = factors(dims, x.shape)
            if sides is None:
                return None, None, jnp.zeros_like(x)
            rows, columns = sides
            row, column = (tuple(1 if i in over else n for i, n in enumerate(x.shape)) for over in (columns, rows))
            return jnp.zeros(row, x.dtype), jnp.zeros(column, x.dtype), None

        kept = zip(*each(one, params), strict=True)
        tree = jax.tree.structure(params)
        return Factored(jnp.zeros((), jnp.int32), *(jax.tree.unflatten(tree, leaves) for leaves in kept))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Factored]:
        decay = 1 - (state.count.astype(jnp.float32) + 1) ** -0.8

        def one(dims: Any, names: Any, g: jax.Array, row: Any, column: Any, whole: Any) -> tuple[Any, ...]:
            square = jnp.square(g) + 1e-30
            mix = lambda old, new: (decay * old + (1 - decay) * new).astype(old.dtype)  # noqa: E731
            sides = factors(dims, g.shape)
            if sides is None:
                whole = mix(whole, square)
                scaled = g * jax.lax.rsqrt(whole)
            else:
                rows, columns = sides
                row, column = (
                    mix(row, square.mean(columns, keepdims=True)),
                    mix(column, square.mean(rows, keepdims=True)),
                )
                scaled = g * jax.lax.rsqrt(row / row.mean(rows, keepdims=True)) * jax.lax.rsqrt(column)
            inner = tuple(i for i, name in enumerate(names) if name not in _STACKED)
            size = jnp.sqrt(jnp.square(scaled).mean(inner, keepdims=True))
            return (scaled / jnp.maximum(size, 1.0)).astype(g.dtype), row, column, whole

        new = zip(*each(one, updates, state.rows, state.columns, state.whole), strict=True)
        tree = jax.tree.structure(updates)
        scaled, *moments = (jax.tree.unflatten(tree, leaves) for leaves in new)
        return scaled, Factored(state.count + 1, *moments)

    return optax.GradientTransformation(init, update)


def build(
    cfg: OptimConfig, steps: int, axes: Any, shapes: Any = None, updates: int = 1
) -> optax.GradientTransformation:
    """Clip, update rule, decoupled weight decay by kind of parameter, learning rate; for params with these axes.

    `shapes` are the params' as `jax.ShapeDtypeStruct`s, of use where layers are frozen or learn at rates of their own.
    `updates`: those of a step, which all have the step's learning rate.

    Source: Muon as Jordan et al. 2024 for matrices, with Adam for all else, its updates scaled to Adam's size
    (Liu et al. 2025); Adafactor as Shazeer & Stern 2018 without momentum.
    """
    if cfg.name in ("adam", "adamw"):
        rule = optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps)
    elif cfg.name == "momentum":
        rule = optax.trace(cfg.b1)
    elif cfg.name == "rmsprop":
        rule = optax.scale_by_rms(cfg.b2, cfg.eps, eps_in_sqrt=False)
    elif cfg.name == "lion":
        rule = optax.scale_by_lion(cfg.b1, cfg.b2)
    elif cfg.name == "adafactor":
        rule = scale_by_adafactor(axes)
    elif cfg.name == "muon":
        muon = contrib.muon(
            1.0,
            beta=cfg.b1,
            eps=cfg.eps,
            adam_b1=cfg.b1,
            adam_b2=cfg.b2,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=matrices(axes, "matrix"),
        )
        rule = optax.chain(muon, optax.scale(-1.0))
    elif cfg.name == "sgd":
        rule = optax.identity()
    else:
        raise ValueError(f"got optim.name {cfg.name!r}, expected an optimizer that is built here")
    mask = jax.tree.map(lambda kind: kind in cfg.decay_on, kinds(axes))
    rate: Any = schedule(cfg, steps)
    # Adam without the W: no decay, whatever the weight_decay of the config says
    decay = 0.0 if cfg.name == "adam" else cfg.weight_decay
    parts = [
        optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity(),
        rule,
        optax.add_decayed_weights(decay, mask) if decay else optax.identity(),
        optax.scale_by_learning_rate(lambda count: rate(jnp.asarray(count) // updates)),
    ]
    scales = None if shapes is None else factors(cfg, shapes, axes)
    if scales is None:
        return optax.chain(*parts)
    # what is frozen adds nothing to the norm that is clipped, and its gradient is never computed
    return optax.chain(scaled(jax.tree.map(np.sign, scales)), *parts, scaled(scales))


def scaled(factors: Any) -> optax.GradientTransformation:
    """Updates times factors."""

    def scale(update: jax.Array, factor: Any) -> jax.Array:
        return update * factor.astype(update.dtype) if factor.any() else jnp.zeros_like(update)

    def each(updates: Any, _: Any) -> Any:
        return jax.tree.map(scale, updates, factors)

    return optax.stateless(each)
