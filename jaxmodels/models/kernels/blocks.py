"""One block of attention, forward and backward; `unrolled` and `looped` combine blocks.

Dims: Q queries of a block, M = R·Q its rows, R heads of queries to a head of keys.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxmodels.models.kernels.visibility import visible

Array = jax.Array

einsum = partial(jnp.einsum, preferred_element_type=jnp.float32)


class Plan(NamedTuple):
    """The static arguments: Q and S are the lengths of blocks; offset is the first query's position, if known."""

    causal: bool
    window: int | None
    scale: float
    softcap: float | None
    Q: int
    S: int
    offset: int | None = None


class Hidden(NamedTuple):
    """Integers that decide what is visible: positions, the number of keys, segments (in blocks for `looped`)."""

    q_offset: Array
    kv_length: Array | None
    q_segments: Array | None
    kv_segments: Array | None


def score(plan: Plan, q, k, bias, t, s, segments, kv_length):
    """Scores of queries (B, G, R, Q, K) at t and keys (B, G, S, K) at s: before bias and mask, and after."""
    B, G, R, Q, K = q.shape
    x = einsum("bgmk,bgsk->bgms", q.reshape(B, G, R * Q, K), k) * plan.scale
    x = raw = x.reshape(B, G, R, Q, s.size)
    if plan.softcap is not None:
        x = raw = plan.softcap * jnp.tanh(x / plan.softcap)
    if bias is not None:
        x = x + bias
    mask = visible(t, s, causal=plan.causal, window=plan.window, segments=segments, kv_length=kv_length)
    return raw, x if mask is None else jnp.where(mask[:, None, None], x, -jnp.inf)


def normalize(top, total):
    """The divisor of a row and its log-sum-exp: 1 and inf where nothing is seen, so that the weights are 0."""
    safe = jnp.where(total == 0, 1.0, total)
    return safe, jnp.where(total == 0, jnp.inf, top + jnp.log(safe))


def pull(plan: Plan, q, k, v, d_out, delta, lse, raw, x):
    """Gradients of one block: of q, k, v and the biased scores."""
    B, G, R, Q, K = q.shape
    rows = B, G, R * Q
    p = jnp.exp(x - lse[..., None])
    dp = einsum("bgmk,bgsk->bgms", d_out.reshape(*rows, K), v).reshape(p.shape)
    dx = p * (dp - delta[..., None])
    ds = dx if plan.softcap is None else dx * (1 - jnp.square(raw / plan.softcap))
    ds = (ds * plan.scale).astype(k.dtype).reshape(*rows, -1)
    p = p.astype(v.dtype).reshape(*rows, -1)
    dq = einsum("bgms,bgsk->bgmk", ds, k).reshape(q.shape)
    dk = einsum("bgms,bgmk->bgsk", ds, q.reshape(*rows, K))
    return dq, dk, einsum("bgms,bgmk->bgsk", p, d_out.reshape(*rows, K)), dx


def fold(dx, shape):
    """Sum a gradient over the dimensions in which the bias was broadcast."""
    return dx.sum(tuple(a for a in range(5) if shape[a] < dx.shape[a]), keepdims=True)
