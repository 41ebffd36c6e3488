"""Watch processes that depend on each other, and find the first that failed."""

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

# Peers of a failed rank fail moments later; waiting for them shows which failed first.
_SETTLE_SECONDS = 1.0
# Ranks end together: one that still runs this long after another has ended never will.
_LEAVE_SECONDS = 60.0
# JAX's heartbeat ends the peers of a stopped rank sooner; this limit is for a rank stopped before it joined them.
_FROZEN_SECONDS = 20.0
_LAST_LINES = 12
# Output of a rank that ends because of another.
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
    """Exit code, negative for a signal; None while it runs."""
    ended: float = math.inf
    stuck: str = ""
    """Where it is stuck; empty for a rank that is not, or that waits for another."""

    def wait(self, events: Events[Rank | int]) -> None:
        code = self.process.wait()
        self.ended, self.code = time.monotonic(), code
        events.put(self)

    def kill(self) -> None:
        """Kill the process and every process it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def stopped(self) -> bool:
        """Say whether SIGSTOP keeps it from running; only Linux tells, elsewhere JAX's heartbeat has to."""
        try:
            stat = Path(f"/proc/{self.process.pid}/stat").read_text()
        except OSError:
            return False
        return self.code is None and stat.rpartition(")")[2].split()[0] == "T"


@contextlib.contextmanager
def signals_to(events: Events[Rank | int]) -> Iterator[None]:
    """Turn SIGINT, SIGTERM and SIGHUP into events, so that they end nothing by themselves."""
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
    stall_warning: Callable[[Sequence[Rank]], str] = lambda ranks: "",
) -> str:
    """Wait until all ranks have ended, one has failed, or one is overdue; return how the overdue one is late.

    `stall_warning(ranks)` is called each second; what it returns is printed.
    """
    deadline, late, told = math.inf, "", False
    frozen_since: dict[int, float] = {}
    while running := [rank for rank in ranks if rank.code is None]:
        try:
            event = events.get(timeout=min(1.0, max(0.0, deadline - time.monotonic())))
        except queue.Empty:
            if warning := stall_warning(ranks):
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
            # Ctrl-C is passed on as SIGTERM too, which stops all ranks at one step without a traceback.
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
    """Return the exit code of the whole and its message: which rank failed first, why, and its last lines."""
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
        # Another rank's end can cause SIGABRT or an exception, but never SIGKILL or exit code 2.
        if rank.code not in (1, -signal.SIGABRT) or not _CONSEQUENCE.search(texts[rank.index]):
            return rank, _cause(rank.code or 0)
    for rank in ranks:
        if rank.stopped():
            return rank, "frozen (stopped by a signal, and not continued)"
    for text in texts:
        if named := _SILENT.search(text):
            return ranks[int(re.findall(r"\d+", named[1])[0])], "silent (no heartbeat: frozen, or its link is down)"
    if stuck := [rank for rank in ranks if rank.code is None and rank.stuck]:
        others = "".join(f"; rank {rank.index} too: {rank.stuck}" for rank in stuck[1:])
        return stuck[0], ", ".join(part for part in (late, stuck[0].stuck) if part) + others
    if failed:
        return failed[0], _cause(failed[0].code or 0)
    running = [rank for rank in ranks if rank.code is None]
    return (running[0], late) if running else (None, "")


def _cause(code: int) -> str:
    if code > 0:
        return f"exit code {code}"
    number = signal.Signals(-code)
    return f"killed by {number.name}{_NOTES.get(number, '')}"
