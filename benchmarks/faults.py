"""Faults at random on a job of several processes: each is named, and the job ends with the bits of one left alone."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from benchmarks import record
from jaxmodels.errors import ExitCode, UserError
from jaxmodels.launch import events

# dropout uses the key and the average lags behind, so that all that a state can hold changes
SMALL = (
    "--model.width 32 --model.layers 1 --model.context 32 --data.seq-len 32 --data.batch-size 8 --model.dropout 0.1 "
    "--train.ema 0.99 --eval.batches 2 --checkpoint.keep 3 --metrics.progress none"
).split()
SIGNALS = {"killed": signal.SIGKILL, "died": signal.SIGSEGV, "frozen": signal.SIGSTOP}
INSIDE = ("raised", "memory", "not-finite", "stuck")
JOB = ("preempted", "supervisor killed")
FAULTS = (*SIGNALS, *INSIDE, *JOB)
# Found by every rank as it starts: what it is told to do, it does in its main thread.
_STRIKE = """
import os, signal, time

class NotFinite(RuntimeError):
    pass

def strike(number, frame):
    with open(os.environ["JAXMODELS_FAULT"]) as file:
        kind = file.read()
    while kind == "stuck":
        time.sleep(1)
    raise {"raised": KeyError, "memory": MemoryError, "not-finite": NotFinite}[kind]("a fault made on purpose")

if "JAXMODELS_FAULT" in os.environ and "JAXMODELS_PROCESS_ID" in os.environ:
    signal.signal(signal.SIGUSR2, strike)
"""
_PATIENCE = 600.0
# JAX and the supervisor need up to 15 s beyond what they have learned
_IN_TIME = 30.0


@dataclass(frozen=True)
class Options:
    """How many faults, and of what job."""

    faults: int = 100
    """Faults, one after another."""
    config: str = "configs/gpt_stdlib.py"
    """The config to train, made small."""
    processes: int = 2
    """Ranks of the job, on this machine."""
    steps: int = 60
    """Steps of training for each fault."""
    seed: int = 0
    """Decides kinds, ranks and moments."""
    out: Path | None = None
    """Folder for the results; by default, benchmarks/results."""


class Run:
    """A job's run directory, and the supervisor that works on it."""

    def __init__(self, folder: Path, options: Options) -> None:
        self.folder, self.log = folder / "run", folder / "output.txt"
        folder.mkdir()
        self.order = folder / "order"
        (folder / "sitecustomize.py").write_text(_STRIKE)
        self.command = [
            sys.executable, "-m", "jaxmodels.launch.node", "--processes", str(options.processes), "--platform", "cpu",
            "--restarts", "5", "--", "train", options.config, "--run-dir", str(self.folder),
            "--train.steps", str(options.steps * options.faults), "--checkpoint.every", "20", "--eval.every", "200",
            *SMALL,
        ]  # fmt: skip
        path = f"{folder}{os.pathsep}{record.ROOT}"
        self.environment = {**os.environ, "PYTHONPATH": path, "JAXMODELS_FAULT": str(self.order)}
        self.pids: set[int] = set()

    def start(self) -> None:
        """Start the supervisor."""
        with self.log.open("a") as file:
            self.process = subprocess.Popen(
                self.command, cwd=record.ROOT, env=self.environment, stdout=file, stderr=subprocess.STDOUT
            )

    def events(self, name: str) -> list[dict[str, Any]]:
        """Its events of a name."""
        return [row for row in events.read(self.folder) if row["event"] == name]

    def ranks(self) -> dict[int, int]:
        """The process of each rank."""
        found = {}
        pid = self.process.pid
        try:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            for child in children:
                for word in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
                    if word.startswith(b"JAXMODELS_PROCESS_ID="):
                        found[int(word.partition(b"=")[2])] = int(child)
        except OSError:
            return {}
        self.pids.update(found.values())
        return found

    def trains(self, since: int) -> bool:
        """Whether it takes steps, in an attempt that began behind so many events."""
        return any(
            row["event"] == "phase" and row["phase"] == "step" and (row["step"] or 0) >= 0
            for row in events.read(self.folder)[since:]
        )

    def left(self) -> list[int]:
        """Ranks that run though their job has ended."""
        deadline = time.monotonic() + 10
        while (found := [pid for pid in self.pids if _runs(pid)]) and time.monotonic() < deadline:
            time.sleep(0.1)
        return found


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def run(options: Options) -> None:
    """Injure a job again and again, and hold it to one that is left alone.

    Raises:
        UserError: it cannot be watched on this system, or has ended before all faults.
    """
    if sys.platform != "linux":
        raise UserError("got a system without /proc, expected Linux, by which processes are found")
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        alone, injured = Run(Path(folder) / "alone", options), Run(Path(folder) / "injured", options)
        alone.start()
        if alone.process.wait() != 0:
            raise RuntimeError(alone.log.read_text()[-3000:])
        rows = injure(injured, options)
        if len(rows) < options.faults:
            raise UserError(
                f"got the end of the job after {len(rows)} of {options.faults} faults, expected it after all of them, "
                f"try --steps {2 * options.steps}"
            )
        same = _params(alone) == _params(injured)
        orphans = injured.left()
    right = sum(row["right"] for row in rows)
    late = [row for row in rows if row["seconds"] is not None and row["seconds"] > _IN_TIME]
    most = max((row["lost"] for row in rows if row["lost"] is not None), default=0)
    notes = [
        f"{right} of {len(rows)} faults were named rightly, {len(rows) - len(late)} within {_IN_TIME:.0f} s",
        f"the job ended {'with' if same else 'WITHOUT'} the bits of the one that was left alone",
        f"at most {most} steps were lost by a fault, with a checkpoint every 20",
        f"{len(orphans)} processes were left behind",
    ]
    print("\n".join(notes))
    columns = {
        "fault": "fault",
        "rank": "rank",
        "named": "named",
        "of": "of rank",
        "seconds": "after, s",
        "lost": "steps lost",
    }
    print(record.write("faults", "Faults at random", rows, out=options.out, notes=notes, columns=columns))


