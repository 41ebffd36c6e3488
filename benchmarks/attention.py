"""Attention kernels over sequence lengths, forward and forward+backward."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from benchmarks import record
from jaxmodels.errors import UserError, nearest
from jaxmodels.models.attention import attention, choose, describe_call
from jaxmodels.models.kernels.kernel import BUILTIN, Call, kernel_of
from jaxmodels.parallel.platform import platform

Array = jax.Array


LOCAL = tuple(name for name in BUILTIN if name not in ("ring", "ulysses"))
"""The kernels that one device can run."""


@dataclass(frozen=True)
class Options:
    """Shapes, and the kernels to compare."""

    lengths: tuple[int, ...] = (128, 256, 512, 1024, 2048)
    """Sequence lengths (T); there are as many queries as keys."""
    kernels: tuple[str, ...] = LOCAL
    """Kernels; those that refuse or are not available are listed with the reason."""
    batch: int = 4
    """Examples (B)."""
    heads: int = 6
    """Heads of queries (H)."""
    kv_heads: int | None = None
    """Heads of keys and values (G); as many as of queries when not given."""
    head_dim: int = 64
    """Head size (K)."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of q, k and v."""
    causal: bool = True
    """Whether a query sees only earlier keys."""
    rounds: int = 7
    """Timed rounds; kernels take turns in each."""
    out: Path | None = None
    """Folder for the results; benchmarks/results when not given."""


def flops(options: Options, T: int, backward: bool) -> float:
    """Operations that attention needs: 2 products of 2·B·H·T²·K each, 5 more backward, half of it if causal.

    Source: Dao 2023, FlashAttention-2, section 4.1 (it counts 2.5 times forward for backward).
    """
    forward = 4 * options.batch * options.heads * T * T * options.head_dim * (0.5 if options.causal else 1.0)
    return forward * (3.5 if backward else 1.0)


def run(options: Options) -> Path:
    """Measure, write the results and print the table; return the table's path."""
    for name in options.kernels:
        if name not in LOCAL:
            raise UserError(f"got kernel {name!r}, expected some of {', '.join(LOCAL)}{nearest(name, LOCAL)}")
    if options.heads % (options.kv_heads or options.heads):
        raise UserError(f"got {options.heads} heads and {options.kv_heads} of keys, expected a divisor")
    rows, refused = [], {}
    for T in options.lengths:
        inputs = [jnp.asarray(x, options.dtype) for x in random_inputs(options, T)]
        call = call_of(options, inputs)
        taken = choose(platform(), call)[0]
        able = []
        for name in options.kernels:
            reason = absent_or_refused(name, call)
            if reason:
                refused[name] = reason
            else:
                able.append(name)
        for backward in (False, True):
            rows += measure(options, T, able, inputs, backward, taken)
            for row in rows[-len(able) :] if able else []:
                print(f"T={T:<6} {row['pass']:<17} {row['kernel']:<10} {row['ms']:9.2f} ms", flush=True)
    notes = [
        f"shapes: batch {options.batch}, {options.heads} heads of queries, {options.kv_heads or options.heads} of "
        f"keys, head size {options.head_dim}, {options.dtype}, {'causal' if options.causal else 'not causal'}",
        f"ms: median of {options.rounds} rounds in which the kernels take turns; TFLOP/s: 4·B·H·T²·K operations "
        "forward, 3.5 times as many forward+backward (FlashAttention-2, section 4.1)"
        + (", half of it as causal hides half" if options.causal else ""),
        "memory: the compiled program's temporary bytes; error: largest difference from the `xla` kernel in float32 "
        "at highest precision, as a share of its largest value (of output, or of the gradients)",
        'auto: the kernel that `kernel="auto"` takes for this shape',
        *device_memory(),
        *(f"not measured: `{name}` {reason}" for name, reason in refused.items()),
    ]
    if not rows:
        raise UserError("got no kernel that runs here, " + "; ".join(f"{n} {r}" for n, r in refused.items()))
    columns = {
        "T": "T",
        "pass": "pass",
        "kernel": "kernel",
        "auto": "auto",
        "ms": "ms",
        "tflops": "TFLOP/s",
        "memory_mib": "memory, MiB",
        "error": "error",
    }
    name = f"attention_{platform()}"
    path = record.write(
        name, f"Attention on {platform()}", rows, out=options.out, notes=notes, columns=columns, plot=plot
    )
    for kernel, reason in refused.items():
        print(f"not measured: {kernel} {reason}")
    print(f"wrote {path}")
    return path


def device_memory() -> list[str]:
    """Return the device's peak memory, where it records one (a CPU does not)."""
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return [f"device memory: at most {peak / 2**20:,.0f} MiB in use over the whole run"] if peak else []


