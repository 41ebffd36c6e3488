"""cuDNN's fused attention on NVIDIA GPUs, through jax.nn."""

from __future__ import annotations

import importlib.util
from typing import Literal

import jax
import jax.numpy as jnp

from jaxmodels.models.kernels.kernel import EVERYTHING, Call, Kernel
from jaxmodels.models.kernels.visibility import full_mask, zero_blind

HOPPER = (9, 0)
"""The compute capability from which on heads may be larger than 128."""


def attend(
    q,
    k,
    v,
    *,
    causal,
    window,
    segments,
    bias,
    scale,
    dropout,
    rng,
    softcap,
    q_offset,
    kv_length,
    implementation: Literal["cudnn", "xla"] = "cudnn",
):
    """Attention by cuDNN; segments and offsets become a mask in memory, (B, 1, T, S).

    Shapes: as `xla.attend`.
    """
    del dropout, rng, softcap  # never asked for: not among its features
    (B, T, H, _), S = q.shape, k.shape[1]
    seen = {"causal": causal, "window": window, "segments": segments, "kv_length": kv_length}
    options = {}
    # JAX gives no gradients of odd lengths: one query more, which is dropped, and one key more, which none sees
    rows, columns = T % 2, S % 2
    q, k, v = (_lengthen(x, more) for x, more in ((q, rows), (k, columns), (v, columns)))
    if segments is not None or not isinstance(q_offset, int) or q_offset:
        mask = full_mask(T, S, q_offset, **seen)
        if mask is None and columns:
            mask = jnp.ones((1, T, S), bool)
        if mask is not None:
            mask = jnp.pad(jnp.broadcast_to(mask, (B, T, S)), ((0, 0), (0, 0), (0, columns)))[:, None]
            # an added query sees what the last one sees: one that sees nothing has no gradient
            options["mask"] = jnp.pad(mask, ((0, 0), (0, 0), (0, rows), (0, 0)), mode="edge")
    else:
        options["is_causal"] = causal
        options["local_window_size"] = None if window is None else (window - 1, 0)
        if kv_length is None and columns and not (causal and T <= S):
            kv_length = S
        if kv_length is not None:
            # At least one key, so that no row divides by zero: `zero_blind` clears those that have none.
            options["key_value_seq_lengths"] = jnp.broadcast_to(jnp.maximum(kv_length, 1), (B,))
    if bias is not None:
        bias = jnp.broadcast_to(bias, (bias.shape[0], H, T, S)).astype(q.dtype)
    out = jax.nn.dot_product_attention(q, k, v, bias, scale=scale, implementation=implementation, **options)
    return zero_blind(out[:, :T], S, q_offset, **seen)


def _lengthen(x, more):
    return jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0))) if more else x


def refuses(call: Call) -> str | None:
    """Refuse types and shapes that cuDNN does not support."""
    if call.dtype not in ("bfloat16", "float16"):
        return f"needs bfloat16 or float16, got {call.dtype}"
    most, where = (256, "") if call.capability >= HOPPER else (128, " on GPUs before Hopper")
    size = call.K
    if size % 8 or size > most:
        return f"needs a head size that 8 divides, up to {most}{where}, got {size}"
    if "bias" in call.features and (call.T % 2 or call.S % 2):
        return f"needs even lengths with a bias, got {call.T} and {call.S}"
    return None


def absent(platform: str) -> str | None:
    """cuDNN comes with JAX's plugin for NVIDIA GPUs."""
    if not any(map(importlib.util.find_spec, ("jax_cuda12_plugin", "jax_cuda13_plugin"))):
        return "needs JAX's CUDA plugin, which is not installed"
    return None


def preferred(call: Call, platform: str, devices: int) -> str | None:
    """Wherever there are GPUs."""
    return "the fused kernel of gpu" if platform == "gpu" else None


KERNEL = Kernel(
    attend,
    EVERYTHING - {"two-sided window", "dropout", "softcap", "float32"},
    refuses=refuses,
    absent=absent,
    preferred=preferred,
)
