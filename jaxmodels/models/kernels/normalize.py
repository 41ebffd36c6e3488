"""Normalization over the last dimension that saves only its input for the backward pass.

JAX's own gradient saves float32 copies of the centered and of the normalized input, which in a bfloat16 block take more
memory than all its products.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

Array = jax.Array


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x: Array, scale: Array, bias: Array | None, eps: float) -> Array:
    """Mean 0 and variance 1, times scale, plus bias; computed in float32.

    Shapes: x (…, D), scale and bias (D,).
    Source: Ba et al. 2016.
    """
    normal, _ = _normal(x, eps, centered=True)
    y = normal * scale
    return (y if bias is None else y + bias).astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: Array, scale: Array, eps: float) -> Array:
    """Root mean square 1, computed in float32, then times scale in the type of x.

    Shapes: x (…, D), scale (D,).
    Source: Zhang & Sennrich 2019; the order of rounding is that of transformers' LLaMA.
    """
    normal, _ = _normal(x, eps, centered=False)
    return normal.astype(x.dtype) * scale.astype(x.dtype)


def _normal(x: Array, eps: float, centered: bool) -> tuple[Array, Array]:
    """x normalized in float32, and the factor that it was multiplied by."""
    y = x.astype(jnp.float32)
    if centered:
        y = y - y.mean(-1, keepdims=True)
    rate = jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps)
    return y * rate, rate


def _gradients(x: Array, scale: Array, dy: Array, eps: float, centered: bool) -> tuple[Array, Array, Array]:
    """The gradients of x and scale, and dy in float32."""
    normal, rate = _normal(x, eps, centered)
    dy = dy.astype(jnp.float32)
    slope = dy * scale
    dx = slope - normal * (slope * normal).mean(-1, keepdims=True)
    if centered:
        dx = dx - slope.mean(-1, keepdims=True)
    dscale = (dy * normal).sum(range(x.ndim - 1))
    return (dx * rate).astype(x.dtype), dscale.astype(scale.dtype), dy


def _layer_backward(
    eps: float, kept: tuple[Array, Array, Array | None], dy: Array
) -> tuple[Array, Array, Array | None]:
    x, scale, bias = kept
    dx, dscale, dy = _gradients(x, scale, dy, eps, centered=True)
    return dx, dscale, None if bias is None else dy.sum(range(x.ndim - 1)).astype(bias.dtype)


def _rms_backward(eps: float, kept: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    return _gradients(*kept, dy, eps, centered=False)[:2]


layer_norm.defvjp(lambda x, scale, bias, eps: (layer_norm(x, scale, bias, eps), (x, scale, bias)), _layer_backward)
rms_norm.defvjp(lambda x, scale, eps: (rms_norm(x, scale, eps), (x, scale)), _rms_backward)
