"""cuDNN's fused attention on NVIDIA GPUs, through jax.nn."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from jaxmodels.models.kernels.visibility import full_mask, zero_blind


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
    del dropout, rng, softcap  # refused by the contract
    (B, T, H, _), S = q.shape, k.shape[1]
    seen = {"causal": causal, "window": window, "segments": segments, "kv_length": kv_length}
    options = {}
    if segments is not None or not isinstance(q_offset, int) or q_offset:
        mask = full_mask(T, S, q_offset, **seen)
        options["mask"] = None if mask is None else jnp.broadcast_to(mask, (B, T, S))[:, None]
    else:
        options["is_causal"] = causal
        options["local_window_size"] = None if window is None else (window - 1, 0)
        if kv_length is not None:
            # At least one key, so that no row divides by zero: `zero_blind` clears those that have none.
            options["key_value_seq_lengths"] = jnp.broadcast_to(jnp.maximum(kv_length, 1), (B,))
    if bias is not None:
        bias = jnp.broadcast_to(bias, (bias.shape[0], H, T, S)).astype(q.dtype)
    out = jax.nn.dot_product_attention(q, k, v, bias, scale=scale, implementation=implementation, **options)
    return zero_blind(out, S, q_offset, **seen)
