"""Every kind of fault: how it is made, how it must be named, and what comes after it."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks import record
from benchmarks.injured import Job

SIGNALS = {"killed": signal.SIGKILL, "died": signal.SIGSEGV, "frozen": signal.SIGSTOP}
ORDERS = ("raised", "memory", "not-finite", "stuck")
LASTING = ("slow", "starved")
STOPS = ("time limit", "preempted")
KINDS = (*SIGNALS, *ORDERS, *LASTING, "link", "disk", *STOPS, "supervisor", "launcher")
LOSSES = (*SIGNALS, *ORDERS, "link", "supervisor")
"""After these a job goes on from a checkpoint of before; a stop saves all, and others end nothing."""
EVENTS = {**dict.fromkeys(LOSSES, ("failed",)), "stuck": ("failed", "slow"), **dict.fromkeys(LASTING, ("slow",))}
IN_TIME = 30.0
"""Seconds beyond what is normal for the run within which each must be named."""


@dataclass
class Found:
    """How a fault was named."""

    kind: str | None = None
    rank: int | None = None
    seconds: float | None = None
    """From the fault, or from when SLURM told of it, to its name."""
    line: str = ""
    since: float = 0.0
    """When the job stopped making steps for it, where that was not at once."""


def strike(job: Job, kind: str, rng: random.Random) -> dict[str, Any]:
    """Make one fault in a job that trains, wait until it is named and the job trains again, and say how that was."""
    rank = 1 if kind == "link" else rng.randrange(2)
    job.look()
    before, starts, began = set(job.pids()), job.starts(), time.time()
    found = _MADE.get(kind, rank_fault)(job, kind, rank)
    ends = kind in LOSSES or kind in STOPS
    back = job.wait(lambda: job.trains() and (not ends or not before & set(job.pids())))
    lasted, down = time.time() - began, time.time() - max(found.since, began)
    failed = [row for row in job.events("failed") if row["time"] > began and not _beside(row)]
    warned = [row for row in job.events("slow") if row["time"] > began and row["kind"] != kind and not _beside(row)]
    at = {"not-finite": found.rank}.get(kind, rank if kind not in (*STOPS, "disk", "launcher") else None)
    return {
        "fault": kind,
        "rank": at,
        "named": found.kind,
        "of": found.rank,
        "seconds": found.seconds,
        "lost": job.lost(before, began) if ends and back else None,
        "back": lasted if ends and back else None,
        "down": down if ends and back else None,
        "lasted": lasted,
        "began": began,
        "started_by_slurm": job.starts() - starts,
        "other_warnings": len(warned),
        "left": len([pid for pid in before if ends and back and _runs(pid)]),
        "right": back
        and (found.kind, found.rank) == (kind, at)
        and len(failed) <= (kind in LOSSES)
        and (found.seconds or 0.0) < IN_TIME,
        "said": found.line.replace(f"{record.ROOT}/", "").replace(f"{job.folder}/", "")[:300],
    }


def rank_fault(job: Job, kind: str, rank: int) -> Found:
    """What happens to a rank, or within it."""
    began = time.time()
    if kind in SIGNALS:
        os.kill(job.ranks()[rank], SIGNALS[kind])
    else:
        job.order(rank, kind)
    found = by_event(job, began, *EVENTS[kind])
    if kind in LASTING:
        job.order(rank, "")
    return found


def by_event(job: Job, began: float, *names: str) -> Found:
    """The name that the first such event gives to what happened."""

    def rows() -> list[dict[str, Any]]:
        job.look()
        return [row for row in job.events(*names) if row["time"] > began and not _beside(row)]

    if not job.wait(rows):
        return Found()
    row = rows()[0]
    message = row.get("message") or f"{row.get('factor')} times as long a step"
    return Found(row.get("kind"), row["rank"], row["time"] - began, message)


def cut_link(job: Job, kind: str, rank: int) -> Found:
    """Nothing passes between the hosts any more, until that has been named."""
    began = time.time()
    job.hosts.cut()
    try:
        return by_event(job, began, *EVENTS[kind])
    finally:
        job.hosts.mend()


def fill_disk(job: Job, kind: str, rank: int) -> Found:
    """The disk of the run is full until a checkpoint could not be saved."""
    began, since = time.time(), len(job.output())
    path = job.run.parent / "full"
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(2**20))

    def unsaved() -> list[dict[str, Any]]:
        return [row for row in job.events("unsaved") if row["time"] > began]

    # the event itself may not fit on the disk
    line = r"checkpoint of step \d+ NOT saved: .*No space left on device"
    missed = job.wait(lambda: job.line_like(line, since) or unsaved())
    seconds, saved = time.time() - began, job.saved()
    path.unlink()
    good = missed and job.wait(lambda: job.saved() > saved and unsaved())
    rows = unsaved()
    if not (good and rows):
        return Found()
    return Found(kind if "No space left" in rows[0]["message"] else None, None, seconds, rows[0]["message"])


def reach_limit(job: Job, kind: str, rank: int) -> Found:
    """SLURM's limit of time comes near."""
    shown = dict(re.findall(r"(\w+)=(\S+)", job.command("scontrol", "show", "job", job.number)))
    ran = time.time() - time.mktime(time.strptime(shown["StartTime"], "%Y-%m-%dT%H:%M:%S"))
    since = len(job.output())
    job.command("scontrol", "update", f"JobId={job.number}", f"TimeLimit={int(ran + 45) // 60 + 1}")
    found = told(job, since, kind, r"launch: told to save, \S*\d:\d\d before the time limit")
    job.command("scontrol", "update", f"JobId={job.number}", "TimeLimit=UNLIMITED")
    return found


