"""Faults at random on a job of two SLURM nodes: each is named, and the job ends with the bits of one left alone."""

from __future__ import annotations

import contextlib
import itertools
import random
import signal
import statistics
import subprocess
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import hosts, record, slurm
from benchmarks.injured import EVERY, PACE, Job, prepare
from benchmarks.injury import SLOWER
from benchmarks.strikes import IN_TIME, KINDS, LASTING, LOSSES, STOPS, strike
from jaxmodels.errors import UserError
from jaxmodels.plan.failures import Failures
from jaxmodels.report import goodput
from jaxmodels.train import phases


@dataclass(frozen=True)
class Options:
    """How many faults, and which."""

    faults: int = 100
    """Faults, in rounds of all kinds in a random order."""
    jobs: int = 2
    """Jobs that are injured at the same time, each on a SLURM of its own, since most of a fault is waiting."""
    kinds: tuple[str, ...] = KINDS
    """Kinds to draw from."""
    mean: float = 6.0
    """Seconds of training between faults, on average; exponential, as real ones are."""
    seed: int = 0
    """Decides kinds, ranks and moments."""
    out: Path | None = None
    """Folder for the results; by default, benchmarks/results."""


@dataclass
class Trial:
    """What became of one job."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    saved: int = 0
    """Steps when it was told to stop."""
    same: bool | None = None
    """It had the bits of one that was left alone; None: it was not compared."""
    left: list[str] = field(default_factory=list)
    """Processes that it left behind."""


def run(options: Options) -> None:
    """Injure jobs again and again, and hold them to others that are left alone. Ctrl-C ends it with what there is.

    Raises:
        UserError: this machine cannot play two hosts with SLURM, or a kind of fault is none of ours.
    """
    record.check("kind of fault", options.kinds, KINDS)
    if lacking := hosts.missing("mount") or slurm.missing():
        raise UserError(f"got a machine that cannot play SLURM hosts ({lacking}), expected root on Linux with SLURM")
    kinds, stop = draw(options), threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell has a command in the background ignore the first one
        signal.signal(number, signal.default_int_handler)
    with ThreadPoolExecutor(options.jobs) as pool:
        trials = [pool.submit(trial, options, kinds, number, stop) for number in range(options.jobs)]
        try:
            wait(trials)
        except KeyboardInterrupt:
            print("interrupted: each job ends its present fault, and is compared", flush=True)
            stop.set()
        found = [one.result() for one in trials]
    rows = [row for one in found for row in one.rows]
    notes = judge(found, options)
    print("\n".join(notes))
    columns = {
        "fault": "fault", "count": "times", "right": "named rightly", "median": "named after, s (median)",
        "most": "at most, s", "lost": "steps lost, at most", "back": "trains again after, s (median)", "wrong": "wrong",
    }  # fmt: skip
    title = "Faults at random on two SLURM nodes"
    print(record.write("faults", title, by_kind(rows), out=options.out, notes=notes, columns=columns))


def draw(options: Options) -> deque[str]:
    """The kinds of all faults, in their order."""
    rng = random.Random(options.seed)
    rounds = -(-options.faults // len(options.kinds))
    kinds = [kind for _ in range(rounds) for kind in rng.sample(options.kinds, len(options.kinds))]
    return deque(kinds[: options.faults])


def trial(options: Options, kinds: deque[str], number: int, stop: threading.Event) -> Trial:
    """One job with its share of the faults, and its comparison with another."""
    with tempfile.TemporaryDirectory(prefix="faults-") as name, _cluster(Path(name)) as (on, environment):
        job, found = Job("injured", Path(name), on, environment, PACE), Trial()
        try:
            injure(job, options, kinds, random.Random(f"{options.seed} {number}"), stop, found)
            if found.rows:
                found.saved, found.left = job.stop(), job.left()
                found.same = compare(job, Job("alone", Path(name), on, environment, 0.0), found.saved)
                found.notes += account(job, found.rows)
        except Exception as error:  # what has been found until then goes into the record
            found.notes.append(f"it ended early: {error!r}")
            print(found.notes[-1], flush=True)
        return found


@contextlib.contextmanager
def _cluster(folder: Path) -> Iterator[tuple[hosts.Hosts, dict[str, str]]]:
    """Two hosts with SLURM; nothing is left of it afterwards, jobs included."""
    (folder / "slurm").mkdir()
    prepare(folder)
    try:
        with hosts.two(folder) as on, slurm.on(on, folder / "slurm") as environment:
            yield on, environment
    finally:
        subprocess.run(["umount", "--lazy", str(folder / "disk")], check=False)


def injure(
    job: Job, options: Options, kinds: deque[str], rng: random.Random, stop: threading.Event, found: Trial
) -> None:
    """Run the job with its faults, and note what was made of each."""
    job.submit()
    while not stop.is_set():
        if not job.wait(job.trains):
            raise RuntimeError(f"it did not train\n{job.output()[-2000:]}")
        if stop.wait(rng.expovariate(1 / options.mean)):
            return
        try:
            kind = kinds.popleft()
        except IndexError:
            return
        row = strike(job, kind, rng)
        found.rows.append(row)
        shown = ("fault", "rank", "named", "of", "seconds", "lost", "back", "lasted", "right")
        cells = (f"{name}={record.show(row[name])}" for name in shown)
        print(f"{options.faults - len(kinds):3d} {time.strftime('%H:%M:%S')}", *cells, flush=True)
        if not row["right"]:
            print("   ", row, flush=True)


def compare(job: Job, alone: Job, saved: int) -> bool:
    """Whether a job that is left alone has the same parameters, average and optimizer's state after so many steps."""
    # it is not held back, and may be past them before it is told to stop
    alone.submit("--checkpoint.every", str(saved), "--checkpoint.keep", "100")
    ended = alone.wait(lambda: alone.saved() >= saved, 1200.0)
    alone.launch("cancel", alone.name)
    alone.wait(lambda: not alone.processes())
    return ended and all(bits(alone, saved, part) == bits(job, saved, part) for part in ("params", "ema", "opt_state"))


