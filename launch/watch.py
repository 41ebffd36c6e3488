"""Watching processes that depend on each other, and finding the first that failed."""

from __future__ import annotations

import contextlib
import math
import os
import queue
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

DONE, MISTAKE, PREEMPTED = 0, 2, 75

# When one has failed its peers follow within moments; waiting for them shows who was first.
_SETTLE_SECONDS = 1.0
# Ranks leave together: one that still runs so long after another has ended will not end.
_LEAVE_SECONDS = 60.0
# JAX's heartbeat ends the peers of a stopped rank sooner; this is for one stopped before it could join them.
_FROZEN_SECONDS = 20.0
_LAST_LINES = 12
# What a rank says that ends because of another.
_CONSEQUENCE = re.compile(
    r"JAX distributed service detected fatal errors|Gloo .*failed|Connection (closed|reset) by peer"
    r"|stopped sending heartbeats|NCCL .*remote"
)
_SILENT = re.compile(r"stopped sending heartbeats\):\s*((?:\d+[\s,]*)+)")
_NOTES = {signal.SIGKILL: " (out of memory, or from outside)", signal.SIGTERM: " before it could save"}

Events = queue.SimpleQueue  # its put() may be called in a signal handler


@dataclass
class Rank:
    """One process of a run."""

    index: int
    process: subprocess.Popen[bytes]
    code: int | None = None
    """What it ended with, negative for a signal; None: it runs."""
    ended: float = math.inf
    stuck: str = ""
    """Where it is, if the others wait for it."""

    def wait(self, events: Events[Rank | int]) -> None:
        code = self.process.wait()
        self.ended, self.code = time.monotonic(), code
        events.put(self)

    def kill(self) -> None:
        """End it, and whatever it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def stopped(self) -> bool:
        """Whether a signal (SIGSTOP) keeps it from running; Linux tells, elsewhere JAX's heartbeat has to."""
        try:
            stat = Path(f"/proc/{self.process.pid}/stat").read_text()
        except OSError:
            return False
        return self.code is None and stat.rpartition(")")[2].split()[0] == "T"


@contextlib.contextmanager
def signals_to(events: Events[Rank | int]) -> Iterator[None]:
    """Within, SIGINT, SIGTERM and SIGHUP are events and end nothing by themselves."""
    caught = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = {number: signal.signal(number, lambda number, _: events.put(number)) for number in caught}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def watch(
    ranks: Sequence[Rank],
    events: Events[Rank | int],
    grace_seconds: float,
    stall: Callable[[Sequence[Rank]], str] = lambda ranks: "",
) -> str:
    """Wait until all have ended, one has failed, or one should have ended and has not; returns what the last was.

    `stall(ranks)` is asked each second for a warning.
    """
    deadline, late, told = math.inf, "", False
    frozen_since: dict[int, float] = {}
    while running := [rank for rank in ranks if rank.code is None]:
        try:
            event = events.get(timeout=min(1.0, max(0.0, deadline - time.monotonic())))
        except queue.Empty:
            if warning := stall(ranks):
                print(f"launch: warning: {warning}", file=sys.stderr, flush=True)
            now = time.monotonic()
            frozen_since = {rank.index: frozen_since.get(rank.index, now) for rank in running if rank.stopped()}
            if now >= deadline:
                return late
            if any(now - since > _FROZEN_SECONDS for since in frozen_since.values()):
                return ""
            continue
        now = time.monotonic()
        if isinstance(event, int):
            if told:
                return "still running when the second signal came"
            told = True
            # Ctrl-C too goes on as SIGTERM, which stops the ranks at one step without a traceback.
            for rank in running:
                rank.process.send_signal(signal.SIGTERM)
            until, reason = now + grace_seconds, f"still running {grace_seconds:.0f} s after it was told to stop"
        elif event.code in (DONE, PREEMPTED):
            until, reason = now + _LEAVE_SECONDS, f"still running {_LEAVE_SECONDS:.0f} s after rank {event.index} ended"
        else:
            until, reason = now + _SETTLE_SECONDS, ""
        if until < deadline:
            deadline, late = until, reason
    return ""


def judge(ranks: Sequence[Rank], tails: Sequence[Sequence[str]], late: str, began: float) -> tuple[int, str]:
    """The exit code of the whole, and what to say about it: who failed first, of what, with its last lines."""
    culprit, cause = _first_failure(ranks, tails, late)
    if culprit is None:
        if all(rank.code == DONE for rank in ranks):
            return DONE, ""
        return PREEMPTED, "saved and stopped; the same command goes on from there"
    if culprit.code == MISTAKE:
        return MISTAKE, f"rank {culprit.index} ended with exit code 2, a mistake in what was asked (see its message)"
    moment = min(culprit.ended, time.monotonic()) - began
    tail = [line for line in tails[culprit.index] if line.strip()]
    if (culprit.code or 0) > 0 and tail:
        cause += f": {tail[-1]}"
    said = "".join(f"\n    {line}" for line in tail[-_LAST_LINES:]) or " nothing"
    return 1, f"rank {culprit.index} failed first, {moment:.1f} s after the start: {cause}\n  its last lines:{said}"


def _first_failure(ranks: Sequence[Rank], tails: Sequence[Sequence[str]], late: str) -> tuple[Rank | None, str]:
    failed = sorted((rank for rank in ranks if rank.code not in (None, DONE, PREEMPTED)), key=lambda rank: rank.ended)
    texts = ["\n".join(tail) for tail in tails]
    for rank in failed:
        # Only SIGABRT and an exception can be another's doing: nobody else's end sends SIGKILL or exit code 2.
        if rank.code not in (1, -signal.SIGABRT) or not _CONSEQUENCE.search(texts[rank.index]):
            return rank, _cause(rank.code or 0)
    for rank in ranks:
        if rank.stopped():
            return rank, "frozen (stopped by a signal, and not continued)"
    for text in texts:
        if named := _SILENT.search(text):
            return ranks[int(re.findall(r"\d+", named[1])[0])], "silent (no heartbeat: frozen, or its link is down)"
    for rank in ranks:
        if rank.code is None and rank.stuck:
            return rank, ", ".join(part for part in (late, rank.stuck) if part)
    if failed:
        return failed[0], _cause(failed[0].code or 0)
    running = [rank for rank in ranks if rank.code is None]
    return (running[0], late) if running else (None, "")


def _cause(code: int) -> str:
    if code > 0:
        return f"exit code {code}"
    number = signal.Signals(-code)
    return f"killed by {number.name}{_NOTES.get(number, '')}"
