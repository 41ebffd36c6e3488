"""Finds which rank failed first, and how, from the ends of all ranks."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from jaxmodels.errors import ExitCode
from jaxmodels.launch.events import Kind
from jaxmodels.launch.seen import Frame, Seen, held_up_by

FROZEN_SECONDS = 5.0
"""Seconds after which a stopped rank counts as frozen; JAX's heartbeat ends its peers some seconds later."""
LAST_LINES = 12
GOOD = (ExitCode.DONE, ExitCode.SAVED)

# Output of a rank that ends because of another.
_CONSEQUENCE = re.compile(
    r"JAX distributed service detected fatal errors|Gloo .*failed|Connection (closed|reset) by peer"
    r"|stopped sending heartbeats|NCCL .*remote|DEADLINE_EXCEEDED.*Barrier|Barrier failed"
)
_SILENT = re.compile(r"stopped sending heartbeats\):\s*((?:\d+[\s,]*)+)")
_NO_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|MemoryError|bad_alloc|out of memory", re.IGNORECASE)
# The last line of a traceback.
_RAISED = re.compile(r"[\w.]*(Error|Exception|Exit|Interrupt|Iteration)\b")


@dataclass(frozen=True)
class Failure:
    """What ended an attempt."""

    kind: Kind
    why: str
    rank: Seen | None = None
    """The rank that failed; None if it was not a single rank."""

    def message(self, moment: float) -> str:
        """The failure as text, with the last lines of the rank's output."""
        if self.rank is None:
            return f"failed {moment:.1f} s after the start: {self.why}"
        tail = [line for line in self.rank.tail if line.strip()]
        printed = "".join(f"\n    {line}" for line in tail[-LAST_LINES:]) or " nothing"
        at = f" in {self.rank.phase}" + (f" after step {self.rank.step}" if self.rank.step >= 0 else "")
        device = f" ({self.rank.device})" if self.rank.device else ""
        return (
            f"rank {self.rank.rank} failed first, {moment:.1f} s after the start{at}, on {self.rank.host}{device}: "
            f"{self.why}\n  its last lines:{printed}"
        )


def first_failure(seen: Sequence[Seen], found: dict[int, list[Frame]], late: str = "") -> Failure | None:
    """Find what failed first; None if nothing did.

    Args:
        seen: every rank.
        found: the stacks of the ranks that still run.
        late: why those ranks are thought to hang, if they are.
    """
    failed = sorted((one for one in seen if one.code is not None and one.code not in GOOD), key=lambda one: -one.ended)
    texts = {one.rank: "\n".join(one.tail) for one in seen}
    for one in failed:
        # Another rank's end can cause SIGABRT or an exception, but never SIGKILL or exit code 2.
        if one.code not in (1, -signal.SIGABRT) or not _CONSEQUENCE.search(texts[one.rank]):
            return _ended(one)
    for one in seen:
        if one.code is None and one.frozen:
            return Failure("frozen", f"frozen for {one.frozen:.0f} s (stopped by a signal, and not continued)", one)
    for text in texts.values():
        if (named := _SILENT.search(text)) and (rank := _of(seen, int(re.findall(r"\d+", named[1])[0]))):
            return Failure("link", "silent (no heartbeat: its link is down, or it is frozen)", rank)
    running = [one for one in seen if one.code is None]
    if late and running:
        return _stuck(seen, found, late)
    return _ended(failed[0]) if failed else None


def _of(seen: Sequence[Seen], rank: int) -> Seen | None:
    return next((one for one in seen if one.rank == rank), None)


def _stuck(seen: Sequence[Seen], found: dict[int, list[Frame]], late: str) -> Failure:
    running = [one for one in seen if one.code is None]
    stuck = held_up_by(seen, found)
    if not stuck:
        return Failure("stuck", f"{late}; all ranks wait for devices, and none stands out")
    if not any(found.values()) and len(running) > 1:
        return Failure("stuck", late, running[0])

    def where(one: Seen) -> str:
        stack = found.get(one.rank)
        return "stuck" + (" at {}:{} in {}".format(*stack[0]) if stack else "")

    first = stuck[0]
    others = "".join(f"; rank {one.rank} too: {where(one)}" for one in stuck[1:])
    kind: Kind = "starved" if first.phase == "data" else "stuck"
    return Failure(kind, f"{late}, {where(first)}{others}", first)


def _ended(one: Seen) -> Failure:
    """Describe the end of a single rank."""
    code = one.code or 0
    if code < 0:
        try:
            number = signal.Signals(-code)
        except ValueError:  # a real-time signal
            return Failure("killed", f"killed by signal {-code}", one)
        if number == signal.SIGKILL:
            if one.memory_killed:
                return Failure("memory", "killed by SIGKILL: the machine was out of memory", one)
            return Failure("killed", "killed by SIGKILL (from outside, or for lack of memory)", one)
        if number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            return Failure("killed", f"killed by {number.name} before it could save", one)
        return Failure("died", f"died of {number.name}", one)
    tail = [line for line in one.tail if line.strip()]
    kind, message = one.error.get("kind", ""), one.error.get("message") or (tail[-1] if tail else "")
    why = f"exit code {code}" + (f": {message}" if message else "")
    if kind == "NotFinite":
        return Failure("not-finite", why, one)
    if _NO_MEMORY.search(f"{kind} {message}"):
        return Failure("memory", why, one)
    return Failure("raised" if kind or (tail and _RAISED.match(tail[-1])) else "died", why, one)