def preempt(job: Job, kind: str, rank: int) -> Found:
    """Another job needs the nodes, and comes first."""
    since = len(job.output())
    job.command("sbatch", "--partition=urgent", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
    return told(job, since, kind, "DUE TO PREEMPTION")


def told(job: Job, since: int, kind: str, pattern: str) -> Found:
    """What the job has said when SLURM told it to save, and how long it took to have saved."""
    if not job.wait(lambda: job.line_like(pattern, since)):
        return Found()
    began = time.time()
    found = by_event(job, began - 1, "preempted")
    if found.seconds is None:
        return Found()
    return Found(kind, None, found.seconds - 1, job.line_like(pattern, since), began - 1 + found.seconds)


def kill_supervisor(job: Job, kind: str, rank: int) -> Found:
    """The supervisor of a node is killed."""
    began, since = time.time(), len(job.output())
    os.kill(job.supervisors()[rank], signal.SIGKILL)
    if not job.wait(lambda: job.line_like("launch: a supervisor was killed", since)):
        return Found()
    seconds = time.time() - began
    for node, pattern in enumerate((r"node 0 \(h1\) is gone", r"supervisor of node 1 \(h2\) is gone")):
        if line := job.line_like(pattern, since):
            return Found(kind, node, seconds, line)
    return Found(kind, None, seconds)


def kill_launcher(job: Job, kind: str, rank: int) -> Found:
    """The command that follows the job's output is killed; the job goes on, and can be followed again."""
    began, pids = time.time(), job.pids()
    ours = [sys.executable, "-m", "jaxmodels", "launch"]
    follower = job.start_command(*ours, "logs", job.name, "--follow")
    try:
        job.wait(lambda: job.followed.exists() and job.followed.read_bytes())
    finally:
        follower.kill()
        follower.wait()
    status = job.launch("status", job.name).strip()
    same = job.launch("logs", job.name).splitlines() == job.output().splitlines()
    good = "running" in status and same and job.pids() == pids
    return Found(kind if good else None, None, time.time() - began, status)


_MADE: dict[str, Callable[[Job, str, int], Found]] = {
    "link": cut_link,
    "disk": fill_disk,
    "time limit": reach_limit,
    "preempted": preempt,
    "supervisor": kill_supervisor,
    "launcher": kill_launcher,
}


def _beside(row: dict[str, Any]) -> bool:
    """Whether an event says of a holdup that it is over, or what the other node has seen of the same link."""
    return "until" in row or row.get("leader") is True


def _runs(pid: int) -> bool:
    try:
        return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
