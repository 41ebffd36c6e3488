"""What families take: token ids and images, as shapes and dtypes for `Family.inputs`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxmodels.models.model import Inputs


def token_inputs(c: Any, batch: int, length: int) -> Inputs:
    """Token ids (B, T)."""
    return (jax.ShapeDtypeStruct((batch, length), jnp.int32),)


def context_inputs(c: Any, batch: int, length: int) -> Inputs:
    """Token ids (B, T), of which there are at most `context`."""
    return token_inputs(c, batch, min(length, c.context))


def image_inputs(c: Any, batch: int, length: int) -> Inputs:
    """Images (B, H, W, C)."""
    return (jax.ShapeDtypeStruct((batch, *c.input_shape), jnp.float32),)