def random_inputs(options: Options, T: int) -> list[Array]:
    """Return q, k, v and the output's gradient."""
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (options.heads, options.kv_heads or options.heads, options.kv_heads or options.heads, options.heads)
    return [jax.random.normal(key, (options.batch, T, n, options.head_dim)) for key, n in zip(keys, heads, strict=True)]


def call_of(options: Options, inputs: Sequence[Array]) -> Call:
    """Return the call that the kernels are asked to compute."""
    q, k = inputs[:2]
    asked: dict[str, Any] = {
        "causal": options.causal,
        "window": None,
        "dropout": 0.0,
        "softcap": None,
        "scale": options.head_dim**-0.5,
    }
    return describe_call({"q": q, "k": k, "segments": None, "bias": None, "q_offset": 0, "kv_length": None}, asked)


def absent_or_refused(name: str, call: Call) -> str | None:
    """Return why a kernel is not measured, or None."""
    if name == "splash" and platform() == "cpu":
        return "runs on TPU; on CPU it is only interpreted"
    return kernel_of(name).absence(platform()) or kernel_of(name).refusal(call)


def program(options: Options, kernel: str, backward: bool) -> Callable[..., Any]:
    """Return the function to time: from (q, k, v, d_out) to the output, or to the gradients of q, k and v."""

    def forward(q: Array, k: Array, v: Array) -> Array:
        return attention(q, k, v, causal=options.causal, kernel=kernel)

    def gradients(q: Array, k: Array, v: Array, d_out: Array) -> Any:
        return jax.vjp(forward, q, k, v)[1](d_out)

    return gradients if backward else lambda q, k, v, d_out: forward(q, k, v)


def measure(
    options: Options, T: int, kernels: Sequence[str], inputs: Sequence[Array], backward: bool, taken: str
) -> list[dict[str, Any]]:
    """Return one row per kernel."""
    exact = [x.astype(jnp.float32) for x in inputs]
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(program(options, "xla", backward))(*exact)
    compiled = {name: jax.jit(program(options, name, backward)).lower(*inputs).compile() for name in kernels}
    times = record.interleave({name: lambda f=f: f(*inputs) for name, f in compiled.items()}, options.rounds)
    rows = []
    for name, f in compiled.items():
        seconds = statistics.median(times[name])
        rows.append(
            {
                "T": T,
                "pass": "forward+backward" if backward else "forward",
                "kernel": name,
                "auto": "←" if name == taken else "",
                "ms": seconds * 1e3,
                "all_ms": [s * 1e3 for s in times[name]],
                "tflops": flops(options, T, backward) / seconds / 1e12,
                "memory_mib": temporary_bytes(f) / 2**20,
                "error": error(f(*inputs), expected),
            }
        )
    return rows


def temporary_bytes(compiled: Any) -> float:
    """Return the bytes of a program's temporaries; nan where the backend does not say."""
    analysis = compiled.memory_analysis()
    return float("nan") if analysis is None else analysis.temp_size_in_bytes


def error(got: Any, expected: Any) -> float:
    """Return the largest difference, as a share of the largest expected value, over all outputs."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    return max(float(jnp.abs(x.astype(jnp.float32) - y).max() / jnp.abs(y).max()) for x, y in pairs)


def plot(figure: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Plot the times of forward and forward+backward, and the memory, over the length."""
    kernels = [name for name in LOCAL if any(row["kernel"] == name for row in rows)]
    colors = dict(zip(LOCAL, ("#5b6770", "#d1495b", "#2e8b57", "#2a6fbb", "#8e5ea2"), strict=True))
    marks = dict(zip(LOCAL, "osD^v", strict=True))
    panels = [
        ("forward", "ms", "milliseconds"),
        ("forward+backward", "ms", "milliseconds"),
        ("forward+backward", "memory_mib", "temporary memory, MiB"),
    ]
    axes = figure.subplots(1, 3)
    for ax, (part, key, unit) in zip(axes, panels, strict=True):
        for name in kernels:
            points = [(row["T"], row[key]) for row in rows if row["kernel"] == name and row["pass"] == part]
            ax.plot(*zip(*points, strict=True), marker=marks[name], color=colors[name], label=name, linewidth=2)
        lengths = sorted({row["T"] for row in rows})
        ax.set(
            xscale="log",
            yscale="log",
            xlabel="sequence length, tokens",
            ylabel=unit,
            title=part if key == "ms" else "memory, " + part,
        )
        ax.set_xticks(lengths, [f"{n:,}" for n in lengths])
        ax.minorticks_off()
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes[0].legend(frameon=False)
