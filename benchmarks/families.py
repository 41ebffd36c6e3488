"""`python -m benchmarks families`: forward and train step of every family against its PyTorch reference."""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.sizes import SIZES
from benchmarks.step import Contestant, shim


@dataclass(frozen=True)
class Options:
    """Both sides take turns of a few applications and steps, so that a busy machine slows them equally."""

    only: tuple[str, ...] = ()
    """Families to run; all when not given."""
    against: tuple[str, ...] = ("torch", "torch-avx512")
    """torch: eager, as installed; torch-avx512: the same, with Intel MKL told that any CPU is Intel's."""
    rounds: int = 7
    """Turns of each side."""
    seconds: float = 0.5
    """Approximate seconds per turn."""
    name: str = "families_cpu"
    """Name of the result files."""
    out: Path | None = None
    """Folder for the results."""


def run(options: Options) -> None:
    """Measure, print and record the results."""
    record.check("family", options.only, SIZES)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        env = {"torch-avx512": {"LD_PRELOAD": str(shim(Path(folder)))}} if "torch-avx512" in options.against else {}
        for name in options.only or SIZES:
            sides = [
                Contestant(side, ["benchmarks.family", side, name], {**os.environ, **env.get(side, {})})
                for side in ("ours", *options.against)
            ]
            for kind in ("forward", "train"):
                rows.append({"family": name, "kind": kind, **measure(sides, kind, options)})
                print(record.markdown(rows[-1:], COLUMNS).splitlines()[-1], file=sys.stderr, flush=True)
            for side in sides:
                side.end()
            save(rows, options)
    print(save(rows, options).read_text())


def save(rows: list[dict[str, Any]], options: Options) -> Path:
    """Write a record of the measurements so far."""
    return record.write(
        options.name,
        "Families against PyTorch",
        rows,
        out=options.out,
        columns=COLUMNS,
        notes=[
            "references: transformers' models, or plain modules where it has none (benchmarks/peers/families.py)",
            "float32, sizes in benchmarks/sizes.py, AdamW, dropout off",
            "ratios are medians over rounds of the ratio within a round; sides ran in one process each, taking turns; "
            "above 1 is faster than PyTorch",
        ],
        plot=plot,
    )


COLUMNS = {
    "family": "family",
    "kind": "",
    "ms": "jaxmodels, ms",
    "torch_ms": "torch, ms",
    "ratio": "torch ÷ jaxmodels, time",
    "ratio_avx512": "torch with AVX-512 ÷ jaxmodels, time",
    "peak_mib": "peak memory of the process, MiB",
    "torch_mib": "torch's, MiB",
}


def measure(sides: list[Contestant], kind: str, options: Options) -> dict[str, Any]:
    """Return median times and ratios over the rounds."""
    counts = {}
    for side in sides:
        once = min(side.ask(f"{kind} 1")["seconds"] for _ in range(2))
        counts[side.name] = max(1, round(options.seconds / once))
    times: dict[str, list[float]] = {side.name: [] for side in sides}
    peaks: dict[str, float] = {}
    for number in range(options.rounds):
        # every other round backwards, so that nobody always follows the same neighbor
        for side in sides if number % 2 == 0 else sides[::-1]:
            turn = side.ask(f"{kind} {counts[side.name]}")
            times[side.name].append(turn["seconds"] / counts[side.name])
            peaks[side.name] = turn["peak_mib"]
    ours = times["ours"]
    found: dict[str, Any] = {"ms": 1e3 * statistics.median(ours), "peak_mib": peaks["ours"], "seconds": times}
    for side, key in (("torch", "ratio"), ("torch-avx512", "ratio_avx512")):
        if side in times:
            found[key] = statistics.median(b / a for a, b in zip(ours, times[side], strict=True))
    if "torch" in times:
        found |= {"torch_ms": 1e3 * statistics.median(times["torch"]), "torch_mib": peaks["torch"]}
    return found


def plot(figure: Any, rows: Any) -> None:
    for axes, kind in zip(figure.subplots(1, 2, sharey=True), ("forward", "train"), strict=True):
        chosen = [row for row in rows if row["kind"] == kind]
        names = [row["family"] for row in chosen]
        for offset, key, label, color in (
            (-0.2, "ratio", "as installed", "C0"),
            (0.2, "ratio_avx512", "AVX-512", "C1"),
        ):
            values = [row.get(key) or 0 for row in chosen]
            axes.barh([i + offset for i in range(len(names))], values, 0.38, label=label, color=color)
        axes.axvline(1, color="0.3", linewidth=1)
        axes.set_yticks(range(len(names)), names)
        axes.set_xlabel(f"{kind}: PyTorch's time ÷ jaxmodels', above 1 is faster")
        axes.grid(axis="y", visible=False)
        axes.set_ylim(len(names) - 0.4, -0.6)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, title="PyTorch")
