"""Tokamax's attention: Pallas kernels on GPU and TPU where they fit, else its own XLA formulation."""

from __future__ import annotations

import importlib.util

import jax.numpy as jnp

from jaxmodels.models.kernels.kernel import EVERYTHING, Call, Kernel
from jaxmodels.models.kernels.visibility import full_mask, zero_blind


def attend(q, k, v, *, causal, window, segments, bias, scale, dropout, rng, softcap, q_offset, kv_length):
    """Attention by `tokamax.dot_product_attention`; segments and offsets become a mask in memory, (B, 1, T, S).

    Shapes: as `xla.attend`.
    """
    import tokamax
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["tokamax"])  # else it would parse this program's command line
    del dropout, rng  # never asked for: not among its features
    (B, T, H, _), S = q.shape, k.shape[1]
    seen = {"causal": causal, "window": window, "segments": segments, "kv_length": kv_length}
    options = {}
    if segments is None and kv_length is None and window is None and isinstance(q_offset, int) and q_offset == 0:
        options["is_causal"] = causal
    else:
        mask = full_mask(T, S, q_offset, **seen)
        options["mask"] = None if mask is None else jnp.broadcast_to(mask, (B, T, S))[:, None]
    if bias is not None:
        bias = jnp.broadcast_to(bias, (bias.shape[0], H, T, S)).astype(q.dtype)
    compute = tokamax.dot_product_attention  # pyright: ignore[reportAttributeAccessIssue]
    out = compute(q, k, v, bias, scale=scale, logits_soft_cap=softcap, **options)
    return zero_blind(out, S, q_offset, **seen)


def refuses(call: Call) -> str | None:
    """Refuse a bias with softcap: Tokamax caps the sum of scores and bias, the reference the scores alone."""
    return "does not support bias with softcap" if {"bias", "softcap"} <= call.features else None


def absent(platform: str) -> str | None:
    """Refuse a call where the package tokamax is not installed."""
    missing = importlib.util.find_spec("tokamax") is None
    return "needs the package tokamax, which is not installed" if missing else None


KERNEL = Kernel(attend, EVERYTHING - {"dropout"}, refuses=refuses, absent=absent)
