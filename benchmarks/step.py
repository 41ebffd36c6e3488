"""`python -m benchmarks step`: tokens/s of a config through the engine, a bare jitted step, and in other frameworks."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks import record
from jaxmodels.commands.options import NoOptions, configured
from jaxmodels.errors import UserError, nearest


@dataclass(frozen=True)
class Options:
    """Contestants take turns of a few steps, so that a busy machine slows all of them equally."""

    config: Annotated[str, tyro.conf.Positional] = "configs/gpt_peers.py"
    """Config file."""
    against: tuple[str, ...] = ("bare",)
    """What the engine is compared with: bare (the same step under jax.jit), linen (Flax's stock layers and Optax),
    torch (eager), torch-avx512 (the same, with Intel MKL told that any CPU is Intel's)."""
    override: str = ""
    """Fields of the config, as on the command line: --override='--model.vocab-size 50304'."""
    rounds: int = 5
    """Turns of each contestant."""
    steps: int = 5
    """Steps per turn."""
    name: str = ""
    """Name of the result files; by default, step_<config>."""
    out: Path | None = None
    """Folder for the results."""


class Contestant:
    """A worker process that runs steps on demand: `command` is its module and arguments, `tree` where it runs."""

    def __init__(self, name: str, command: list[str], env: Mapping[str, str], tree: Path | None = None) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
            cwd=tree,
        )
        self.name = name
        self.ready = self.read()
        self.turns: list[dict[str, float]] = []

    def read(self) -> dict[str, float]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"contestant {self.name} ended with {self.process.wait()}")

    def ask(self, line: str) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        self.turns.append(self.read())
        return self.turns[-1]

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


def enter(name: str, arguments: list[str], folder: Path, tree: Path | None = None) -> Contestant:
    """Return a contestant of `benchmarks.worker`, by the code of this tree or of another."""
    env = {**os.environ, "BENCHMARK_BORN": str(time.time())}
    if tree is not None:
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(tree), os.environ.get("PYTHONPATH"))))
    if name == "torch-avx512":
        env["LD_PRELOAD"] = str(shim(folder))
    return Contestant(name, ["benchmarks.worker", name, *arguments], env, tree)


def shim(folder: Path) -> Path:
    """A library that answers MKL's question for an Intel CPU with yes; else MKL leaves AVX-512 unused on others."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise UserError("got contestant torch-avx512, expected a C compiler to build its shim, try torch")
    source, library = folder / "shim.c", folder / "shim.so"
    source.write_text("int mkl_serv_intel_cpu_true(void) { return 1; }\n")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    return library


def run(options: Options) -> None:
    """Measure, print and record the results."""
    from benchmarks.worker import CONTESTANTS

    for name in options.against:
        if name not in CONTESTANTS:
            raise UserError(
                f"got contestant {name!r}, expected one of {', '.join(CONTESTANTS)}{nearest(name, CONTESTANTS)}"
            )
    arguments = [options.config, *shlex.split(options.override)]
    cfg, _ = configured(arguments, "python -m benchmarks step", NoOptions)
    with tempfile.TemporaryDirectory() as folder:
        everyone = [enter(name, arguments, Path(folder)) for name in ("engine", *options.against)]
        for contestant in everyone:
            contestant.ask("1")  # warm
        for number in range(options.rounds):
            # every other round backwards, so that nobody always follows the same neighbor
            for contestant in everyone if number % 2 == 0 else everyone[::-1]:
                contestant.ask(str(options.steps))
        for contestant in everyone:
            contestant.end()
    rows = summarize(everyone, cfg.data.batch_size * cfg.data.seq_len, options.steps)
    stem = options.name or f"step_{Path(options.config).stem}"
    title = f"Training step of {Path(options.config).stem}" + (f" with {options.override}" if options.override else "")
    path = record.write(
        stem,
        title,
        rows,
        out=options.out,
        columns={
            "name": "contestant",
            "tokens_per_second": "tokens/s (median)",
            "ratio": "engine ÷ this, tokens/s",
            "ratio_cpu": "this ÷ engine, CPU seconds a step",
            "first_step": "first step after start, s",
            "peak_mib": "peak memory, MiB",
        },
        notes=[
            "the ratio is the median over rounds of the ratio within a round; contestants ran at the same time in one "
            "process each, taking turns"
        ],
        plot=plot,
    )
    print(path.read_text())


def summarize(everyone: list[Contestant], tokens: int, steps: int) -> list[dict[str, Any]]:
    """Return one row per contestant."""
    engine = everyone[0]
    rows = []
    for contestant in everyone:
        turns = contestant.turns[1:]
        ratios = [b["seconds"] / a["seconds"] for a, b in zip(engine.turns[1:], turns, strict=True)]
        cpu = statistics.median(t["cpu"] for t in turns) / statistics.median(t["cpu"] for t in engine.turns[1:])
        rows.append(
            {
                "name": contestant.name,
                "tokens_per_second": tokens * steps / statistics.median(t["seconds"] for t in turns),
                "ratio": statistics.median(ratios),
                "ratio_cpu": cpu,
                "first_step": contestant.ready["first_step"],
                "peak_mib": turns[-1]["peak_mib"],
                "seconds": [t["seconds"] for t in turns],
            }
        )
    return rows


def plot(figure: Any, rows: Any) -> None:
    axes = figure.subplots()
    names = [row["name"] for row in rows]
    bars = axes.barh(names, [row["tokens_per_second"] for row in rows], color=["C0"] + ["0.7"] * (len(rows) - 1))
    axes.bar_label(bars, [f"{row['tokens_per_second']:,.0f}" for row in rows], padding=4)
    axes.invert_yaxis()
    axes.set_xlabel("tokens/s (median over rounds)")
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.12)
