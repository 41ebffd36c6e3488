"""Splash attention: JAX's Pallas kernel for TPUs, which skips blocks that the mask hides."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxmodels.models.kernels.kernel import EVERYTHING, Attend, Call, Choose, Kernel
from jaxmodels.models.kernels.visibility import zero_blind
from jaxmodels.parallel.platform import platform

LANES = 128
"""Block sizes are multiples of this many positions."""
PADDING = jnp.iinfo(jnp.int32).min
"""Segment id of the keys beyond `kv_length`."""


def attend(
    q, k, v, *, causal, window, segments, bias, scale, dropout, rng, softcap, q_offset, kv_length, interpret=False
):
    """Attention by the Pallas kernel; causality and window are compiled in, the keys' length becomes a segment.

    Shapes: as `xla.attend`.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    del bias, dropout, rng  # never asked for: not among its features
    (B, T, H, _), S = q.shape, k.shape[1]
    seen = {"causal": causal, "window": window, "segments": segments, "kv_length": kv_length}
    if window is not None:
        sides = (window - 1, 0 if causal else window - 1)
        mask = splash.LocalMask((T, S), sides, q_offset)
    else:
        mask = splash.CausalMask((T, S), q_offset) if causal else splash.FullMask((T, S))
    if segments is None and kv_length is not None:
        segments = jnp.zeros((B, T), jnp.int32), jnp.zeros((B, S), jnp.int32)
    if segments is not None:
        ids = segments[1].astype(jnp.int32)
        if kv_length is not None:
            ids = jnp.where(jnp.arange(S) < kv_length[:, None], ids, PADDING)
        segments = splash.SegmentIds(segments[0].astype(jnp.int32), ids)
    bq, bk = block_length(T), block_length(S)
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask] * H),
        block_sizes=splash.BlockSizes(bq, bk, bk, bq, bk, bk, bq, bk),
        attn_logits_soft_cap=softcap,
        interpret=interpret,
    )
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)
    heads_first = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
    out: jax.Array = jax.vmap(kernel)(*heads_first, segments)  # pyright: ignore[reportAssignmentType]
    return zero_blind(out.transpose(0, 2, 1, 3), S, q_offset, **seen)


def block_length(n: int) -> int:
    """The longest block that divides n and fits the kernel's scratch memory."""
    return next(size for size in (512, 384, 256, LANES) if n % size == 0)


def bind(call: Call, choose: Choose) -> Attend:
    """Interpreted where there is no TPU to compile for."""
    return functools.partial(attend, interpret=platform() == "cpu")


def refuses(call: Call) -> str | None:
    """Refuse lengths that blocks do not divide, and queries without a key at their own position."""
    if call.T % LANES or call.S % LANES:
        return f"needs lengths that {LANES} divides, got {call.T} and {call.S}"
    windowed = call.features & {"window", "two-sided window"}
    if call.offset < 0 or (windowed and call.T + call.offset > call.S):
        return "needs a key at each query's own position"
    return None


def absent(platform: str) -> str | None:
    """Refuse other platforms than TPUs, for which Pallas compiles it, and CPUs, on which it is interpreted."""
    return None if platform in ("tpu", "cpu") else f"runs on TPU (and, interpreted, on CPU), got {platform}"


def preferred(call: Call, platform: str, devices: int) -> str | None:
    """Wherever there are TPUs."""
    return "the fused kernel of tpu" if platform == "tpu" else None


KERNEL = Kernel(
    attend,
    EVERYTHING - {"bias", "dropout", "q_offset array"},
    refuses=refuses,
    absent=absent,
    preferred=preferred,
    bind=bind,
)
