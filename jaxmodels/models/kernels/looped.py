"""Blockwise attention as loops over blocks of queries and keys with a running softmax, for any length."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxmodels.models.kernels.blocks import Hidden, Plan, einsum, fold, normalize, pull, score
from jaxmodels.models.kernels.kernel import loop
from jaxmodels.models.kernels.xla import FLOOR


def attend(plan: Plan, q, k, v, bias, hidden: Hidden):
    """Compute attention over blocks of plan.Q queries and plan.S keys.

    Shapes: q (B, G, R, T, K), k and v (B, G, S, K), bias (b, g, r, t, s), each full or 1; returns q's.
    """
    T, S = q.shape[3], k.shape[2]
    nq, nk = -(-T // plan.Q), -(-S // plan.S)
    if nk * plan.S > S:
        length = jnp.full(1, S, jnp.int32) if hidden.kv_length is None else jnp.minimum(hidden.kv_length, S)
        hidden = hidden._replace(kv_length=length)
    if hidden.q_segments is not None:
        hidden = hidden._replace(
            q_segments=cut(hidden.q_segments, 1, nq, plan.Q), kv_segments=cut(hidden.kv_segments, 1, nk, plan.S)
        )
    if bias is not None:
        room = nq * plan.Q - T if bias.shape[3] > 1 else 0, nk * plan.S - S if bias.shape[4] > 1 else 0
        bias = jnp.pad(bias, [(0, 0)] * 3 + [(0, n) for n in room])
    q, k, v = cut(q, 3, nq, plan.Q), cut(k, 2, nk, plan.S), cut(v, 2, nk, plan.S)
    pairs = None if plan.offset is None else visited(plan, nq, nk, plan.offset)
    return join(over_blocks(plan, pairs, q, k, v, bias, hidden), 3)[:, :, :, :T]


def cut(x, axis: int, n: int, size: int):
    """Split an axis into n padded blocks, which become the first axis: (n, ..., size, ...)."""
    x = jnp.pad(x, [(0, n * size - x.shape[a] if a == axis else 0) for a in range(x.ndim)])
    return jnp.moveaxis(x.reshape(*x.shape[:axis], n, size, *x.shape[axis + 1 :]), axis, 0)


def join(blocks, axis: int):
    """Undo `cut`, except for its padding."""
    x = jnp.moveaxis(blocks, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def keys_of(plan: Plan, hidden: Hidden, i, nk):
    """Return the range [first, last) of blocks of keys that block i of queries can see."""
    low, high = hidden.q_offset.min() + i * plan.Q, hidden.q_offset.max() + (i + 1) * plan.Q - 1
    first, last = jnp.int32(0), jnp.int32(nk)
    if plan.causal or plan.window is not None:
        last = jnp.minimum(last, (high + ahead(plan)) // plan.S + 1)
    if plan.window is not None:
        first = jnp.maximum(first, (low - plan.window + 1) // plan.S)
    if hidden.kv_length is not None:
        last = jnp.minimum(last, -(-hidden.kv_length.max() // plan.S))
    return first, last


def visited(plan: Plan, nq: int, nk: int, offset: int) -> int:
    """Count the pairs of a block of queries and one of keys that are computed if the first query is at `offset`."""
    low = offset + np.arange(nq) * plan.Q
    first, last = np.zeros_like(low), np.full_like(low, nk)
    if plan.causal or plan.window is not None:
        last = np.minimum(last, (low + plan.Q - 1 + ahead(plan)) // plan.S + 1)
    if plan.window is not None:
        first = np.maximum(first, (low - plan.window + 1) // plan.S)
    return int(np.maximum(last - first, 0).sum())


def named(pairs: float | None, turns: int) -> contextlib.AbstractContextManager[Any]:
    """A scope that states how often the inner of two loops runs in each turn of the outer one, if that is known."""
    return contextlib.nullcontext() if pairs is None else jax.named_scope(loop(pairs / turns))


def queries_of(plan: Plan, hidden: Hidden, j, nq):
    """Return the range [first, last) of blocks of queries that can see block j of keys."""
    low, high = j * plan.S, (j + 1) * plan.S - 1
    first, last = jnp.int32(0), jnp.int32(nq)
    if plan.causal or plan.window is not None:
        first = jnp.maximum(first, (low - ahead(plan) - hidden.q_offset.max()) // plan.Q)
    if plan.window is not None:
        last = jnp.minimum(last, (high + plan.window - 1 - hidden.q_offset.min()) // plan.Q + 1)
    if hidden.kv_length is not None:
        last = jnp.where(low < hidden.kv_length.max(), last, 0)
    return first, last


def ahead(plan: Plan) -> int:
    """Return how many positions beyond its own a query sees, if that is limited."""
    return 0 if plan.causal else (plan.window or 1) - 1


def at(blocks, i):
    return lax.dynamic_index_in_dim(blocks, i, keepdims=False)


def corner(plan: Plan, bias, i, j):
    """Return the index at which the bias of block (i, j) begins."""
    return 0, 0, 0, i * plan.Q if bias.shape[3] > 1 else 0, j * plan.S if bias.shape[4] > 1 else 0


def part_of(plan: Plan, bias, i, j):
    """Return the bias of block (i, j)."""
    size = plan.Q if bias.shape[3] > 1 else 1, plan.S if bias.shape[4] > 1 else 1
    return lax.dynamic_slice(bias, corner(plan, bias, i, j), (*bias.shape[:3], *size))


def scores(plan: Plan, hidden: Hidden, q, k, bias, i, j):
    """`score` of block (i, j)."""
    segments = None if hidden.q_segments is None else (at(hidden.q_segments, i), at(hidden.kv_segments, j))
    t, s = hidden.q_offset[:, None] + i * plan.Q + jnp.arange(plan.Q), j * plan.S + jnp.arange(plan.S)
    part = None if bias is None else part_of(plan, bias, i, j)
    return score(plan, q, k, part, t, s, segments, hidden.kv_length)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def over_blocks(plan: Plan, pairs: int | None, q, k, v, bias, hidden: Hidden):
    return attended(plan, pairs, q, k, v, bias, hidden, q.dtype)[0]


def attended(plan: Plan, pairs: float | None, q, k, v, bias, hidden: Hidden, dtype):
    """Outputs in `dtype`, and the log-sum-exps of the scores, which are inf where nothing is seen.

    `pairs` says how many pairs of blocks are computed, for plans; None if nobody knows.
    Shapes: q (nq, B, G, R, Q, K), k and v (nk, B, G, S, K); returns q's and, without K, the same.
    """
    (nq, B, G, R, Q, K), nk = q.shape, k.shape[0]

    def rows(_, i):
        qi = at(q, i)

        def step(j, carry):
            out, top, total = carry
            _, x = scores(plan, hidden, qi, at(k, j), bias, i, j)
            new = jnp.maximum(top, x.max(-1))
            p, fade = jnp.exp(x - new[..., None]), jnp.exp(top - new)
            part = einsum("bgms,bgsk->bgmk", p.astype(v.dtype).reshape(B, G, R * Q, -1), at(v, j))
            return out * fade[..., None] + part.reshape(out.shape), new, total * fade + p.sum(-1)

        zero = lax.full_like(q, 0.0, jnp.float32, (B, G, R, Q))
        start = lax.full_like(q, 0.0, jnp.float32, (B, G, R, Q, K)), zero + FLOOR, zero
        with named(pairs, nq):
            out, top, total = lax.fori_loop(*keys_of(plan, hidden, i, nk), step, start)
        total, lse = normalize(top, total)
        return None, ((out / total[..., None]).astype(dtype), lse)

    return lax.scan(rows, None, jnp.arange(nq))[1]


def forward(plan: Plan, pairs: int | None, q, k, v, bias, hidden: Hidden):
    out, lse = attended(plan, pairs, q, k, v, bias, hidden, q.dtype)
    return out, (q, k, v, bias, hidden, out, lse)


def backward(plan: Plan, pairs: int | None, saved: Any, d_out):
    q, k, v, bias, hidden, out, lse = saved
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    dq, dk, dv, d_bias = gradients(plan, pairs, q, k, v, bias, hidden, lse, delta, d_out, k.dtype)
    return dq.astype(q.dtype), dk, dv, d_bias, None


def gradients(plan: Plan, pairs: float | None, q, k, v, bias, hidden: Hidden, lse, delta, d_out, dtype):
    """Gradients of q and bias in float32, of k and v in `dtype`; delta is the sum of d_out · output over K."""
    nq, nk = q.shape[0], k.shape[0]

    def columns(carry, j):
        kj, vj = at(k, j), at(v, j)

        def step(i, carry):
            dq, d_bias, dk, dv = carry
            qi = at(q, i)
            raw, x = scores(plan, hidden, qi, kj, bias, i, j)
            dq_part, dk_part, dv_part, dx = pull(plan, qi, kj, vj, at(d_out, i), at(delta, i), at(lse, i), raw, x)
            if bias is not None:
                part = part_of(plan, d_bias, i, j)
                d_bias = lax.dynamic_update_slice(d_bias, part + fold(dx, part.shape), corner(plan, bias, i, j))
            dq = lax.dynamic_update_index_in_dim(dq, at(dq, i) + dq_part, i, 0)
            return dq, d_bias, dk + dk_part, dv + dv_part

        zero = jnp.zeros_like(kj, jnp.float32), jnp.zeros_like(vj, jnp.float32)
        with named(pairs, nk):
            dq, d_bias, dk, dv = lax.fori_loop(*queries_of(plan, hidden, j, nq), step, (*carry, *zero))
        return (dq, d_bias), (dk.astype(dtype), dv.astype(dtype))

    start = jnp.zeros_like(q, jnp.float32), None if bias is None else jnp.zeros_like(bias)
    (dq, d_bias), (dk, dv) = lax.scan(columns, start, jnp.arange(nk))
    return dq, dk, dv, d_bias


over_blocks.defvjp(forward, backward)
