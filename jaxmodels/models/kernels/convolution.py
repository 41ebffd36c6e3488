"""Convolution, and faster forms of it: for maps no larger than the window, and for channels by themselves.

Dims: B rows, C channels in, F channels out.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

Array = jax.Array


def convolve(
    x: Array, w: Array, strides: Sequence[int], padding: str | Sequence[tuple[int, int]], groups: int
) -> Array:
    """Convolution of x (B, …, C) by w (window…, C / groups, F); any number of spatial dimensions.

    A map no larger than the window is left to `small`: XLA's convolution for CPUs takes tens of times as long on a map
    of 2×2 with a window of 3×3, and on larger ones no longer than that. Where each channel is convolved by itself,
    `depthwise` adds up shifted products: 3×3 windows of 32 channels took XLA twenty times as long forwards, and two to
    fifteen times with gradients.
    """
    sizes, window = x.shape[1:-1], w.shape[:-2]
    if groups == 1 and max(window) > 1 and all(n <= k for n, k in zip(sizes, window, strict=True)):
        return small(x, w, strides, padding)
    if groups == x.shape[-1] == w.shape[-1] > 1:
        return depthwise(x, w, strides, padding)
    letters = "".join(map(chr, range(ord("0"), ord("0") + len(window))))
    layout = ("N" + letters + "C", letters + "IO", "N" + letters + "C")
    return jax.lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=layout, feature_group_count=groups)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def along(x: Array, w: Array, groups: int) -> Array:
    """Convolution of sequences x (B, T, C) by a wide window w (K, C / groups, F) to sequences of the same length.

    The gradient of w is a product for each place of the window. XLA's own, of a convolution with groups, was wrong on
    meshes that split the rows, and took longer on a CPU.
    """
    return convolve(x, w, (1,), _around(w), groups)


def _around(w: Array) -> tuple[tuple[int, int]]:
    return ((len(w) // 2, (len(w) - 1) // 2),)


def _along_backward(groups: int, kept: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, w = kept
    (dx,) = jax.vjp(lambda x: convolve(x, w, (1,), _around(w), groups), x)[1](dy)
    B, T, C = x.shape
    padded = jnp.pad(x, ((0, 0), *_around(w), (0, 0))).reshape(B, -1, groups, C // groups)
    dy = dy.reshape(B, T, groups, -1)

    def place(k: Array) -> Array:
        seen = jax.lax.dynamic_slice_in_dim(padded, k, T, 1)
        return jnp.einsum("btgc,btgf->cgf", seen, dy, preferred_element_type=jnp.float32)

    return dx, jax.lax.map(place, jnp.arange(len(w))).reshape(w.shape).astype(w.dtype)


along.defvjp(lambda x, w, groups: (along(x, w, groups), (x, w)), _along_backward)


def small(x: Array, w: Array, strides: Sequence[int], padding: str | Sequence[tuple[int, int]]) -> Array:
    """Convolution as one product: at each place, what the window covers of x, times the weights.

    It leaves out the places of the window that meet padding everywhere. Source: Chellapilla et al. 2006, section 3.
    """
    sizes, window = x.shape[1:-1], w.shape[:-2]
    pads = jax.lax.padtype_to_pads(sizes, window, strides, padding) if isinstance(padding, str) else padding
    places = [(n + sum(pad) - k) // s + 1 for n, pad, k, s in zip(sizes, pads, window, strides, strict=True)]
    met = [
        range(max(0, low - (count - 1) * s), min(k, low + n))
        for n, (low, _), k, s, count in zip(sizes, pads, window, strides, places, strict=True)
    ]
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    covered = [
        x[
            (
                slice(None),
                *(slice(i, i + (count - 1) * s + 1, s) for i, count, s in zip(at, places, strides, strict=True)),
            )
        ]
        for at in itertools.product(*met)
    ]
    if not covered:  # every window lies in the padding
        return jnp.zeros((len(x), *places, w.shape[-1]), x.dtype)
    w = w[tuple(slice(taps.start, taps.stop) for taps in met)]
    return jnp.tensordot(jnp.stack(covered, -2), w.reshape(-1, *w.shape[-2:]), 2)


def depthwise(x: Array, w: Array, strides: Sequence[int], padding: str | Sequence[tuple[int, int]]) -> Array:
    """Convolution of each channel by itself, x (B, …, C) by w (window…, 1, C), as a sum of shifted products."""
    sizes, window = x.shape[1:-1], w.shape[:-2]
    pads = jax.lax.padtype_to_pads(sizes, window, strides, padding) if isinstance(padding, str) else padding
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    reach = [(n - k) // s * s + 1 for n, k, s in zip(x.shape[1:-1], window, strides, strict=True)]
    parts = (
        x[(slice(None), *(slice(i, i + n, s) for i, n, s in zip(at, reach, strides, strict=True)))] * w[(*at, 0)]
        for at in itertools.product(*map(range, window))
    )
    return functools.reduce(jnp.add, parts)


def overlap(y: Array, axis: int, stride: int, cut: Sequence[int]) -> Array:
    """Add up windows at a distance of `stride`: the dimensions n and window, at `axis` and after it, become one."""
    n, size = y.shape[axis : axis + 2]
    pieces = -(-size // stride)

    def pad(z: Array, at: int, low: int, high: int) -> Array:
        return jax.lax.pad(z, jnp.zeros((), z.dtype), [(low, high, 0) if i == at else (0, 0, 0) for i in range(z.ndim)])

    y = pad(y, axis + 1, 0, pieces * stride - size)
    parts = (jax.lax.slice_in_dim(y, j * stride, (j + 1) * stride, axis=axis + 1) for j in range(pieces))
    total = functools.reduce(jnp.add, (pad(part, axis, j, pieces - 1 - j) for j, part in enumerate(parts)))
    total = total.reshape(*y.shape[:axis], (n + pieces - 1) * stride, *y.shape[axis + 2 :])
    return pad(total, axis, -cut[0], size - pieces * stride - cut[1])
