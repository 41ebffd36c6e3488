"""Ring attention: queries stay on their devices, and keys and values travel around the ring.

Each device holds a piece of every sequence. While it attends to the keys that it has, they are on their way to the next
device, so that communication overlaps computation; in the backward pass the gradients of keys and values travel with
them. A causal sequence is distributed in zigzag: of 2n chunks, device i takes i and 2n - 1 - i, so that all devices do
the same work. That costs two half-pieces of q, k, v and the output, sent once each; the ring itself sends n - 1 pieces
of k and v in the forward pass, and n of k, v and their float32 gradients in the backward pass.
Source: Liu et al. 2023; the zigzag, Llama team 2024, section 3.3.2.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxmodels.models.kernels import blockwise
from jaxmodels.models.kernels.blocks import Hidden, Plan
from jaxmodels.models.kernels.kernel import EVERYTHING, Call, Kernel, branch
from jaxmodels.models.kernels.looped import attended, cut, gradients, join, visited

Array = jax.Array


class Ring(NamedTuple):
    """The static arguments; `chunk` is the length of one of the chunks that a device holds."""

    plan: Plan
    axis: Any
    chunk: int

    def chunks(self, device: Any, n: int) -> tuple[Any, ...]:
        """The chunks that one of n devices holds, in the order in which it holds them."""
        return (device, 2 * n - 1 - device) if self.plan.causal else (device,)

    def sees(self, ahead: Any) -> Any:
        """Whether a chunk of queries sees any key of a chunk that begins `ahead` positions before it."""
        seen = ahead >= 0 if self.plan.causal else ahead == ahead
        return seen if self.plan.window is None else seen & (abs(ahead) - (self.chunk - 1) < self.plan.window)

    def send(self, x: Any) -> Any:
        """Send x to the next device; returns what the device before this one has sent."""
        n = lax.axis_size(self.axis)
        return lax.ppermute(x, self.axis, [(i, (i + 1) % n) for i in range(n)])


def attend(q, k, v, *, segments, bias, dropout, rng, q_offset, kv_length, axis=None, **how):
    """Attention around the mesh axis that tokens are sharded over; without such an axis, `blockwise`.

    Shapes: as `xla.attend`, of a device's own tokens.
    """
    if axis is None:
        rest = {"bias": bias, "dropout": dropout, "rng": rng, "q_offset": q_offset, "kv_length": kv_length}
        return blockwise.attend(q, k, v, segments=segments, **rest, **how)
    causal = how["causal"]
    if causal:
        dealt: Any = jax.tree.map(partial(deal, axis=axis), (q, k, v, segments))
        q, k, v, segments = dealt
    (B, T, H, K), G = q.shape, k.shape[2]
    chunk = T // (2 if causal else 1)
    size = blockwise.equal(chunk)
    ring = Ring(Plan(**how, Q=size, S=size), axis, chunk)
    q = q.reshape(B, T, G, H // G, K).transpose(0, 2, 3, 1, 4)
    k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))
    ids = (None, None) if segments is None else (blocks(ring, x, 1) for x in segments)
    parts: Any = around(ring, blocks(ring, q, 3), (blocks(ring, k, 2), blocks(ring, v, 2)), *ids)
    out = jnp.concatenate([join(x, 3)[:, :, :, :chunk] for x in parts], 3)
    out = out.transpose(0, 3, 1, 2, 4).reshape(B, T, H, K)
    return collect(out, axis) if causal else out


def _home(n: int) -> list[int]:
    """The device of each chunk, in zigzag."""
    return [min(c, 2 * n - 1 - c) for c in range(2 * n)]


def deal(x: Array, axis: Any) -> Array:
    """Exchange a device's chunks of (B, T, …), 2i and 2i + 1, for those of the zigzag, i and 2n - 1 - i."""
    home, odd = _home(lax.axis_size(axis)), lax.axis_index(axis) % 2 == 1
    # all even chunks go to different devices, and so do all odd ones
    a, b = (
        lax.ppermute(half, axis, list(enumerate(home[parity::2]))) for parity, half in enumerate(jnp.split(x, 2, 1))
    )
    return jnp.concatenate([jnp.where(odd, b, a), jnp.where(odd, a, b)], 1)


