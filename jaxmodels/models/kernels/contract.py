"""Which kernel computes what: each kernel equals `xla`, the reference, or refuses the call by name."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import NamedTuple

FEATURES: Mapping[str, str] = {
    "causal": "a query sees no later key",
    "window": "causal, and only the last `window` keys",
    "two-sided window": "`window` without `causal`: keys nearer than `window` on either side",
    "segment_ids": "a query sees only keys of its own segment",
    "bias": "added to the scores, with its gradient",
    "scale": "a scale other than 1/sqrt(K)",
    "grouped heads": "fewer heads of keys than of queries",
    "dropout": "of the attention weights",
    "softcap": "scores as softcap·tanh(scores/softcap)",
    "q_offset": "the first query's position as an integer",
    "q_offset array": "the first query's position as an array, one an example or for all",
    "kv_length": "the number of valid keys",
    "float32": "inputs in float32 (all kernels take bfloat16)",
}
"""What a call can ask for, beside plain attention in bfloat16."""

EVERYTHING = frozenset(FEATURES)

CONTRACT: Mapping[str, frozenset[str]] = {
    "xla": EVERYTHING,
    "blockwise": EVERYTHING - {"dropout"},
    "cudnn": EVERYTHING - {"two-sided window", "dropout", "softcap", "float32"},
    "splash": EVERYTHING - {"bias", "dropout", "q_offset array"},
    "tokamax": EVERYTHING - {"dropout"},
}
"""Kernel -> features it supports; the reference first."""

ACROSS: Mapping[str, frozenset[str]] = {
    "ring": EVERYTHING - {"bias", "dropout", "q_offset", "q_offset array", "kv_length"},
    "ulysses": EVERYTHING - {"bias", "dropout", "q_offset", "q_offset array", "kv_length"},
}
"""The same of kernels that join devices with other tokens; where there are none, they take what `blockwise` takes."""

KERNELS: Mapping[str, frozenset[str]] = {**CONTRACT, **ACROSS}

CONFLICTS: Mapping[str, frozenset[frozenset[str]]] = {
    # tokamax caps the sum of scores and bias, the reference caps the scores alone.
    "tokamax": frozenset({frozenset({"bias", "softcap"})}),
}
"""Kernel -> pairs of features that it supports singly but not together."""

LANES = 128
"""Splash's blocks are multiples of so many positions."""


class Call(NamedTuple):
    """What a kernel is chosen by: the dims of q (B, T, H, K) and k (B, S, G, K), and the features asked for."""

    B: int
    T: int
    S: int
    H: int
    G: int
    K: int
    dtype: str = "float32"
    features: frozenset[str] = frozenset()
    offset: int = 0
    pieces: int = 1
    """Into how many pieces the mesh cuts tokens."""
    shares: int = 1
    """Into how many shares the mesh cuts heads."""


def refusal(kernel: str, call: Call) -> str | None:
    """Why a kernel cannot compute a call, or None if it can."""
    if kernel in ACROSS and call.pieces == 1:
        kernel = "blockwise"  # or another that takes at least as much
    missing = [name for name in FEATURES if name in call.features - KERNELS[kernel]]
    if missing:
        return f"does not support {', '.join(missing)}"
    for pair in CONFLICTS.get(kernel, ()):
        if pair <= call.features:
            return f"does not support {' with '.join(sorted(pair))}"
    if kernel == "cudnn":
        if call.dtype not in ("bfloat16", "float16"):
            return f"needs bfloat16 or float16, got {call.dtype}"
        if call.K % 8 or call.K > 256:
            return f"needs a head size that 8 divides, up to 256, got {call.K}"
        if "bias" in call.features and (call.T % 2 or call.S % 2):
            return f"needs even lengths with a bias, got {call.T} and {call.S}"
    if kernel == "splash":
        if call.T % LANES or call.S % LANES:
            return f"needs lengths that {LANES} divides, got {call.T} and {call.S}"
        windowed = call.features & {"window", "two-sided window"}
        if call.offset < 0 or (windowed and call.T + call.offset > call.S):
            return "needs a key at each query's own position"
    if kernel in ACROSS and call.pieces > 1:
        # a causal ring's devices hold two chunks each
        parts = call.pieces * (2 if kernel == "ring" and "causal" in call.features else 1)
        if call.T != call.S:
            return f"needs as many queries as keys, got {call.T} and {call.S}"
        if call.T % parts:
            return f"needs a length that {parts} divides on this mesh, got {call.T}"
        if kernel == "ulysses" and call.H % (call.pieces * call.shares):
            return f"needs heads that {call.pieces * call.shares} divides on this mesh, got {call.H}"
    return None


def absence(kernel: str, platform: str) -> str | None:
    """Why a kernel cannot run here, or None if it can."""
    if kernel == "tokamax" and importlib.util.find_spec("tokamax") is None:
        return "needs the package tokamax, which is not installed"
    if kernel == "cudnn" and not any(map(importlib.util.find_spec, ("jax_cuda12_plugin", "jax_cuda13_plugin"))):
        return "needs JAX's CUDA plugin, which is not installed"
    if kernel == "splash" and platform not in ("tpu", "cpu"):
        return f"runs on TPU (and, interpreted, on CPU), got {platform}"
    return None


def table() -> str:
    """The contract as a Markdown table."""
    lines = ["| feature | " + " | ".join(KERNELS) + " |", "| --- |" + " :-: |" * len(KERNELS)]
    for name, meaning in FEATURES.items():
        cells = ["yes" if name in supported else "–" for supported in KERNELS.values()]
        lines.append(f"| **{name}**: {meaning} | " + " | ".join(cells) + " |")
    for kernel, pairs in CONFLICTS.items():
        lines += ["", *(f"`{kernel}` refuses {' with '.join(sorted(pair))}." for pair in pairs)]
    return "\n".join(lines)
