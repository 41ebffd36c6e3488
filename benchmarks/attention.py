"""`python -m benchmarks attention`: attention kernels in the axes of FlashAttention's and cuDNN's tables.

Of each kind of call, head size and length, at a constant number of tokens: TFLOP/s forward and backward, GB/s when
decoding, shares of the device's peak, memory, and the error against float32. `--on v5e h100` compiles the same calls
for hardware that is not here.
"""

from __future__ import annotations

import hashlib
import math
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax

from benchmarks import cells, counts, record
from benchmarks.cells import Cell
from benchmarks.elsewhere import compiled
from jaxmodels.errors import UserError, check_place
from jaxmodels.fields import Count, Section
from jaxmodels.models.kernels import kernel as kernels_of
from jaxmodels.parallel import hardware
from jaxmodels.parallel.platform import platform

COLUMNS = {
    "kind": "call", "K": "head dim", "T": "T", "shape": "batch × heads (of keys)", "pass": "pass", "kernel": "kernel",
    "auto": "auto",
}  # fmt: skip
MEASURED = {
    "ms": "ms", "tflops": "TFLOP/s", "gb_s": "GB/s", "share": "share of peak", "memory_mib": "memory, MiB",
    "error": "error", "why": "not measured, as it",
}  # fmt: skip
PLANNED = {
    "planned_ms": "ms (plan)", "tflops": "TFLOP/s (plan)", "binds": "bound by", "memory_mib": "memory, MiB (compiler)",
    "cycles": "cycles beside products (compiler)", "why": "remark",
}  # fmt: skip
STYLES = dict(
    zip(cells.KERNELS, zip(("#5b6770", "#d1495b", "#2e8b57", "#2a6fbb", "#8e5ea2"), "osD^v", strict=True), strict=True)
)
"""Colors and marks of kernels in the picture."""


@dataclass(frozen=True)
class Options(Section):
    """Which calls, and the kernels to compare. On a CPU the sizes are small, so that it ends in minutes."""

    calls: tuple[str, ...] = tuple(cells.KINDS)
    """Kinds of calls: causal, full, grouped (heads), window, segments, softcap, decode, decode grouped."""
    head_dims: tuple[Count, ...] = ()
    """Head sizes (K); by default 128, 64 and 256, on a CPU 64."""
    lengths: tuple[Count, ...] = ()
    """Sequence lengths (T); by default 512, 1024, and so on, to 32768, on a CPU 128, 256, 512 and 1024."""
    kernels: tuple[str, ...] = cells.KERNELS
    """Kernels, others as package.module:name; those that refuse or are not available are listed with the reason."""
    tokens: Count | None = None
    """Tokens of a batch at every length, which is the longest at least; by default 32768, on a CPU 4096."""
    width: Count | None = None
    """Heads times their size; by default 2048, on a CPU 384."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of q, k and v; by default bfloat16, on a CPU float32."""
    rounds: Count = 7
    """Timed rounds; kernels take turns in each."""
    on: tuple[str, ...] = ()
    """Hardware that is not here, such as v5e or h100: the calls are compiled for one device of each, and not run."""
    name: str = ""
    """Name of the result files; by default attention_<hardware>. What it has already is not measured again."""
    out: Path | None = None
    """Folder for the results; by default, benchmarks/results."""


def run(options: Options) -> list[dict[str, Any]]:
    """Measure what the record does not have yet, or compile for `--on`; print the table and return its rows.

    Raises:
        UserError: an option is wrong. Nothing has run by then.
    """
    record.check("kind of call", options.calls, cells.KINDS)
    for name in options.kernels:
        if ":" in name:
            kernels_of.kernel_of(name)
        else:
            record.check("kernel", [name], cells.KERNELS)
    for name in options.on:
        hardware.find(name)
    if options.name and len(options.on) > 1:
        raise UserError(f"got --name and {len(options.on)} kinds of hardware, expected one, try without --name")
    folder = options.out or record.RESULTS
    check_place(folder, "--out", folder=True)
    if options.on:
        return elsewhere(options, folder)
    found = table(options, platform() == "cpu")
    settings = {"rounds": options.rounds, "kernels": list(options.kernels)}
    base = basis(settings)
    stem = options.name or f"attention_{record.slug(base['hardware'])}"
    rows = record.kept(folder / f"{stem}.json", base, "attention")
    done = {row["key"] for row in rows}
    for number, cell in enumerate(found, 1):
        if cell.key in done:
            continue
        fresh = [{"base": base, "failure": "", **row} for row in cells.measure(cell, options.kernels, options.rounds)]
        rows += fresh
        for row in fresh:
            speed = f"{row['ms']:9.3f} ms" if "ms" in row else f"  {row['why']}"
            what = f"{cell.kind} K={cell.K} T={cell.T} {row['pass']:<9}{row['kernel']:<10}"
            print(f"[{number}/{len(found)}] {what}{speed}", flush=True)
        write(folder, stem, rows, f"Attention on {base['hardware']}", MEASURED, notes(options.rounds, rows))
    path = write(folder, stem, rows, f"Attention on {base['hardware']}", MEASURED, notes(options.rounds, rows), plot)
    print(path.read_text())
    return rows


