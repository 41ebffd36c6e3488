"""Attention block by block: memory linear in the length, plain JAX, differentiated in reverse only.

Blocks that causality, the window or the keys' length hide are never computed. Source: Dao 2023, FlashAttention-2,
algorithms 1 and 2.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxmodels.models.kernels import looped, unrolled
from jaxmodels.models.kernels.blocks import Hidden, Plan
from jaxmodels.models.kernels.kernel import EVERYTHING, Call, Kernel
from jaxmodels.models.kernels.xla import SHORT, score_bytes

ROWS = 64
"""Queries in an unrolled block, the fastest on CPU."""
UNROLLED = 4
"""Most blocks of queries that are unrolled: from 512 tokens on, loops are faster and compile faster."""


def attend(q, k, v, *, causal, window, segments, bias, scale, dropout, rng, softcap, q_offset, kv_length):
    """Attention over blocks.

    Shapes: as `xla.attend`.
    """
    del dropout, rng  # never asked for: not among its features
    (B, T, H, K), (S, G) = q.shape, k.shape[1:3]
    R = H // G
    # Heads before positions, so that every product is a plain batched matrix product.
    q = q.reshape(B, T, G, R, K).transpose(0, 2, 3, 1, 4)
    k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))
    if bias is not None:
        b, h, t, s = bias.shape
        bias = bias.reshape(b, 1 if h == 1 else G, 1 if h == 1 else R, t, s).astype(jnp.float32)
    plan = Plan(causal, window, scale, softcap, min(T, ROWS), S, q_offset if isinstance(q_offset, int) else None)
    hidden = Hidden(jnp.atleast_1d(jnp.asarray(q_offset, jnp.int32)), kv_length, *(segments or (None, None)))
    out: jax.Array
    if plan.offset is not None and kv_length is None and -(-T // plan.Q) <= UNROLLED:
        out = unrolled.attend(plan, q, k, v, bias, hidden)
    else:
        out = looped.attend(plan._replace(Q=equal(T), S=equal(S)), q, k, v, bias, hidden)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, H, K)


def equal(n: int) -> int:
    """The length of a looped block: at most 128, the fastest on CPU, and equal parts, so that little is padding."""
    return n if n <= 128 else -(-n // -(-n // 128) // 8) * 8


def preferred(call: Call, platform: str, devices: int) -> str | None:
    """On CPU for all but short calls; elsewhere where the whole matrix of scores would be large."""
    if platform == "cpu":
        return None if min(call.T, call.S) < SHORT else f"fastest on cpu for T={call.T}, S={call.S}"
    gigabytes = score_bytes(call, devices)
    return f"the scores take {gigabytes:.2g} GiB a device" if gigabytes > 1 else None


KERNEL = Kernel(attend, EVERYTHING - {"dropout"}, preferred=preferred, partition="compiler")
