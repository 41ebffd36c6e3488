"""Check that a run that is killed, stopped, damaged or out of disk ends with the bits of an undisturbed one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import record
from jaxmodels.errors import UserError

# all that a state can hold changes: dropout uses the key, the average lags behind the parameters
OVERRIDES = (
    "--model.dropout 0.1 --train.ema 0.99 --metrics.every 1 --metrics.progress plain --eval.batches 4 "
    "--checkpoint.keep 3"
).split()
PATIENCE = 600.0  # seconds that a run may be silent


@dataclass(frozen=True)
class Options:
    """The config to run, and how often it is killed."""

    config: str = "configs/gpt_stdlib.py"
    """The config to train."""
    steps: int = 240
    """Steps of each run; a checkpoint every 12th part, an evaluation every 6th."""
    kills: int = 10
    """Times that one run is killed (kill -9)."""
    seed: int = 0
    """Seed for the moments of the kills."""
    out: Path | None = None
    """Folder for the results; by default, benchmarks/results."""


class Run:
    """A run directory, and the processes that work on it one after another."""

    def __init__(self, name: str, folder: Path, options: Options):
        self.name, self.folder, self.log = name, folder / "run", folder / "output.txt"
        self.every = max(1, options.steps // 12)
        self.command = [
            sys.executable,
            "-m",
            "jaxmodels",
            "train",
            options.config,
            "--run-dir",
            str(self.folder),
            "--train.steps",
            str(options.steps),
            "--checkpoint.every",
            str(self.every),
            "--eval.every",
            str(2 * self.every),
            *OVERRIDES,
        ]
        # a cache of its own: a kill may come while a compiled program is being written to it
        self.environment = {
            **os.environ,
            "JAX_COMPILATION_CACHE_DIR": str(folder / "xla"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self.rows: list[dict[str, Any]] = []
        self.claims: list[tuple[str, bool]] = []
        self.spoiled: set[str] = set()

    def start(self) -> None:
        self.began = time.perf_counter()
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                self.command, cwd=record.ROOT, env=self.environment, stdout=file, stderr=subprocess.STDOUT
            )

    def wait(self, until: Callable[[], Any], what: str) -> bool:
        """Wait for something to be so; False: the process ended before."""
        begun = time.perf_counter()
        while not until():
            if self.process.poll() is not None:
                return bool(until())
            if time.perf_counter() - begun > PATIENCE:
                self.process.kill()
                raise RuntimeError(f"{self.name}: no {what} in {PATIENCE:.0f} s\n{self.output()[-2000:]}")
            time.sleep(0.002)
        return True

    def end(self, what: str, number: signal.Signals | None = None) -> dict[str, Any]:
        """Send a signal, if any, wait for the end, look at every checkpoint, and note it all."""
        if number is not None:
            self.process.send_signal(number)
        self.wait(lambda: self.process.poll() is not None, "end")
        resumed = re.search(r"resumed at step (\d+)", self.output())
        good, bad = self.checkpoints()
        self.rows.append(
            {
                "run": self.name,
                "what": what,
                "after_s": time.perf_counter() - self.began,
                "code": self.process.returncode,
                "from": int(resumed[1]) if resumed else 0 if self.step() else None,
                "step": self.step() or None,
                "checkpoints": " ".join(map(str, good)) or "none yet",
                "unreadable": "; ".join(bad) or "none",
                "unfinished": " ".join(p.name for p in self.numbered(r"\d+\.\w+")) or "none",
            }
        )
        print("  ".join(f"{name}={value}" for name, value in self.rows[-1].items()), flush=True)
        return self.rows[-1]

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def step(self) -> int:
        """The last step that this process printed."""
        found = re.findall(r"^step (\d+)/", self.output(), re.MULTILINE)
        return int(found[-1]) if found else 0

    def numbered(self, pattern: str = r"\d+") -> list[Path]:
        found = [path for path in self.folder.glob("checkpoints/*") if re.fullmatch(pattern, path.name)]
        return sorted(found, key=lambda path: int(path.name.split(".")[0]))

    def checkpoints(self) -> tuple[list[int], list[str]]:
        """Steps of the complete checkpoints, and what is wrong with those that only look so (by no doing of ours)."""
        from jaxmodels.train.manifest import Damaged, verify

        good, bad = [], []
        for path in self.numbered():
            try:
                verify(path, lambda tree: None)
                good.append(int(path.name))
            except (Damaged, OSError) as error:
                if path.name not in self.spoiled:
                    bad.append(str(error))
        return good, bad

    def metrics(self) -> list[dict[str, float]]:
        """Return the rows of metrics.jsonl without timings."""
        rows = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return [{name: row[name] for name in sorted(row) if not name.startswith("perf/")} for row in rows]


def run(options: Options) -> Path:
    """Disturb runs, compare them with one left alone, write the results; returns the table's path.

    Raises:
        UserError: too few steps to disturb.
        SystemExit: a claim does not hold.
    """
    if options.steps < 24 or options.kills < 1:
        raise UserError(f"got {options.steps} steps and {options.kills} kills, expected at least 24 and 1")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # this process only reads checkpoints
    skipped = []
    with tempfile.TemporaryDirectory(prefix="resume-") as scratch, contextlib.ExitStack() as stack:

        def make(name: str) -> Run:
            folder = Path(scratch) / name.replace(" ", "-")
            folder.mkdir()
            return Run(name, folder, options)

        whole = make("left alone")
        times = leave(whole)
        runs = [
            kill(make("killed"), options, times),
            stop(make("told to stop"), options),
            damage(make("damaged"), options),
        ]
        full = make("disk full")
        size = sum(path.stat().st_size for path in whole.numbered()[-1].rglob("*"))
        if refused := mount(full.folder.parent / "disk", 8 * size + 2**22, stack):
            skipped.append(f"not run: disk full ({refused})")
        else:
            runs.append(fill(full, size))
        claims = [*compare(options, whole, runs), *(claim for each in runs for claim in each.claims)]
    for claim, holds in claims:
        print(f"{'holds' if holds else 'FAILS'}: {claim}")
    notes = [
        *(f"{'holds' if holds else '**FAILS**'}: {claim}" for claim, holds in claims),
        *skipped,
        f"setting: `{options.config}`, {options.steps} steps, a checkpoint of {size / 1e6:.1f} MB every "
        f"{whole.every}, an evaluation every {2 * whole.every}, dropout and a moving average of the parameters on"
        f"; moments drawn with seed {options.seed}, spread over start, compilation, steps and saves",
    ]
    columns = {
        "run": "run",
        "what": "what happened",
        "after_s": "s after start",
        "code": "exit code",
        "from": "began at step",
        "step": "printed step",
        "checkpoints": "checkpoints, all files verified",
        "unreadable": "unreadable",
        "unfinished": "left unfinished",
    }
    rows = [row for each in (whole, *runs) for row in each.rows]
    path = record.write("resume", "Kill and resume", rows, out=options.out, notes=notes, columns=columns)
    print(f"wrote {path}")
    if not all(holds for _, holds in claims):
        raise SystemExit(1)
    return path


def leave(run: Run) -> dict[str, float]:
    """Train an undisturbed run; return the seconds that its phases took."""
    run.start()
    run.wait(lambda: "run:  " in run.output(), "description")
    described = time.perf_counter() - run.began
    run.wait(run.step, "first step")
    times = {"start": described, "compile": time.perf_counter() - run.began - described, "step": 0.2, "save": 0.3}
    run.end("nothing")
    return times


def kill(run: Run, options: Options, times: dict[str, float]) -> Run:
    """Kill a run at random moments, then let it finish."""
    rng = random.Random(options.seed)
    # the first one during the only compilation that is not cached
    kinds = [("compile", "save", "step", "start", "save", "step")[i % 6] for i in range(options.kills)]
    kinds[1:] = rng.sample(kinds[1:], len(kinds) - 1)
    for i, kind in enumerate(kinds):
        aim = min(int((i + rng.random()) / options.kills * options.steps) + 1, options.steps - run.every)
        run.start()
        if kind == "compile":
            run.wait(lambda: "run:  " in run.output(), "description")
        elif kind != "start":
            run.wait(lambda aim=aim: run.step() >= aim, f"step {aim}")
        if kind == "save":
            run.wait(lambda: run.numbered(r"\d+\.saving"), "save")
        moment, early = time.perf_counter() + rng.random() * times[kind], kind in ("start", "compile")
        run.wait(lambda at=moment, early=early: time.perf_counter() > at or (early and run.step()), "moment")
        run.end(f"kill -9, {kind}", signal.SIGKILL)
    run.start()
    run.end("finished")
    codes = [row["code"] for row in run.rows]
    run.claims.append(
        (
            f"the run was killed {options.kills} times and then finished",
            codes == [-signal.SIGKILL] * options.kills + [0],
        )
    )
    return run


def stop(run: Run, options: Options) -> Run:
    """Stop a run by SIGTERM, then by Ctrl-C."""
    for number, share in ((signal.SIGTERM, 0.3), (signal.SIGINT, 0.6)):
        run.start()
        run.wait(lambda share=share: run.step() >= share * options.steps, "step")
        row = run.end(signal.Signals(number).name, number)
        saved = run.checkpoints()[0]
        run.claims.append(
            (
                f"{row['what']}: exit code 75, saved where it was (step {saved[-1]})",
                row["code"] == 75 and row["step"] == saved[-1],
            )
        )
    run.start()
    run.end("finished")
    return run


def damage(run: Run, options: Options) -> Run:
    """Flip one bit of the newest checkpoint; later, truncate one of its files."""
    for how, share in ((flip, 0.4), (cut, 0.7)):
        run.start()
        run.wait(lambda share=share: run.step() >= share * options.steps, "step")
        run.end("kill -9", signal.SIGKILL)
        *_, before, newest = run.numbered()
        run.spoiled.add(newest.name)
        how(max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size))
        run.start()
        run.wait(run.step, "first step")
        row = run.end(f"{how.__doc__} in {newest.name}, then kill -9", signal.SIGKILL)
        printed = f"CHECKPOINT DAMAGED: step {newest.name}" in run.output()
        run.claims.append(
            (
                f"{how.__doc__}: detected, said, step {before.name} used instead of {newest.name}",
                printed and row["from"] == int(before.name),
            )
        )
    run.start()
    run.end("finished")
    return run


def flip(path: Path) -> None:
    """one flipped bit"""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    """one truncated file"""
    os.truncate(path, path.stat().st_size // 2)


def fill(run: Run, size: int) -> Run:
    """Fill the run directory's disk after the first checkpoints, then make room and go on."""
    disk = run.folder = run.folder.parent / "disk" / "run"
    ballast = disk.parent / "ballast"
    run.command[run.command.index("--run-dir") + 1] = str(disk)
    run.start()
    run.wait(lambda: len(run.numbered()) > 1, "two checkpoints")
    run.process.send_signal(signal.SIGSTOP)
    free = shutil.disk_usage(disk).free
    with contextlib.suppress(OSError):
        ballast.write_bytes(bytes(max(0, free - size // 2)))
    run.process.send_signal(signal.SIGCONT)
    run.wait(lambda: "NOT saved" in run.output(), "failed save")
    row = run.end("disk full")
    good, bad = run.checkpoints()
    printed = re.search(r"error: checkpoint of step \d+ NOT saved: No space left on device", run.output())
    run.claims.append(
        (
            f"disk full: said, exit code 1, the last good checkpoint (step {good[-1] if good else None}) survives",
            bool(printed and good and not bad and row["code"] == 1),
        )
    )
    ballast.unlink()
    run.start()
    run.end("room made, finished")
    return run


def mount(folder: Path, size: int, stack: contextlib.ExitStack) -> str:
    """Mount a small disk; return the reason if that is not possible."""
    folder.mkdir()
    if sys.platform != "linux" or os.geteuid():
        return "a tmpfs of its own needs root on Linux"
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if done.returncode:
        return " ".join(done.stderr.split())
    stack.callback(subprocess.run, ["umount", "-l", folder], check=True)
    return ""


def compare(options: Options, whole: Run, runs: Sequence[Run]) -> list[tuple[str, bool]]:
    """Return the claims on all disturbed runs beside the undisturbed one, and whether each holds."""
    expected, metrics = bits(whole, options), whole.metrics()
    names = ", ".join(run.name for run in runs)
    rows = [row for run in runs for row in run.rows]
    looked = sum(len(re.findall(r"\d+", row["checkpoints"])) for row in rows)
    digest = hashlib.sha256("".join(expected.values()).encode()).hexdigest()
    return [
        (
            f"the final state ({len(expected)} arrays, sha256 {digest[:16]}) equals bit by bit in {names}",
            all(bits(run, options) == expected for run in runs),
        ),
        (
            f"no checkpoint was ever unreadable, but for two spoiled on purpose: {looked} looked at after {len(rows)} "
            "ends, every file hashed",
            all(row["unreadable"] == "none" for row in rows),
        ),
        (
            f"metrics.jsonl has each of the {options.steps} steps once",
            all([row["step"] for row in run.metrics()] == list(range(1, options.steps + 1)) for run in (whole, *runs)),
        ),
        (
            f"and the same values in every run ({sum('eval/loss' in row for row in metrics)} evaluations)",
            all(run.metrics() == metrics for run in runs),
        ),
    ]


def bits(run: Run, options: Options) -> dict[str, str]:
    """Return a hash of every array of the final checkpoint."""
    from jaxmodels import config as configs
    from jaxmodels.train.checkpoint import Checkpointer
    from jaxmodels.train.job import assemble

    layout = assemble(configs.read(run.folder)[0]).layout
    found = Checkpointer(run.folder / "checkpoints").restore(layout)
    if found is None or found[2] != options.steps:
        return {}
    return {
        jax.tree_util.keystr(path): hashlib.sha256(raw(leaf).tobytes()).hexdigest()
        for path, leaf in jax.tree_util.tree_leaves_with_path(found[0])
    }


def raw(leaf: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)