def injure(job: Run, options: Options) -> list[dict[str, Any]]:
    """Run the job to its end, with its faults on the way; returns what was made of each."""
    rng, rows = random.Random(options.seed), []
    job.start()
    kinds = [kind for _ in range(-(-options.faults // len(FAULTS))) for kind in rng.sample(FAULTS, len(FAULTS))]
    since = 0
    for kind in kinds[: options.faults]:
        rank = rng.randrange(options.processes)
        if not _wait(job, lambda since=since: job.trains(since)):
            break  # it has ended before
        time.sleep(rng.uniform(0.0, 1.5))
        since = len(events.read(job.folder))
        row = strike(job, kind, rank)
        if row is None:
            break
        rows.append(row)
        print("  ".join(f"{name}={value}" for name, value in row.items()), flush=True)
    _wait(job, lambda: False)
    if job.process.returncode != 0:
        raise RuntimeError(job.log.read_text()[-3000:])
    return rows


def strike(job: Run, kind: str, rank: int) -> dict[str, Any] | None:
    """Make one fault and wait until it is named; None: the job had just ended."""
    ranks, failures = job.ranks(), len(job.events("failed"))
    if rank not in ranks:
        return None
    began = time.time()
    row: dict[str, Any] = {"fault": kind, "rank": rank, "named": None, "of": None, "seconds": None, "lost": None}
    if kind in JOB:
        job.process.send_signal(signal.SIGTERM if kind == "preempted" else signal.SIGKILL)
        code = job.process.wait()
        wanted = ExitCode.SAVED if kind == "preempted" else -signal.SIGKILL
        named = bool(job.events("preempted")) if kind == "preempted" else not job.left()
        row |= {"rank": None, "named": kind, "seconds": time.time() - began, "right": code == wanted and named}
        job.start()
        return row
    job.order.write_text(kind)
    os.kill(ranks[rank], SIGNALS.get(kind, signal.SIGUSR2))
    if not _wait(job, lambda: len(job.events("failed")) > failures):
        return None
    failed = job.events("failed")[-1]
    row |= {"named": failed["kind"], "of": failed["rank"], "seconds": failed["time"] - began}
    row["right"] = (failed["kind"], failed["rank"]) == (kind, rank)
    if _wait(job, lambda: any(r["time"] > failed["time"] for r in job.events("start"))) and failed["step"] is not None:
        row["lost"] = max(0, failed["step"] - (job.events("start")[-1]["step"] or 0))
    return row


def _wait(job: Run, until: Any) -> bool:
    """Wait for something to be so; False: the job ended before."""
    deadline = time.monotonic() + _PATIENCE
    while not until():
        if job.process.poll() is not None:
            return bool(until())
        if time.monotonic() > deadline:
            job.process.kill()
            raise RuntimeError(f"nothing happened for {_PATIENCE:.0f} s\n{job.log.read_text()[-3000:]}")
        job.ranks()
        time.sleep(0.1)
    return True


def _params(job: Run) -> list[bytes]:
    """The bits of the job's last parameters."""
    from jaxmodels.train.saved import read_run

    return [leaf.tobytes() for leaf in jax.tree.leaves(read_run(job.folder).params)]
