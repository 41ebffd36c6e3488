"""`python -m benchmarks data`: tokens/s of training on real data ÷ on synthetic batches, through the whole loop."""

from __future__ import annotations

import shlex
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from benchmarks import record
from benchmarks.step import enter


@dataclass(frozen=True)
class Options:
    """Two processes train the same model in turns, one on the config's data and one on synthetic batches."""

    config: Annotated[str, tyro.conf.Positional] = "configs/gpt_stdlib.py"
    """Config file."""
    override: str = ""
    """Fields of the config, as on the command line."""
    rounds: int = 10
    """Turns of each process."""
    steps: int = 20
    """Steps per turn."""
    out: Path | None = None
    """Folder for the results."""


def run(options: Options) -> None:
    """Measure, print and record the result."""
    fields = [options.config, *shlex.split(options.override)]
    with tempfile.TemporaryDirectory() as folder:
        real = enter("engine", fields, Path(folder))
        synthetic = enter("engine", [*fields, "--data", "synthetic"], Path(folder))
        for contestant in (real, synthetic):
            contestant.ask(str(options.steps))  # warm
        for number in range(options.rounds):
            for contestant in (real, synthetic) if number % 2 == 0 else (synthetic, real):
                contestant.ask(str(options.steps))
        for contestant in (real, synthetic):
            contestant.end()
    ratios = [b["seconds"] / a["seconds"] for a, b in zip(real.turns[1:], synthetic.turns[1:], strict=True)]
    rows = [
        {
            "data": name,
            "seconds": statistics.median(t["seconds"] for t in c.turns[1:]) / options.steps,
            "ratio": statistics.median(ratios) if c is real else 1.0,
        }
        for name, c in (("real", real), ("synthetic", synthetic))
    ]
    path = record.write(
        f"data_{Path(options.config).stem}",
        f"Real against synthetic data, {Path(options.config).stem}",
        rows,
        out=options.out,
        columns={
            "data": "data",
            "seconds": "seconds a step (median)",
            "ratio": "throughput ÷ synthetic (median of rounds)",
        },
    )
    print(path.read_text())
