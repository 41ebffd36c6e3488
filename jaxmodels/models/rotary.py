"""Rotary positions: each pair of a head's dimensions turns by an angle that grows with the position."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxmodels.fields import Dim, Positive, Section

Array = jax.Array


@dataclass(frozen=True)
class RopeScaling(Section, section="model.rope_scaling"):
    """Llama 3.1's stretch of slow rotations, as published in its reference code (`apply_scaling`)."""

    factor: Positive = 1.0
    """Low frequencies are divided by this; 1 leaves them as they are."""
    low_freq_factor: Positive = 1.0
    """Wavelengths above `original_context` / this are scaled in full."""
    high_freq_factor: Positive = 4.0
    """Wavelengths below `original_context` / this are left alone."""
    original_context: Dim = 8192
    """The context of pre-training before the stretch."""


def rotary_frequencies(size: int, theta: float, scaling: RopeScaling = RopeScaling()) -> Array:
    """Angle per position of each pair of dimensions, (K/2,) float32."""
    freq = theta ** (-jnp.arange(0, size, 2, dtype=jnp.float32) / size)
    if scaling.factor == 1.0:
        return freq
    turns = scaling.original_context * freq / (2 * math.pi)  # rotations within the original context
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = jnp.clip(smooth, 0.0, 1.0)
    return smooth * freq + (1 - smooth) * freq / scaling.factor


def rotate(x: Array, positions: Array, freq: Array) -> Array:
    """Apply rotary positions (Su et al. 2021) to x (B, T, H, K), pairing dimension i with i + K/2."""
    angle = positions[:, :, None, None].astype(jnp.float32) * freq
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
