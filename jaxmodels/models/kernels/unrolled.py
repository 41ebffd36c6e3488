"""Blockwise attention over a few blocks of queries, each with all keys it can see; positions are static."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxmodels.models.kernels.blocks import Hidden, Plan, einsum, fold, normalize, pull, score
from jaxmodels.models.kernels.xla import FLOOR


def blocks(plan: Plan, T: int, S: int) -> Iterator[tuple[slice, slice]]:
    """Each block of queries, with the keys that any of them can see."""
    for a in range(0, T, plan.Q):
        b = min(a + plan.Q, T)
        low, high = (plan.offset or 0) + a, (plan.offset or 0) + b
        ahead = 0 if plan.causal else S if plan.window is None else plan.window - 1
        first = 0 if plan.window is None else min(S, max(0, low - plan.window + 1))
        yield slice(a, b), slice(first, max(first, min(S, high + ahead)))


def block_arguments(plan: Plan, rows: slice, keys: slice, q, k, bias, hidden: Hidden):
    """The arguments of `score` for one block."""
    if bias is not None:
        bias = bias[:, :, :, rows if bias.shape[3] > 1 else slice(None), keys if bias.shape[4] > 1 else slice(None)]
    segments = None
    if hidden.q_segments is not None and hidden.kv_segments is not None:
        segments = hidden.q_segments[:, rows], hidden.kv_segments[:, keys]
    t, s = hidden.q_offset[:, None] + jnp.arange(rows.start, rows.stop), jnp.arange(keys.start, keys.stop)
    return plan, q[:, :, :, rows], k[:, :, keys], bias, t, s, segments, None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(plan: Plan, q, k, v, bias, hidden: Hidden):
    return forward(plan, q, k, v, bias, hidden)[0]


def forward(plan: Plan, q, k, v, bias, hidden: Hidden):
    outs, lses = [], []
    for rows, keys in blocks(plan, q.shape[3], k.shape[2]):
        _, x = score(*block_arguments(plan, rows, keys, q, k, bias, hidden))
        top = jnp.maximum(x.max(-1, initial=FLOOR), FLOOR)
        p = jnp.exp(x - top[..., None])
        total, lse = normalize(top, p.sum(-1))
        B, G, R, Q, n = p.shape
        out = einsum("bgms,bgsk->bgmk", p.astype(v.dtype).reshape(B, G, R * Q, n), v[:, :, keys])
        outs.append(out.reshape(B, G, R, Q, -1) / total[..., None])
        lses.append(lse)
    out, lse = jnp.concatenate(outs, 3).astype(q.dtype), jnp.concatenate(lses, 3)
    return out, (q, k, v, bias, hidden, out, lse)


def backward(plan: Plan, saved: Any, d_out):
    q, k, v, bias, hidden, out, lse = saved
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    dqs = []
    dk, dv = jnp.zeros_like(k, jnp.float32), jnp.zeros_like(v, jnp.float32)
    d_bias = None if bias is None else jnp.zeros_like(bias)
    for rows, keys in blocks(plan, q.shape[3], k.shape[2]):
        arguments = block_arguments(plan, rows, keys, q, k, bias, hidden)
        _, q_part, k_part, bias_part, *_ = arguments
        at = (slice(None),) * 3 + (rows,)
        dq, dk_part, dv_part, dx = pull(
            plan, q_part, k_part, v[:, :, keys], d_out[at], delta[at], lse[at], *score(*arguments)
        )
        room = [(0, 0)] * 2 + [(keys.start, k.shape[2] - keys.stop), (0, 0)]
        dqs.append(dq)
        dk, dv = dk + jnp.pad(dk_part, room), dv + jnp.pad(dv_part, room)
        if d_bias is not None and bias_part is not None:
            corner = (0, 0, 0, rows.start if d_bias.shape[3] > 1 else 0, keys.start if d_bias.shape[4] > 1 else 0)
            part = fold(dx, bias_part.shape)
            d_bias = lax.dynamic_update_slice(d_bias, lax.dynamic_slice(d_bias, corner, part.shape) + part, corner)
    return jnp.concatenate(dqs, 3).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), d_bias, None


attend.defvjp(forward, backward)
