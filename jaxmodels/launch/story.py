"""Write the events of a job to the events.jsonl of its run."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxmodels.launch import events
from jaxmodels.launch.limits import Slow
from jaxmodels.launch.seen import Seen

_SAVED_SECONDS = 2.0
"""Time between two searches for new checkpoints."""


class Story:
    """The events of a job. Those from before its run has a directory are held back until it has one."""

    def __init__(self) -> None:
        self.run: Path | None = None
        self.job = _job()
        self.found = -1
        """Step of the newest checkpoint that existed before this supervisor started; -1: none."""
        self.earlier = 0
        """Attempts of this job, by earlier supervisors, that saved no checkpoint newer than `found`."""
        self._waiting: list[dict[str, Any]] = []
        self._saved: set[int] = set()
        self._looked, self._opened = 0.0, time.time()
        self._phase = self._next = ""
        self._attempt, self._unsaved = 0, (0, 0.0)

    def begin(self, attempt: int) -> None:
        """Begin another attempt."""
        self._attempt, self._phase, self._next = attempt, "", ""

    def newest(self) -> int:
        """Return the step of the run's newest complete checkpoint; -1 if there is none, or no run yet."""
        return -1 if self.run is None else max(_checkpoints(self.run), default=-1)

    def tell(self, event: events.Name, rank: Seen | None = None, **fields: Any) -> None:
        """Record an event, and the rank that it is about, if any."""
        about: dict[str, Any] = {"time": time.time()}
        if rank is not None:
            about |= {"rank": rank.rank, "host": rank.host, "device": rank.device, "phase": rank.phase}
            about["step"] = rank.step if rank.step >= 0 else None
        self._waiting.append({"event": event, **about, **fields})
        self._write()

    def look(self, seen: Sequence[Seen], run: Path | None, last: bool = False) -> None:
        """Record what has changed: the run's directory, its phase, its checkpoints."""
        if self.run is None and run is not None:
            self.run = run
            self._saved = {step for step, moment in _checkpoints(run).items() if moment < self._opened}
            self.found = max(self._saved, default=-1)
            self.earlier = fruitless(events.read(run), self.job, self.found)
            for row in self._waiting:
                if row["event"] == "start" and self.found >= 0:
                    row["step"] = self.found
            self._write()
        first = next((one for one in seen if one.rank == 0), None)
        if first is None:
            return
        # data and step alternate, and a phase counts only if it is seen twice
        phase = "step" if first.phase == "data" else first.phase
        if phase not in (self._phase, self._next) and self._phase:
            self._next = phase
        elif phase != self._phase:
            self._phase, self._next = phase, ""
            self.tell("phase", first, phase=phase, attempt=self._attempt)
        else:
            self._next = ""
        if self.run is not None and (last or time.monotonic() - self._looked > _SAVED_SECONDS):
            self._looked = time.monotonic()
            for step, moment in sorted(_checkpoints(self.run).items()):
                if step not in self._saved:
                    self._saved.add(step)
                    self.tell("saved", first, phase="save", step=step, time=moment)

    def unsaved(self, found: Mapping[str, Any] | None, seen: Sequence[Seen]) -> None:
        """Record a checkpoint that could not be written, once."""
        first = next((one for one in seen if one.rank == 0), None)
        if found and (self._attempt, found["time"]) != self._unsaved:
            self._unsaved = self._attempt, found["time"]
            self.tell("unsaved", first, phase="save", **found)

    def slow(self, found: Slow, seen: Sequence[Seen]) -> str:
        """Record a rank that slows down the steps, or no longer does; return a sentence about it."""
        rank = next((one for one in seen if one.rank == found.rank), None)
        over = {} if found.until is None else {"until": found.until}
        self.tell("slow", rank, kind=found.kind, factor=round(found.factor, 2), since=found.since, **over)
        who = "all ranks together are" if rank is None else f"rank {rank.rank} on {rank.host} ({rank.device}) is"
        what = "waiting for data" if found.kind == "starved" else "slow"
        if over:
            return f"{who} not {what} any more"
        since = time.strftime("%H:%M:%S", time.localtime(found.since))
        return f"warning: {who} {what}: a step takes {found.factor:.1f} times as long as without, since {since}"

    def _write(self) -> None:
        """Write the events that were held back, in order; if the disk is full, keep them for later."""
        while self.run is not None and self._waiting:
            try:
                event = dict(self._waiting[0])
                events.append(self.run, event.pop("event"), **event)
            except OSError:
                return
            self._waiting.pop(0)


def fruitless(rows: Sequence[dict[str, Any]], job: str, newest: int) -> int:
    """Count the attempts of a job that began at its newest checkpoint, or without one (-1), and saved no newer one.

    Attempts that ended because the supervisor of node 0 was lost do not count: that is not the job's fault.
    """
    count = 0
    for row in rows if job else ():
        if row["event"] == "start" and row.get("job") == job:
            count += (-1 if row["step"] is None else row["step"]) == newest
        elif row["event"] == "failed" and row.get("leader") and count:
            count -= 1
    return count


def _job() -> str:
    """Return the name of the job that this process belongs to, if `jaxmodels launch` submitted it."""
    with contextlib.suppress(ValueError, AttributeError):
        return str(json.loads(os.environ.get("JAXMODELS_JOB", "{}")).get("name", ""))
    return ""


def _checkpoints(run: Path) -> dict[int, float]:
    """Return the steps of a run's complete checkpoints, and when each was written (Unix seconds)."""
    found: dict[int, float] = {}
    with contextlib.suppress(OSError):
        for path in (run / "checkpoints").iterdir():
            if path.name.isdecimal():
                found[int(path.name)] = path.stat().st_mtime
    return found
