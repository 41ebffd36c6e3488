"""Losses over examples; targets below 0 are ignored."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Scores(NamedTuple):
    """Sums over all targets that count."""

    objective: jax.Array
    """What is minimised: cross-entropy with label smoothing, plus z-loss."""
    loss: jax.Array
    """Cross-entropy in nats."""
    correct: jax.Array
    count: jax.Array


def cross_entropy(logits: jax.Array, targets: jax.Array, smoothing: float = 0.0, z_loss: float = 0.0) -> Scores:
    """Softmax cross-entropy summed over targets.

    Shapes: logits (…, V), targets (…) integers, below 0 ignored.
    Source: label smoothing, Szegedy et al. 2016, section 7; z-loss, Chowdhery et al. 2022, section 5.
    """
    logits = logits.astype(jnp.float32)
    counts = targets >= 0
    safe = jnp.where(counts, targets, 0)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, safe[..., None], axis=-1)[..., 0]
    loss = jnp.where(counts, log_z - picked, 0.0)
    objective = loss
    if smoothing:
        objective = jnp.where(counts, log_z - (1 - smoothing) * picked - smoothing * logits.mean(-1), 0.0)
    if z_loss:
        objective = objective + jnp.where(counts, z_loss * jnp.square(log_z), 0.0)
    correct = counts & (picked >= logits.max(-1))
    return Scores(objective.sum(), loss.sum(), correct.sum(), counts.sum())
