"""Attention by all-to-all: each device takes whole sequences of its share of the heads, and gives its tokens back.

Four exchanges a call, of the device's own pieces of q, k, v and the output. Where there are fewer heads of keys than
devices, they are repeated as often as needed. Source: Jacobs et al. 2023, DeepSpeed-Ulysses.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax


def attend(q, k, v, *, local, segments, axis=None, **given):
    """The kernel `local` on whole sequences; without an axis that cuts tokens, that kernel alone.

    Shapes: as `xla.attend`, of a device's own tokens.
    """
    if axis is None:
        return local(q=q, k=k, v=v, segments=segments, **given)
    n, G = lax.axis_size(axis), k.shape[2]
    k, v = (jnp.repeat(x, n // math.gcd(n, G), axis=2) for x in (k, v))
    q, k, v = (lax.all_to_all(x, axis, split_axis=2, concat_axis=1, tiled=True) for x in (q, k, v))
    if segments is not None:
        whole = partial(lax.all_gather, axis_name=axis, axis=1, tiled=True)
        ids = whole(segments[0])
        # kernels tell by identity that queries and keys are the same tokens
        segments = (ids, ids if segments[1] is segments[0] else whole(segments[1]))
    out: jax.Array = local(q=q, k=k, v=v, segments=segments, **given)
    return lax.all_to_all(out, axis, split_axis=1, concat_axis=2, tiled=True)