def collect(x: Array, axis: Any) -> Array:
    """Undo `deal`."""
    home, odd = _home(lax.axis_size(axis)), lax.axis_index(axis) % 2 == 1
    low, high = jnp.split(x, 2, 1)
    held = jnp.where(odd, high, low), jnp.where(odd, low, high)
    return jnp.concatenate(
        [lax.ppermute(x, axis, [(d, i) for i, d in enumerate(home[parity::2])]) for parity, x in enumerate(held)], 1
    )


def blocks(ring: Ring, x: Array, dimension: int) -> tuple[Array, ...]:
    """Split x into chunks, and each chunk into blocks."""
    parts = jnp.split(x, x.shape[dimension] // ring.chunk, dimension)
    return tuple(cut(part, dimension, -(-ring.chunk // ring.plan.Q), ring.plan.Q) for part in parts)


def pairs(ring: Ring, step: Any, q_segments: Any, kv_segments: Any):
    """For each pair of a chunk of queries and one of keys at a step: their numbers, whether any key is seen, the masks.

    At step r a device holds the keys of the r-th device before it.
    """
    n, i = lax.axis_size(ring.axis), lax.axis_index(ring.axis)
    C = ring.chunk
    length = None if C % ring.plan.S == 0 else jnp.full(1, C, jnp.int32)
    for a, mine in enumerate(ring.chunks(i, n)):
        for b, theirs in enumerate(ring.chunks((i - step) % n, n)):
            ahead = (mine - theirs) * C
            ids = (None, None) if q_segments is None else (q_segments[a], kv_segments[b])
            yield a, b, ring.sees(ahead), Hidden(ahead.reshape(1).astype(jnp.int32), length, *ids)


def work(ring: Ring, n: int, steps: Iterable[int]) -> dict[tuple[int, int], float]:
    """For each pair of chunks, the share of its blocks that the busiest of n devices computes in one of these steps.

    A compiler merges what is the same for several pairs, loops and their names included, but not the conditions around.
    """
    blocks, steps = -(-ring.chunk // ring.plan.Q), list(steps)
    all_of_them = max(len(steps), 1) * blocks**2
    count = functools.cache(functools.partial(visited, ring.plan, blocks, blocks))

    def of(i: int) -> dict[tuple[int, int], float]:
        found = {}
        for a, mine in enumerate(ring.chunks(i, n)):
            for b in range(len(ring.chunks(i, n))):
                distances = [(mine - ring.chunks((i - step) % n, n)[b]) * ring.chunk for step in steps]
                found[a, b] = sum(count(ahead) for ahead in distances if ring.sees(ahead)) / all_of_them
        return found

    return max(map(of, range(n)), key=lambda found: sum(found.values()))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def around(ring: Ring, q, kv, q_segments, kv_segments):
    """Outputs by chunk and block, from chunks and blocks of q, k and v. Shapes: as in `looped`."""
    return forward(ring, q, kv, q_segments, kv_segments)[0]


def forward(ring: Ring, q, kv, q_segments, kv_segments):
    n = lax.axis_size(ring.axis)

    def attend(carry, held, step, steps):
        (kv, ids), shares = held, work(ring, n, steps)
        carry = list(carry)
        for a, b, seen, hidden in pairs(ring, step, q_segments, ids):

            def add(carry, a=a, b=b, hidden=hidden):
                out, lse = attended(ring.plan, len(q[a]) ** 2, q[a], kv[0][b], kv[1][b], None, hidden, jnp.float32)
                return merge(carry, (out, jnp.where(lse == jnp.inf, -jnp.inf, lse)))

            with jax.named_scope(branch(shares[a, b])):
                carry[a] = lax.cond(seen, add, lambda carry: carry, carry[a])
        return tuple(carry)

    def step(carry, r):
        held, outs = carry
        coming = ring.send(held)
        return (coming, attend(outs, held, r, range(n - 1))), None

    start = tuple((lax.full_like(x, 0.0, jnp.float32), lax.full_like(x[..., 0], -jnp.inf, jnp.float32)) for x in q)
    (held, outs), _ = lax.scan(step, ((kv, kv_segments), start), jnp.arange(n - 1))
    outs = attend(outs, held, n - 1, [n - 1])
    out = tuple(out.astype(x.dtype) for (out, _), x in zip(outs, q, strict=True))
    lse = tuple(jnp.where(lse == -jnp.inf, jnp.inf, lse) for _, lse in outs)
    return out, (q, kv, q_segments, kv_segments, out, lse)


def merge(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    """Merge the outputs over two sets of keys; a log-sum-exp of -inf says that no key is seen."""
    lse = jnp.logaddexp(a[1], b[1])
    safe = jnp.where(lse == -jnp.inf, 0.0, lse)
    one, other = (out * jnp.exp(part - safe)[..., None] for out, part in (a, b))
    return one + other, lse


def backward(ring: Ring, saved: Any, d_out):
    q, kv, q_segments, kv_segments, out, lse = saved
    delta = tuple((d.astype(jnp.float32) * o.astype(jnp.float32)).sum(-1) for d, o in zip(d_out, out, strict=True))

    n = lax.axis_size(ring.axis)

    def pull(dq, d_kv, held, step, steps):
        ((k, v), ids), shares = held, work(ring, n, steps)
        dq, dk, dv = list(dq), list(d_kv[0]), list(d_kv[1])
        for a, b, seen, hidden in pairs(ring, step, q_segments, ids):

            def add(sums, a=a, b=b, hidden=hidden):
                given = q[a], k[b], v[b], None, hidden, lse[a], delta[a], d_out[a], jnp.float32
                parts = gradients(ring.plan, len(q[a]) ** 2, *given)
                return jax.tree.map(jnp.add, sums, parts[:3])

            with jax.named_scope(branch(shares[a, b])):
                dq[a], dk[b], dv[b] = lax.cond(seen, add, lambda sums: sums, (dq[a], dk[b], dv[b]))
        return tuple(dq), (tuple(dk), tuple(dv))

    def step(carry, r):
        held, dq, d_kv = carry
        # both are sent before this step's gradients are computed, so that neither waits for them
        coming, d_kv = ring.send((held, d_kv))
        dq, d_kv = pull(dq, d_kv, held, r, range(1, n))
        return (coming, dq, d_kv), None

    held = kv, kv_segments
    coming = ring.send(held)
    zeros: Any = jax.tree.map(lambda x: lax.full_like(x, 0.0, jnp.float32), (q, kv))
    dq, d_kv = pull(zeros[0], zeros[1], held, 0, [0])
    (_, dq, d_kv), _ = lax.scan(step, (coming, dq, d_kv), jnp.arange(1, n))
    cast: Any = jax.tree.map(lambda x, d: d.astype(x.dtype), (q, kv), (dq, ring.send(d_kv)))
    return *cast, None, None


around.defvjp(forward, backward)


FEATURES = EVERYTHING - {"bias", "dropout", "q_offset", "q_offset array", "kv_length"}
"""What it supports where tokens are sharded."""


def refuses(call: Call) -> str | None:
    """Refuse tokens that do not divide evenly among the devices, each of which has two chunks in a causal ring."""
    return uneven(call, call.pieces * (2 if "causal" in call.features else 1))


def uneven(call: Call, parts: int) -> str | None:
    """Say why a call's queries and keys cannot be cut into equal parts; None if they can."""
    if call.pieces == 1:
        return None
    if call.T != call.S:
        return f"needs as many queries as keys, got {call.T} and {call.S}"
    return f"needs a length that {parts} divides on this mesh, got {call.T}" if call.T % parts else None


def preferred(call: Call, platform: str, devices: int) -> str | None:
    """Wherever a mesh cuts tokens."""
    return f"the mesh cuts tokens into {call.pieces} pieces" if call.pieces > 1 else None


KERNEL = Kernel(
    attend,
    FEATURES,
    refuses=refuses,
    preferred=preferred,
    partition="tokens",
    uncut=blockwise.KERNEL.features,
)