def table(options: Options, small: bool) -> list[Cell]:
    """Return the cells in the order of worth; `small` are the defaults of a CPU.

    Raises:
        UserError: a head size does not divide the width, or a length is too short for its kind.
    """
    dims = options.head_dims or ((64,) if small else (128, 64, 256))
    lengths = options.lengths or ((128, 256, 512, 1024) if small else tuple(2**n for n in range(9, 16)))
    tokens, width = options.tokens or (4096 if small else 32768), options.width or (384 if small else 2048)
    dtype = options.dtype or ("float32" if small else "bfloat16")
    for K in dims:
        if width % K:
            raise UserError(
                f"got head size {K} and width {width}, expected a divisor, try --width {K * -(-width // K)}"
            )
    for T in lengths:
        if T % 8:
            raise UserError(f"got length {T}, expected a multiple of 8, try --lengths {-(-T // 8) * 8}")
    return [Cell(kind, K, T, tokens, width, dtype) for kind in options.calls for K in dims for T in lengths]


def basis(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what all rows of a record have in common: with another one of these, they are measured anew."""
    device, code = jax.devices()[0], hashlib.sha256()
    for path in (*sorted(Path(kernels_of.__file__).parent.glob("*.py")), Path(cells.__file__)):
        code.update(path.read_bytes())
    return {
        "hardware": record.processor() if device.platform == "cpu" else device.device_kind,
        "settings": dict(settings),
        "versions": record.versions(),
        "code": code.hexdigest()[:16],
    }


def elsewhere(options: Options, folder: Path) -> list[dict[str, Any]]:
    """Compile the cells for hardware that is not here, each in a process of its own, and write their records."""
    found = table(options, small=False)
    workers = max(1, min(len(options.on), (os.cpu_count() or 1) // 2))
    before, everything = dict(os.environ), []
    counts.prepare()
    try:
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            futures = {name: pool.submit(compiled, name, found, options.kernels) for name in options.on}
            for name, future in futures.items():
                rows = [row | rate(row) for row in future.result()]
                everything += rows
                stem = options.name or f"attention_{name}_compiled"
                print(write(folder, stem, rows, f"Attention compiled for {name}", PLANNED, PLAN_NOTES).read_text())
    finally:
        os.environ.clear()
        os.environ.update(before)
    return everything


def rate(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the TFLOP/s that a planned time means."""
    if "planned_ms" not in row or row["pass"] == cells.DECODE or row["planned_ms"] <= 0:
        return {}
    return {"tflops": row["flops"] / row["planned_ms"] / 1e9}


FORMULA = (
    "TFLOP/s: 4·B·H·K operations forward for each pair of a query and a key, 2.5 times as many backward "
    "(FlashAttention-2, section 4.1); pairs: T², causal half of it, of a window of W keys W·T - W²/2, of documents the "
    "sum of their causal squares"
)
PLAN_NOTES = (
    "nothing was run: each call was compiled for one device, and its time is the plan's (`jaxmodels plan`)",
    FORMULA,
    "backward: the program of both passes, less the forward pass",
    "cycles: what a TPU's compiler states for instructions that are no product; a kernel of its own states none",
)


def notes(rounds: int, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what a reader of the measured table has to know."""
    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    device = hardware.of_device(jax.devices()[0].device_kind)
    dtypes = sorted({row["call"]["dtype"] for row in rows})
    slower = cells.overtaken(rows)
    return [
        f"{', '.join(dtypes)}; ms: median of {rounds} rounds in which the kernels take turns, each with as many calls "
        f"as take {cells.SAMPLE * 1e3:g} ms; backward: forward and backward less forward, round by round",
        FORMULA,
        "decode: one query at the end of the cache; GB/s: bytes of the keys and values, which it reads once",
        *(f"{kind}: {what}" for kind, what in cells.KINDS.items() if any(row["kind"] == kind for row in rows)),
        "memory: the compiled program's temporary bytes, backward with the forward pass; error: largest difference "
        "from the `xla` kernel in float32 at highest precision (beyond 4,096 tokens from `blockwise`), as a share of "
        "its largest value, of the first row and head of keys",
        'auto: the kernel that `kernel="auto"` takes for this call'
        + (f"; slower by more than 5 %: {'; '.join(slower)}" if slower else ", which no other beats by more than 5 %"),
        f"peak: of {device.name}, {device.source}" if device else "the peak of this hardware is not known",
        *([f"device memory: at most {peak / 2**20:,.0f} MiB in use over the whole run"] if peak else []),
    ]


def write(
    folder: Path,
    stem: str,
    rows: Sequence[Mapping[str, Any]],
    title: str,
    columns: Mapping[str, str],
    about: Sequence[str],
    draw: Callable[[Any, Sequence[Mapping[str, Any]]], None] | None = None,
) -> Path:
    """Write the record; columns in which no row has anything are left out, and so are rows that say the same thing."""
    shown: dict[str, str] = {}
    absent = {name for name in {row["kernel"] for row in rows} if _everywhere(rows, name)}
    for row in rows:
        row["shape"] = f"{row['B']} × {row['H']} ({row['G']})"  # pyright: ignore[reportIndexIssue]
        if row["kernel"] in absent:
            shown[row["kernel"]] = row["why"]
    used = {**COLUMNS, **columns}
    used = {key: head for key, head in used.items() if any(row.get(key) is not None for row in rows)}
    listed = [row for row in rows if row["kernel"] not in absent]
    about = [*about, *(f"not measured: `{name}` {why}" for name, why in sorted(shown.items()))]
    draw = draw if any(row.get("ms", 0) > 0 for row in listed) else None
    return record.write(stem, title, rows, out=folder, notes=about, columns=used, plot=draw, listed=listed)


def _everywhere(rows: Sequence[Mapping[str, Any]], kernel: str) -> bool:
    """Whether a kernel is refused for one and the same reason in all rows."""
    mine = [row for row in rows if row["kernel"] == kernel]
    return len({row.get("why") for row in mine}) == 1 and mine[0].get("why") is not None


def plot(figure: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Plot the speed of causal calls forward and backward, and of decoding, at the first head size, over the length."""
    measured = [row for row in rows if row.get("ms", 0) > 0 and not row.get("why")]
    panels = []
    units = {"forward": ("tflops", "TFLOP/s"), "backward": ("tflops", "TFLOP/s"), "decode": ("gb_s", "GB/s")}
    for part, (key, unit) in units.items():
        mine = [row for row in measured if row["pass"] == part]
        if mine:
            kind, K = mine[0]["kind"], mine[0]["K"]
            mine = [row for row in mine if (row["kind"], row["K"]) == (kind, K)]
            panels.append((f"{kind}, {part}" if kind != part else kind, K, key, unit, mine))
    for ax, (name, K, key, unit, mine) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for kernel in dict.fromkeys(row["kernel"] for row in mine):
            points = sorted((row["T"], row[key]) for row in mine if row["kernel"] == kernel)
            color, mark = STYLES.get(kernel, ("#b8860b", "x"))
            ax.plot(*zip(*points, strict=True), marker=mark, color=color, label=kernel, linewidth=2)
        lengths = sorted({row["T"] for row in mine})
        ax.set(xscale="log", xlabel="T, tokens", ylabel=unit, title=f"{name}, head dim {K}", ylim=(0, None))
        ax.set_xticks(lengths, [f"{n:,}" if n < 2048 else f"{math.floor(n / 1024)}k" for n in lengths])
        ax.minorticks_off()
        ax.legend(frameon=False)