def bits(job: Job, step: int, part: str) -> dict[str, bytes]:
    """The bits of all arrays of a part of the state after so many steps, by their names."""
    import jax

    from jaxmodels.train.checkpoint import Checkpointer

    tree, _, _ = Checkpointer(job.run / "checkpoints").restore_params(step, subtree=part)
    return {jax.tree_util.keystr(path): leaf.tobytes() for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def by_kind(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each kind, with its faults."""

    def numbers(of: Sequence[dict[str, Any]], name: str) -> list[float]:
        return [row[name] for row in of if row[name] is not None]

    found = []
    for kind in sorted({row["fault"] for row in rows}, key=KINDS.index):
        own = [row for row in rows if row["fault"] == kind]
        seconds, lost, back = (numbers(own, name) for name in ("seconds", "lost", "back"))
        wrong = Counter(f"{row['named']} of rank {row['of']}" for row in own if not row["right"])
        found.append(
            {
                "fault": kind,
                "count": len(own),
                "right": sum(row["right"] for row in own),
                "median": statistics.median(seconds) if seconds else None,
                "most": max(seconds, default=None),
                "lost": max(lost, default=None),
                "back": statistics.median(back) if back else None,
                "wrong": "; ".join(f"{count} {what}" for what, count in wrong.items()) or None,
                "faults": own,
            }
        )
    return found


def judge(trials: Sequence[Trial], options: Options) -> list[str]:
    """What the proof comes to, in sentences."""
    rows = [row for one in trials for row in one.rows]
    right = sum(row["right"] for row in rows)
    lost = [row["lost"] for row in rows if row["lost"] is not None]
    stayed, left = sum(row["left"] for row in rows), sum(len(one.left) for one in trials)
    warned = sum(row["other_warnings"] for row in rows)
    verdicts = {True: "the bits", False: "NOT the bits", None: "bits that were not compared with those"}
    ends = [f"after {one.saved:,} steps {verdicts[one.same]}" for one in trials]
    short = [f"it ended after {len(rows)} of {options.faults} faults"] if len(rows) < options.faults else []
    return [
        *short,
        f"{right} of {len(rows)} faults were named rightly, by kind and rank, within {IN_TIME:.0f} s",
        f"{len(trials)} jobs were told to stop then, and had {', '.join(ends)} of one that was left alone: parameters, "
        "their average, state of the optimizer",
        f"at most {max(lost, default=0)} steps were computed again after a fault, with a checkpoint every {EVERY}; "
        f"more than {EVERY}, as the save under way was cut off, after {sum(steps > EVERY for steps in lost)} faults",
        f"{stayed} processes stayed behind an attempt, {left} behind a job",
        f"{warned} warnings of slowness came beside the faults; the machine did other work meanwhile",
        f"steps are held back to {PACE} s each, in place of a model of a size worth launching; all jobs, of two "
        "ranks each, share the machine with their SLURM",
        *(f"job {i}: {note}" for i, one in enumerate(trials) for note in one.notes),
    ]


def account(job: Job, rows: Sequence[dict[str, Any]]) -> list[str]:
    """The forecast of `jaxmodels plan --failures`, with what was measured put in, against `jaxmodels goodput`."""
    found = goodput.account(job.run)
    failures = [row for row in rows if row["fault"] in LOSSES and row["back"] is not None]
    stops = [row for row in rows if row["fault"] in STOPS and row["back"] is not None]
    held = [row for row in rows if row["fault"] in LASTING]
    every = phases.read(job.run)
    pairs = [
        (before["seconds"], after["seconds"])
        for before, after in itertools.pairwise(every)
        if before["began"] == after["began"] and after["step"] - before["step"] == EVERY
        and not any(row["began"] < after["time"] and before["time"] < row["began"] + row["lasted"] for row in held)
    ]  # fmt: skip
    if not pairs or not failures:
        return []
    step = statistics.fmean((a[name] - b[name]) / EVERY for b, a in pairs for name in ("step", "data")) * 2
    saved, requested = job.events("saved", "unsaved"), {row["step"]: row["time"] for row in every}
    blocked = found["seconds"]["save"] / max(1, len(saved))
    ended = [row["time"] - requested[row["step"]] for row in saved if row["step"] in requested] or [blocked]
    pending = max(0.0, statistics.median(ended) - blocked)
    first = every[0]
    began = first["time"] - first["began"] - sum(first["seconds"][name] for name in ("step", "data", "save"))
    down = {name: sum(row["down"] for row in of) for name, of in (("failures", failures), ("stops", stops))}
    slower = sum(row["lasted"] * SLOWER / (SLOWER + step) for row in held)
    up = found["wall_seconds"] - began - sum(down.values())
    rates = Failures(up / len(failures), blocked, pending, 0.0)
    work, interval = found["steps"] * step, EVERY * step
    expected = work / rates.goodput(interval)
    wall = began + expected + slower + sum(down.values())
    ends = wall - expected + np.percentile(rates.finish(work, interval), (5, 95))
    share = work / wall
    gaps = {
        "of time": wall / found["wall_seconds"],
        "of goodput": share / found["goodput"],
        "of the time between restarts alone, which is what the forecast computes": (expected + slower) / up,
    }
    return [
        f"measured: a step {step:.4f} s; a save stops steps {blocked:.3f} s, and is complete {pending:.2f} s later; "
        f"{len(failures)} failures, each {down['failures'] / len(failures):.1f} s from it to the first new step, after "
        f"{rates.mean:.1f} s of training; {len(stops)} stops of {down['stops'] / max(1, len(stops)):.1f} s",
        f"forecast by jaxmodels.plan.failures of {found['steps']:,} steps with these: {wall:,.0f} s (5 to 95 %: "
        f"{ends[0]:,.0f} to {ends[1]:,.0f} s), goodput {share:.1%}",
        f"`jaxmodels goodput`: {found['wall_seconds']:,.0f} s, goodput {found['goodput']:.1%}",
        "forecast against that: " + ", ".join(f"{gap - 1:+.1%} {what}" for what, gap in gaps.items()),
        "faults come at random while the job trains, and none while it restarts: so the forecast has restarts of no "
        "length, and their measured time is added",
        "where the time went: " + ", ".join(f"{name} {spent:.0f} s" for name, spent in found["seconds"].items()),
    ]
