"""The optimizer of an experiment, from Optax's parts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from jaxmodels.config import OptimConfig
from jaxmodels.errors import UserError

_BEFORE = ("embed", "patches", "positions", "relative", "types", "class_token")
"""How the names of parameters begin that come before a stack of layers."""


def schedule(cfg: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate as a function of the step: linear warm-up, then the configured shape up to the last step.

    Source: wsd is MiniCPM's warmup-stable-decay (Hu et al. 2024).
    """
    warmup = cfg.warmup_steps
    rest, peak, final = max(steps - warmup, 1), cfg.peak_lr, cfg.peak_lr * cfg.final_lr_fraction
    if cfg.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, cfg.final_lr_fraction)
    elif cfg.schedule == "linear":
        after = optax.linear_schedule(peak, final, rest)
    elif cfg.schedule == "constant":
        after = optax.constant_schedule(peak)
    else:
        decay = max(int(steps * cfg.decay_fraction), 1)
        after = optax.linear_schedule(peak, final, decay, transition_begin=max(rest - decay, 0))
    # the first step already moves: its rate is peak / warmup, not 0
    ramp = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    return optax.join_schedules([ramp, after], [warmup]) if warmup else after


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


def matrices(axes: Any) -> Any:
    """For Muon: which dimensions of each matrix are inputs and which outputs; stacked layers, experts are a batch."""

    def dims(kind: str, names: tuple[str | None, ...]) -> contrib.MuonDimensionNumbers | None:
        if kind != "matrix":
            return None
        used = [i for i, name in enumerate(names) if name not in ("layers", "expert", "gates")]
        outputs = used[-2:] if names[-1] == "head_dim" else used[-1:]
        return contrib.MuonDimensionNumbers(tuple(i for i in used if i not in outputs), tuple(outputs))

    return jax.tree.map(dims, kinds(axes), axes)


def factors(cfg: OptimConfig, shapes: Any, axes: Any) -> Any:
    """What each parameter's updates are multiplied by: arrays that broadcast to them; None where it is 1 for all.

    0 for what `optim.freeze` names. `optim.layer_decay` to the power of the layers above: none for what comes behind
    the stack of layers (head, norm, pooler, …), all of them for embeddings before it.

    Raises:
        UserError: a pattern of no parameter, or a layer decay for a model without a stack of layers.
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
    for pattern in cfg.freeze:
        if not any(frozen((pattern,), name, (*shape, 1)[0]).any() for name, shape in zip(names, sizes, strict=True)):
            tops = list(dict.fromkeys(name.partition("/")[0] for name in names))
            raise UserError(
                f"got optim.freeze {pattern!r}, which is no parameter, expected some of {', '.join(tops)}, "
                f"try --optim.freeze '{tops[0]}/*'"
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


def build(cfg: OptimConfig, steps: int, axes: Any, shapes: Any = None) -> optax.GradientTransformation:
    """Clip, update rule, decoupled weight decay by kind of parameter, learning rate; for params with these axes.

    `shapes` are the params' as `jax.ShapeDtypeStruct`s, of use where layers are frozen or learn at rates of their own.

    Source: Muon as Jordan et al. 2024 for matrices, with Adam for all else, its updates scaled to Adam's size
    (Liu et al. 2025); Adafactor as Shazeer & Stern 2018 without momentum.
    """
    if cfg.name in ("adam", "adamw"):
        rule = optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps)
    elif cfg.name == "momentum":
        rule = optax.trace(cfg.b1)
    elif cfg.name == "rmsprop":
        rule = optax.scale_by_rms(cfg.b2, cfg.eps)
    elif cfg.name == "lion":
        rule = optax.scale_by_lion(cfg.b1, cfg.b2)
    elif cfg.name == "adafactor":
        rule = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    elif cfg.name == "muon":
        muon = contrib.muon(
            1.0,
            beta=cfg.b1,
            eps=cfg.eps,
            adam_b1=cfg.b1,
            adam_b2=cfg.b2,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=matrices(axes),
        )
        rule = optax.chain(muon, optax.scale(-1.0))
    else:
        rule = optax.identity()
    mask = jax.tree.map(lambda kind: kind in cfg.decay_on, kinds(axes))
    # Adam without the W: no decay, whatever the weight_decay of the config says
    decay = 0.0 if cfg.name == "adam" else cfg.weight_decay
    parts = [
        optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity(),
        rule,
        optax.add_decayed_weights(decay, mask) if decay else optax.identity(),
        optax.scale_by_learning_rate(schedule(cfg, steps)),
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
