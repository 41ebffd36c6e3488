"""Attention block by block with a running softmax: memory linear in the length, plain JAX.

Source: Dao 2023, FlashAttention-2, algorithms 1 and 2. Blocks that causality, the window or the keys' length hide
are never computed: the loops' bounds leave them out.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxmodels.models.kernels.visibility import visible
from jaxmodels.models.kernels.xla import FLOOR

Array = jax.Array


class Plan(NamedTuple):
    """What is known before tracing; Q and S are the lengths of a block of queries and of keys."""

    causal: bool
    window: int | None
    scale: float
    softcap: float | None
    Q: int
    S: int


class Hidden(NamedTuple):
    """Integer inputs that decide what is visible: queries' positions, keys' number, segments cut in blocks."""

    q_offset: Array
    kv_length: Array | None
    q_segments: Array | None
    kv_segments: Array | None


def attend(q, k, v, *, causal, window, segments, bias, scale, dropout, rng, softcap, q_offset, kv_length, block=None):
    """Attention with a running softmax over blocks.

    Shapes: as `xla.attend`.
    """
    del dropout, rng  # refused by the contract
    (B, T, H, K), (S, G) = q.shape, k.shape[1:3]
    R = H // G
    bq, bk = block or (block_length(T), block_length(S))
    nq, nk = -(-T // bq), -(-S // bk)
    if nk * bk > S:
        kv_length = jnp.full(1, S, jnp.int32) if kv_length is None else jnp.minimum(kv_length, S)

    def cut(x, n, size, fill=0):
        """(B, L, ...) in blocks: (n, B, size, ...)."""
        x = jnp.pad(x, [(0, 0), (0, n * size - x.shape[1])] + [(0, 0)] * (x.ndim - 2), constant_values=fill)
        return jnp.moveaxis(x.reshape(x.shape[0], n, size, *x.shape[2:]), 1, 0)

    # Heads before positions, so that every product below is a plain batched matrix product.
    q_blocks = cut(q.reshape(B, T, G, R, K), nq, bq).transpose(0, 1, 3, 4, 2, 5).reshape(nq, B, G, R * bq, K)
    k_blocks, v_blocks = (cut(x, nk, bk).transpose(0, 1, 3, 2, 4) for x in (k, v))
    if bias is not None:
        b, h, t, s = bias.shape
        bias = bias.reshape(b, 1 if h == 1 else G, 1 if h == 1 else R, t, s).astype(jnp.float32)
        bias = jnp.pad(bias, [(0, 0)] * 3 + [(0, nq * bq - T if t > 1 else 0), (0, nk * bk - S if s > 1 else 0)])
    cut_segments = (None, None) if segments is None else (cut(segments[0], nq, bq), cut(segments[1], nk, bk))
    plan = Plan(causal, window, scale, softcap, bq, bk)
    out = _attend(plan, q_blocks, k_blocks, v_blocks, bias, Hidden(jnp.atleast_1d(jnp.asarray(q_offset, jnp.int32)), kv_length, *cut_segments))
    out = out.reshape(nq, B, G, R, bq, K).transpose(1, 0, 4, 2, 3, 5).reshape(B, nq * bq, H, K)
    return out[:, :T]


def block_length(n: int) -> int:
    """The length of a block: up to 128, the fastest measured on CPU, in equal parts so that little is padding."""
    return n if n <= 128 else -(-n // -(-n // 128) // 8) * 8


def keys_of(plan: Plan, hidden: Hidden, i, nk):
    """The blocks of keys [first, last) that block i of queries can see."""
    low, high = hidden.q_offset.min() + i * plan.Q, hidden.q_offset.max() + (i + 1) * plan.Q - 1
    first, last = jnp.int32(0), jnp.int32(nk)
    ahead = 0 if plan.causal else None if plan.window is None else plan.window - 1
    if ahead is not None:
        last = jnp.minimum(last, (high + ahead) // plan.S + 1)
    if plan.window is not None:
        first = jnp.maximum(first, (low - plan.window + 1) // plan.S)
    if hidden.kv_length is not None:
        last = jnp.minimum(last, -(-hidden.kv_length.max() // plan.S))
    return first, last


def queries_of(plan: Plan, hidden: Hidden, j, nq):
    """The blocks of queries [first, last) that can see block j of keys."""
    low, high = j * plan.S, (j + 1) * plan.S - 1
    first, last = jnp.int32(0), jnp.int32(nq)
    ahead = 0 if plan.causal else None if plan.window is None else plan.window - 1
    if ahead is not None:
        first = jnp.maximum(first, (low - ahead - hidden.q_offset.max()) // plan.Q)
    if plan.window is not None:
        last = jnp.minimum(last, (high + plan.window - 1 - hidden.q_offset.min()) // plan.Q + 1)
    if hidden.kv_length is not None:
        last = jnp.where(low < hidden.kv_length.max(), last, 0)
    return first, last


def score(plan: Plan, hidden: Hidden, q, k, bias, i, j):
    """Scores of one block before and after bias and mask, both (B, G, R, Q, S)."""
    B, G, M, _ = q.shape
    s = jnp.einsum("bgmk,bgsk->bgms", q, k, preferred_element_type=jnp.float32) * plan.scale
    s = raw = s.reshape(B, G, M // plan.Q, plan.Q, plan.S)
    if plan.softcap is not None:
        s = raw = plan.softcap * jnp.tanh(s / plan.softcap)
    if bias is not None:
        s = s + slice_of(plan, bias, i, j)
    segments = None if hidden.q_segments is None else (at(hidden.q_segments, i), at(hidden.kv_segments, j))
    t = hidden.q_offset[:, None] + i * plan.Q + jnp.arange(plan.Q)
    mask = visible(t, j * plan.S + jnp.arange(plan.S), causal=plan.causal, window=plan.window, segments=segments,
                   kv_length=hidden.kv_length)
    return raw, s if mask is None else jnp.where(mask[:, None, None], s, -jnp.inf)


def at(blocks, i):
    return lax.dynamic_index_in_dim(blocks, i, keepdims=False)


def corner(plan: Plan, bias, i, j):
    t, s = bias.shape[3:]
    return (0, 0, 0, i * plan.Q if t > 1 else 0, j * plan.S if s > 1 else 0)


def slice_of(plan: Plan, bias, i, j):
    t, s = bias.shape[3:]
    size = (*bias.shape[:3], plan.Q if t > 1 else 1, plan.S if s > 1 else 1)
    return lax.dynamic_slice(bias, corner(plan, bias, i, j), size)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: Plan, q, k, v, bias, hidden: Hidden):
    return _forward(plan, q, k, v, bias, hidden)[0]


def _forward(plan: Plan, q, k, v, bias, hidden: Hidden):
    (nq, B, G, M, K), nk = q.shape, k.shape[0]

    def rows(_, i):
        qi = at(q, i)

        def step(j, carry):
            out, top, total = carry
            _, s = score(plan, hidden, qi, at(k, j), bias, i, j)
            s = s.reshape(B, G, M, plan.S)
            new = jnp.maximum(top, s.max(-1))
            p, fade = jnp.exp(s - new[..., None]), jnp.exp(top - new)
            part = jnp.einsum("bgms,bgsk->bgmk", p.astype(v.dtype), at(v, j), preferred_element_type=jnp.float32)
            return out * fade[..., None] + part, new, total * fade + p.sum(-1)

        zero = lax.full_like(q, 0.0, jnp.float32, (B, G, M))
        start = lax.full_like(q, 0.0, jnp.float32, (B, G, M, K)), zero + FLOOR, zero
        out, top, total = lax.fori_loop(*keys_of(plan, hidden, i, nk), step, start)
        # A row that sees nothing: out is 0 already; +inf makes its weights 0 again in the backward pass.
        lse = jnp.where(total == 0, jnp.inf, top + jnp.log(jnp.where(total == 0, 1.0, total)))
        return None, ((out / jnp.where(total == 0, 1.0, total)[..., None]).astype(q.dtype), lse)

    return lax.scan(rows, None, jnp.arange(nq))[1]


def _forward_rule(plan: Plan, q, k, v, bias, hidden: Hidden):
    out, lse = _forward(plan, q, k, v, bias, hidden)
    return out, (q, k, v, bias, hidden, out, lse)


def _backward_rule(plan: Plan, saved, d_out):
    q, k, v, bias, hidden, out, lse = saved
    (nq, B, G, M, _), nk = q.shape, k.shape[0]
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)

    def columns(carry, j):
        kj, vj = at(k, j), at(v, j)

        def step(i, carry):
            dq, d_bias, dk, dv = carry
            qi, doi = at(q, i), at(d_out, i)
            raw, s = score(plan, hidden, qi, kj, bias, i, j)
            p = jnp.exp(s.reshape(B, G, M, plan.S) - at(lse, i)[..., None])
            dp = einsum("bgmk,bgsk->bgms", doi, vj)
            ds = p * (dp - at(delta, i)[..., None])
            if bias is not None:
                part = ds.reshape(raw.shape)
                now = slice_of(plan, d_bias, i, j)
                summed = tuple(a for a in range(5) if now.shape[a] < part.shape[a])
                d_bias = lax.dynamic_update_slice(d_bias, now + part.sum(summed, keepdims=True), corner(plan, bias, i, j))
            if plan.softcap is not None:
                ds = ds * (1 - jnp.square(raw.reshape(ds.shape) / plan.softcap))
            ds = (ds * plan.scale).astype(k.dtype)
            dq = lax.dynamic_update_index_in_dim(dq, at(dq, i) + einsum("bgms,bgsk->bgmk", ds, kj), i, 0)
            dk = dk + einsum("bgms,bgmk->bgsk", ds, qi)
            dv = dv + einsum("bgms,bgmk->bgsk", p.astype(v.dtype), doi)
            return dq, d_bias, dk, dv

        zero = jnp.zeros_like(kj, jnp.float32), jnp.zeros_like(vj, jnp.float32)
        dq, d_bias, dk, dv = lax.fori_loop(*queries_of(plan, hidden, j, nq), step, (*carry, *zero))
        return (dq, d_bias), (dk.astype(k.dtype), dv.astype(v.dtype))

    start = jnp.zeros_like(q, jnp.float32), None if bias is None else jnp.zeros_like(bias)
    (dq, d_bias), (dk, dv) = lax.scan(columns, start, jnp.arange(nk))
    return dq.astype(q.dtype), dk, dv, d_bias, None


_attend.defvjp(_forward_rule, _backward_rule)
