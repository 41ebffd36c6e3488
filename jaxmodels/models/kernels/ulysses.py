"""Attention by all-to-all: each device computes its share of the heads for whole sequences.

A call exchanges four arrays: a device's pieces of q, k, v and the output. Keys and values that have fewer heads than
there are devices are repeated. Source: Jacobs et al. 2023, DeepSpeed-Ulysses.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxmodels.models.kernels import blockwise, ring
from jaxmodels.models.kernels.kernel import Attend, Call, Choose, Kernel


def attend(q, k, v, *, local, segments, axis=None, **given):
    """Run the kernel `local` on whole sequences, with all-to-alls around it where the tokens are sharded over an axis.

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
        # kernels recognize self-attention by the identity of the two arrays
        segments = (ids, ids if segments[1] is segments[0] else whole(segments[1]))
    out: jax.Array = local(q=q, k=k, v=v, segments=segments, **given)
    return lax.all_to_all(out, axis, split_axis=1, concat_axis=2, tiled=True)


def refuses(call: Call) -> str | None:
    """Refuse tokens or heads that do not divide evenly among the devices."""
    if reason := ring.uneven(call, call.pieces):
        return reason
    shares = call.pieces * call.shares
    if call.pieces > 1 and call.H % shares:
        return f"needs heads that {shares} divides on this mesh, got {call.H}"
    return None


def bind(call: Call, choose: Choose) -> Attend:
    """Return the exchange, around the kernel that is best for whole sequences."""
    return partial(attend, local=choose(call._replace(pieces=1)))


KERNEL = Kernel(
    attend,
    ring.FEATURES,
    refuses=refuses,
    preferred=ring.preferred,
    partition="tokens",
    uncut=blockwise.KERNEL.features,  # the kernel that is chosen supports at least these
    bind=bind,
)
