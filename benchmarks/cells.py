"""Cells of the attention table: a call of attention, what it has to compute, and how it is timed.

Dims: B batch, T tokens, H heads of queries, G heads of keys, K head size.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import record
from jaxmodels.errors import UserError
from jaxmodels.models.attention import attention, choose, describe_call
from jaxmodels.models.kernels.kernel import BUILTIN, Call, kernel_of
from jaxmodels.parallel.platform import platform

Array = jax.Array
KERNELS = tuple(name for name in BUILTIN if name not in ("ring", "ulysses"))
"""The kernels that one device can run."""
KINDS = {
    "causal": "a query sees no later key",
    "full": "every query sees every key",
    "grouped": "causal, 8 heads of queries for each of keys",
    "window": "causal, and the last T/4 keys alone, 1,024 at most",
    "segments": "causal, four documents in a row, of 1/2, 1/4, 1/8 and 1/8 of its tokens",
    "softcap": "causal, scores capped at 50",
    "decode": "one query at the end of a cache of T keys",
    "decode grouped": "the same, 8 heads of queries for each of keys",
}
FORWARD, BACKWARD, DECODE = "forward", "backward", "decode"
GROUP, CAP, DOCUMENTS = 8, 50.0, (2, 4, 8, 8)
EXACT = 4096
"""The most tokens for which the error is against `xla`; beyond, its scores would fill a device."""
SAMPLE = 0.005
"""Least seconds of a timed sample: it has as many calls in a row as they take."""


@dataclass(frozen=True)
class Cell:
    """A call: of which kind, and its shapes."""

    kind: str
    K: int
    T: int
    tokens: int
    """Tokens of the batch, or of the caches."""
    width: int
    """H·K."""
    dtype: str

    @property
    def B(self) -> int:
        return max(1, self.tokens // self.T)

    @property
    def H(self) -> int:
        return max(1, self.width // self.K)

    @property
    def G(self) -> int:
        return max(1, self.H // GROUP) if self.kind.endswith("grouped") else self.H

    @property
    def decodes(self) -> bool:
        return self.kind.startswith("decode")

    @property
    def passes(self) -> tuple[str, ...]:
        return (DECODE,) if self.decodes else (FORWARD, BACKWARD)

    @property
    def key(self) -> str:
        """What tells a cell from others in a record."""
        return f"{self.kind} K={self.K} T={self.T} tokens={self.tokens} width={self.width} {self.dtype}"

    @property
    def window(self) -> int | None:
        return min(1024, self.T // 4) if self.kind == "window" else None

    def pairs(self) -> float:
        """Pairs of a query and a key that are seen in a row and head; a causal square has half of its pairs.

        Source: Dao 2023, FlashAttention-2, section 4.1.
        """
        if self.decodes:
            return self.T
        if self.window is not None:
            return self.window * self.T - self.window**2 / 2
        if self.kind == "segments":
            return sum((self.T // part) ** 2 for part in DOCUMENTS) / 2
        return self.T**2 / (1 if self.kind == "full" else 2)

    def flops(self, part: str) -> float:
        """FLOPs that a pass needs: two products forward, five backward, of 2·K for each pair of each row and head."""
        return 4 * self.B * self.H * self.K * self.pairs() * (2.5 if part == BACKWARD else 1.0)

    def bytes(self) -> float:
        """Bytes of keys and values, which decoding reads once."""
        return 2 * self.B * self.T * self.G * self.K * jnp.dtype(self.dtype).itemsize

    def shapes(self) -> dict[str, Any]:
        """Shapes of q, k, v and the output's gradient, and of what the kind asks for besides."""
        queries = (self.B, 1 if self.decodes else self.T, self.H, self.K)
        keys = (self.B, self.T, self.G, self.K)
        found = {"q": queries, "k": keys, "v": keys, "d_out": queries}
        arrays = {name: jax.ShapeDtypeStruct(shape, self.dtype) for name, shape in found.items()}
        if self.kind == "segments":
            arrays["segment_ids"] = jax.ShapeDtypeStruct((self.B, self.T), jnp.int32)
        if self.decodes:
            arrays["length"] = jax.ShapeDtypeStruct((self.B,), jnp.int32)
        return arrays

    def arrays(self) -> dict[str, Array]:
        """Random arrays of these shapes."""
        found = {}
        for number, (name, each) in enumerate(self.shapes().items()):
            if name == "segment_ids":
                parts = [self.T // part for part in DOCUMENTS]
                found[name] = jnp.asarray(np.tile(np.repeat(np.arange(1, len(parts) + 1), parts), (self.B, 1)), "int32")
            elif name == "length":
                found[name] = jnp.full((self.B,), self.T, jnp.int32)
            else:
                key = jax.random.fold_in(jax.random.key(0), number)
                found[name] = jax.jit(jax.random.normal, static_argnums=(1, 2))(key, each.shape, each.dtype)
        return found

    def options(self) -> dict[str, Any]:
        """Options of `attention`."""
        return {
            "causal": self.kind != "full",
            "window": self.window,
            "softcap": CAP if self.kind == "softcap" else None,
        }

    def call(self) -> Call:
        """The call, as kernels are chosen by it."""
        at = self.shapes()
        segments = None if "segment_ids" not in at else (at["segment_ids"], at["segment_ids"])
        arrays = {name: at[name] for name in "qk"} | {"segments": segments, "bias": None}
        arrays |= {"q_offset": at.get("length", 0), "kv_length": at.get("length")}
        return describe_call(arrays, {**self.options(), "dropout": 0.0, "scale": 1 / math.sqrt(self.K)})

    def program(self, kernel: str, part: str) -> Callable[..., Any]:
        """The function from the arrays to the output or, of the backward pass, to the gradients of q, k and v.

        The gradients' program has the forward pass in it.
        """

        def forward(q: Array, k: Array, v: Array, extra: Mapping[str, Array]) -> Array:
            more: dict[str, Any] = {}
            if "segment_ids" in extra:
                more["segment_ids"] = extra["segment_ids"]
            if "length" in extra:
                more |= {"q_offset": extra["length"] - 1, "kv_length": extra["length"]}
            return attention(q, k, v, kernel=kernel, **self.options(), **more)

        def whole(q: Array, k: Array, v: Array, d_out: Array, **extra: Array) -> Any:
            if part != BACKWARD:
                return forward(q, k, v, extra)
            return jax.vjp(lambda q, k, v: forward(q, k, v, extra), q, k, v)[1](d_out)

        return lambda arrays: whole(**arrays)


def blocked(name: str, call: Call) -> str | None:
    """Why a kernel is not measured on this call here, or None."""
    if name == "splash" and platform() == "cpu":
        return "runs on TPU; on CPU it is only interpreted"
    return kernel_of(name).absence(platform()) or kernel_of(name).refusal(call)


def row(cell: Cell, part: str, kernel: str, call: Call, taken: str) -> dict[str, Any]:
    """What a row of the table says before anything is measured."""
    features = sorted(call.features)
    return {
        "key": cell.key, "kind": cell.kind, "K": cell.K, "T": cell.T, "B": cell.B, "H": cell.H, "G": cell.G,
        "pass": part, "kernel": kernel, "auto": "←" if kernel == taken else "", "flops": cell.flops(part),
        "platform": platform(), "call": {**call._asdict(), "features": features},
    }  # fmt: skip


def measure(cell: Cell, kernels: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """Time the kernels on a cell, in turns, and compare each with float32; one that cannot says why.

    Returns a row for each kernel and pass; the backward pass is forward and backward less forward, round by round.
    """
    rows, fns = _rows(cell, kernels)
    if fns:
        calls = _calls(fns)
        turns = record.interleave({str(key): _repeat(fn, calls[key]) for key, fn in fns.items()}, rounds)
        times = {key: [seconds / calls[key] for seconds in turns[str(key)]] for key in fns}
        for found in rows:
            key = found["kernel"], found["pass"]
            if key in times and found["pass"] == BACKWARD:  # its program has the forward pass in it
                both = zip(times[key], times[found["kernel"], FORWARD], strict=True)
                found |= speeds(cell, BACKWARD, [whole - forward for whole, forward in both])
            elif key in times:
                found |= speeds(cell, found["pass"], times[key])
    return rows


def parity(cell: Cell, kernels: Sequence[str]) -> list[dict[str, Any]]:
    """Run each kernel once on a cell; return rows with the error against float32, or why there is none."""
    return _rows(cell, kernels)[0]


def _rows(cell: Cell, kernels: Sequence[str]) -> tuple[list[dict[str, Any]], dict[tuple[str, str], Callable[[], Any]]]:
    """Return a cell's rows, without times, and what there is to be timed."""
    call = cell.call()
    taken = choose(platform(), call)[0]
    rows: list[dict[str, Any]] = []
    fns: dict[tuple[str, str], Callable[[], Any]] = {}
    arrays, expected = cell.arrays(), {}
    for name in kernels:
        why = blocked(name, call)
        for part in cell.passes:
            found = row(cell, part, name, call, taken)
            rows.append(found)
            if why is None:
                why = _prepare(cell, name, part, arrays, expected, found, fns)
            if why is not None:
                found["why"] = why
    return rows, fns


def _prepare(
    cell: Cell,
    name: str,
    part: str,
    arrays: dict[str, Array],
    expected: dict[str, Any],
    found: dict[str, Any],
    fns: dict[tuple[str, str], Callable[[], Any]],
) -> str | None:
    """Compile a kernel's pass, run it once, and add its memory, its error and its function; or say what went wrong."""
    try:
        fn = jax.jit(cell.program(name, part)).lower(arrays).compile()
        analysis = fn.memory_analysis()
        if analysis is not None:
            found["memory_mib"] = analysis.temp_size_in_bytes / 2**20
            if found["memory_mib"] > (room := _room()):
                return f"needs {found['memory_mib'] / 1024:.3g} GiB of {room / 1024:.3g}"
        out = fn(arrays)
        if part not in expected:
            expected[part] = reference(cell, part, arrays)
        found["error"] = error([_share(x, cell) for x in jax.tree.leaves(out)], expected[part])
    except jax.errors.JaxRuntimeError as failure:
        message = " ".join(str(failure).split())
        return "out of memory" if "RESOURCE_EXHAUSTED" in message else f"failed: {message[:160]}"
    fns[name, part] = lambda: fn(arrays)
    return None


def _room() -> float:
    """MiB that a program's temporaries may take: nine tenths of the device, half of the memory beside a CPU."""
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit is not None:
        return 0.9 * limit / 2**20
    import os

    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2 / 2**20


def _repeat(fn: Callable[[], Any], calls: int) -> Callable[[], Any]:
    """Return what calls a function so often without waiting in between, as a model's layers do."""

    def several() -> Any:
        out = None
        for _ in range(calls):
            out = fn()
        return out

    return several


def _calls(fns: Mapping[tuple[str, str], Callable[[], Any]]) -> dict[tuple[str, str], int]:
    """How many calls make a sample that is long enough."""
    first = record.interleave({str(key): fn for key, fn in fns.items()}, 2)
    return {key: max(1, min(200, math.ceil(SAMPLE / min(first[str(key)])))) for key in fns}


def speeds(cell: Cell, part: str, seconds: Sequence[float]) -> dict[str, Any]:
    """Milliseconds, TFLOP/s or GB/s, and the share of this device's peak where that is known."""
    median = statistics.median(seconds)
    found: dict[str, Any] = {"ms": median * 1e3, "all_ms": [each * 1e3 for each in seconds]}
    if median <= 0:  # less than the noise of the clock
        return {**found, "why": "too short to be timed"}
    from jaxmodels.parallel import hardware

    device = hardware.of_device(jax.devices()[0].device_kind)
    if cell.decodes:
        rate, peak, name = cell.bytes() / median, device and device.bandwidth, "gb_s"
        found[name] = rate / 1e9
    else:
        rate, peak, name = cell.flops(part) / median, device and device.flops.get(cell.dtype), "tflops"
        found[name] = rate / 1e12
    return found | ({"share": rate / peak} if peak else {})


def reference(cell: Cell, part: str, arrays: Mapping[str, Array]) -> list[Array]:
    """What float32 gives at highest precision, of the first row and the first head of keys with its queries.

    By the reference kernel, and beyond `EXACT` tokens by `blockwise`, whose memory is linear in the length.
    """
    given = {name: _share(x, cell) for name, x in arrays.items()}
    exact = {name: x.astype(jnp.float32) if x.ndim == 4 else x for name, x in given.items()}
    with jax.default_matmul_precision("highest"):
        out = jax.jit(cell.program("xla" if cell.T <= EXACT or cell.decodes else "blockwise", part))(exact)
    return jax.tree.leaves(out)


def _share(x: Array, cell: Cell) -> Array:
    """The first row of an array and, where it has heads, the first of keys or those of queries that go with it."""
    if x.ndim != 4:
        return x[:1]
    return x[:1, :, : max(1, x.shape[2] // cell.G)]


def error(got: Any, expected: Any) -> float:
    """Return the largest difference, as a share of the largest expected value, over all outputs."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    return max(float(jnp.abs(x.astype(jnp.float32) - y).max() / jnp.abs(y).max()) for x, y in pairs)


def overtaken(rows: Sequence[Mapping[str, Any]], most: float = 1.05) -> list[str]:
    """Say where `auto`, as it chooses now, takes a kernel that is slower than another by a record, by more than 5 %.

    Raises:
        UserError: a row does not say of which call it is.
    """
    found, cells = [], {}
    for each in rows:
        if each.get("ms", 0) > 0 and not each.get("why"):
            if "call" not in each:
                raise UserError("got a row without its call, expected a record of benchmarks attention")
            cells.setdefault((each.get("key", each["T"]), each["pass"]), []).append(each)
    for (key, part), measured in cells.items():
        recorded = measured[0]["call"]
        taken, _ = choose(measured[0]["platform"], Call(**{**recorded, "features": frozenset(recorded["features"]),
                                                            "capability": tuple(recorded["capability"])}))  # fmt: skip
        mine = next((each["ms"] for each in measured if each["kernel"] == taken), None)
        best = min(measured, key=lambda each: each["ms"])
        if mine is not None and mine > most * best["ms"]:
            found.append(
                f"{key}, {part}: auto takes {taken}, {mine:.3g} ms, and {best['kernel']} takes {best['ms']:.3g} ms"
            )
    return found
