"""The reference kernel: two einsums and a softmax, every feature, memory quadratic in the length."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxmodels.models.kernels.dropout import drop
from jaxmodels.models.kernels.kernel import EVERYTHING, Call, Kernel
from jaxmodels.models.kernels.visibility import full_mask

FLOOR = -0.7 * float(jnp.finfo(jnp.float32).max)
"""Lower bound on a row's maximum: finite, so that a row of -inf (nothing visible) has weights of 0 and not nan."""


SHORT = 48
"""With fewer queries or keys, a single pass is as fast on CPU as blocks, forward and backward."""


def attend(q, k, v, *, dropout, rng, **how):
    """Attention with its whole matrix of weights.

    Shapes: q (B, T, H, K), k and v (B, S, G, K), bias (B or 1, H or 1, T or 1, S or 1), segments (B, T) and (B, S),
    q_offset an integer or (B or 1,), kv_length (B or 1,); returns (B, T, H, K).
    """
    p = weights(q, k, **how)
    if dropout > 0:
        p = drop(p, dropout, rng)
    out = jnp.einsum("bgrts,bsgk->btgrk", p.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out.reshape(q.shape).astype(q.dtype)


def weights(q, k, **how):
    """The attention weights of each query over the keys: rows that sum to 1, or to 0 where nothing is visible.

    Shapes: as in `attend`; returns (B, G, H / G, T, S) in float32.
    """
    seen = scores(q, k, **how)
    top = jax.lax.stop_gradient(jnp.maximum(seen.max(-1, keepdims=True), FLOOR))
    p = jnp.exp(seen - top)
    total = p.sum(-1, keepdims=True)
    return p / jnp.where(total == 0, 1.0, total)


def scores(q, k, *, causal, window, segments, bias, scale, softcap, q_offset, kv_length):
    """The scores that weights are the softmax of, -inf where a query does not see a key.

    Shapes: as in `attend`; returns (B, G, H / G, T, S) in float32.
    """
    B, T, H, K = q.shape
    S, G = k.shape[1:3]
    R = H // G
    q = q.reshape(B, T, G, R, K)
    found = jnp.einsum("btgrk,bsgk->bgrts", q, k, preferred_element_type=jnp.float32) * scale
    if softcap is not None:
        found = softcap * jnp.tanh(found / softcap)
    if bias is not None:
        b, h, t, s = bias.shape
        found = found + bias.reshape(b, *((1, 1) if h == 1 else (G, R)), t, s).astype(jnp.float32)
    mask = full_mask(T, S, q_offset, causal=causal, window=window, segments=segments, kv_length=kv_length)
    if mask is not None:
        found = jnp.where(mask[:, None, None], found, -jnp.inf)
    return found


def preferred(call: Call, platform: str, devices: int) -> str:
    """The last choice of `auto`, for every call that no other kernel has taken."""
    if platform == "cpu":
        short = min(call.T, call.S) < SHORT
        return f"fastest on cpu for T={call.T}, S={call.S}" if short else "the reference computes every call"
    return f"the scores take {score_bytes(call, devices):.2g} GiB a device"


def score_bytes(call: Call, devices: int) -> float:
    """GiB of each device that the scores of a call take in float32."""
    return call.B * call.H * call.T * call.S * 4 / 2**30 / devices


KERNEL = Kernel(attend, EVERYTHING, preferred=preferred, partition="compiler")
