"""`python -m benchmarks weights`: time and memory of importing and exporting a model."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import record
from jaxmodels.errors import UserError
from jaxmodels.hf import save
from jaxmodels.models.families import create
from jaxmodels.models.llama import LlamaConfig

_SMALL = LlamaConfig(vocab_size=97, layers=1, heads=2, width=16, mlp_width=32)
# the peak of resident memory, which only the process itself can tell from that of the one that started it
_RUN = """
import sys
from jaxmodels.cli import main
code = main(sys.argv[1:])
print("peak", open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
raise SystemExit(code)
"""


@dataclass(frozen=True)
class Options:
    """The model to import and export; needs Linux, which reports a process's peak memory."""

    gigabytes: float = 1.0
    """Size of the model's parameters in float32."""
    rounds: int = 3
    """Number of turns of each command."""
    out: Path | None = None
    """Folder for the results; by default, benchmarks/results."""


def model_of(size: float) -> LlamaConfig:
    """Return the config of a LLaMA of about so many bytes."""
    block = LlamaConfig(vocab_size=32000, layers=1, heads=8, kv_heads=2, width=1024, mlp_width=2816, tied=True)
    one, two = (4 * create(block, layers=n).count() for n in (1, 2))
    return LlamaConfig(**{**block.__dict__, "layers": max(1, round((size - one) / (two - one)) + 1)})


def write(config: LlamaConfig, folder: Path) -> int:
    """Write a checkpoint of random weights, and return its bytes."""
    model = create(config)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32), model.shapes())
    folder.mkdir()
    save.save_pretrained(folder, model, params)
    return 4 * model.count()


def measure(*arguments: str) -> tuple[float, int]:
    """Return the seconds and peak resident bytes of a command in its own process."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", _RUN, *arguments], cwd=record.ROOT, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        raise UserError(f"got exit code {done.returncode} of jaxmodels {' '.join(arguments)}: {done.stderr[-500:]}")
    return seconds, 1024 * int(done.stdout.split("peak")[-1])


def run(options: Options) -> None:
    """Measure, print and record the results."""
    rows: list[dict[str, Any]] = []
    found: dict[tuple[str, str], list[tuple[float, int]]] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        sizes = {"small": write(_SMALL, folder / "small")}
        sizes["large"] = write(model_of(options.gigabytes * 1e9), folder / "large")
        for turn in range(options.rounds):
            for name in ("small", "large"):
                run, out = folder / f"{name}-run{turn}", folder / f"{name}-out{turn}"
                for command, arguments in (
                    ("import", ("import", str(folder / name), "--out", str(run))),
                    ("export", ("export", str(run), str(out))),
                ):
                    found.setdefault((command, name), []).append(measure(*arguments))
                for path in (run, out):
                    shutil.rmtree(path)
    for command in ("import", "export"):
        small, large = found[command, "small"], found[command, "large"]
        seconds, base = min(s for s, _ in large), min(peak for _, peak in small)
        rows.append(
            {
                "command": f"jaxmodels {command}",
                "size": sizes["large"] / 1e9,
                "seconds": seconds,
                "start": min(s for s, _ in small),
                "rate": sizes["large"] / 1e9 / max(seconds - min(s for s, _ in small), 1e-9),
                "memory": (max(peak for _, peak in large) - base) / sizes["large"],
            }
        )
    columns = {
        "command": "command",
        "size": "model, GB",
        "seconds": "seconds (best of rounds)",
        "start": "of which a tiny model takes",
        "rate": "GB/s beyond that",
        "memory": "peak memory above a tiny model's ÷ model",
    }
    notes = (
        "files are read from and written to the page cache where it has room",
        "import writes a checkpoint with a hash of each file and flushes it to the disk; export flushes too",
    )
    title = "Weights in and out of Hugging Face's format"
    print(record.write("weights", title, rows, out=options.out, columns=columns, notes=notes).read_text())
