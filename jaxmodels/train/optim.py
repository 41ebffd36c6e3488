"""The optimizer of an experiment, from Optax's parts."""

from __future__ import annotations

from typing import Any

import jax
import optax
from optax import contrib

from jaxmodels.config import OptimConfig


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


def build(cfg: OptimConfig, steps: int, axes: Any) -> optax.GradientTransformation:
    """Clip, update rule, decoupled weight decay by kind of parameter, learning rate; for params with these axes.

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
    return optax.chain(*parts)
