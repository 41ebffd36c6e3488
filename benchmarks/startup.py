"""`python -m benchmarks startup`: the time before anything trains."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks import record

COMMANDS = {
    "import jax, flax.linen": ["-c", "import jax, flax.linen"],
    "import jaxmodels": ["-c", "import jaxmodels"],
    "a mistyped option": ["-m", "jaxmodels", "train", "configs/gpt_stdlib.py", "--optim.peek-lr", "3"],
    "jaxmodels --help": ["-m", "jaxmodels", "--help"],
}


@dataclass(frozen=True)
class Options:
    """Commands take turns, each in its own process."""

    rounds: int = 15
    """Turns of each command."""
    out: Path | None = None
    """Folder for the results."""


def run(options: Options) -> None:
    """Measure, print and record the results."""
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for number in range(options.rounds + 1):
        for name, arguments in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *arguments], cwd=record.ROOT, capture_output=True, check=False)
            if number:  # the first turn fills the file cache
                times[name].append(time.perf_counter() - start)
    base = times["import jax, flax.linen"]
    rows = [
        {
            "what": name,
            "seconds": statistics.median(seconds),
            "ratio": statistics.median(a / b for a, b in zip(seconds, base, strict=True)),
        }
        for name, seconds in times.items()
    ]
    columns = {"what": "command", "seconds": "seconds (median)", "ratio": "÷ import jax, flax.linen (median of rounds)"}
    print(record.write("startup", "Time to start", rows, out=options.out, columns=columns).read_text())
