"""Learn from a run how long its pauses normally last in each phase, and how long its steps take."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from jaxmodels.launch.pauses import ENOUGH
from jaxmodels.launch.seen import Seen

MARGIN_SECONDS = 15.0
"""How far a pause may exceed the normal (`jaxmodels.launch.pauses`) before a warning says that the job is stuck."""
PATIENCE_SECONDS = 60.0
"""How far it may exceed the normal before the attempt is ended: a hanging file system may recover by itself."""
IDLE_SECONDS = 60.0
"""Idle time that is normal in a phase of which nothing is known yet, or whose length has no limit."""

# of a core: what a waiting process still uses
_BUSY = 0.02
_WINDOW_SECONDS, _WINDOW_STEPS = 5.0, 8
_SLOW, _STARVED, _WAITS = 1.3, 0.3, 0.2


@dataclass(frozen=True)
class Overdue:
    """A run that makes no progress."""

    age: float
    """Seconds since the last report of any rank."""
    learned: float
    """Seconds that are normal for this run."""
    hopeless: bool
    """Whether to end the attempt."""


@dataclass(frozen=True)
class Slow:
    """Something that slows the steps down."""

    kind: str
    """slow, or starved: waiting for data."""
    rank: int | None
    """The slow rank; None: no rank stands out, but all are slower than before."""
    factor: float
    """A step takes this many times as long as it would otherwise."""
    since: float
    """Unix seconds."""
    until: float | None = None
    """Unix seconds at which it ended; None: it has not."""


class Limits:
    """Learns from the states of the ranks, observed about once a second, over all attempts of a job."""

    def __init__(self) -> None:
        self._normal: dict[str, float] = {}
        self._cpu: deque[tuple[float, float]] = deque()
        self._pace: deque[float] = deque(maxlen=256)
        self.begin()

    def begin(self) -> None:
        """Begin another attempt: keep what was learned, and forget the observations."""
        self._cpu.clear()
        self._window: list[Seen] = []
        self._opened = 0.0
        self._suspected: Slow | None = None
        self._said: Slow | None = None
        self._told: set[tuple[str, int | None]] = set()

    def overdue(self, seen: Sequence[Seen]) -> Overdue | None:
        """Return how long the run has made no progress, if that is too long."""
        found: dict[str, float] = {}
        for one in seen:
            if one.pauses >= ENOUGH:
                found[one.phase] = max(found.get(one.phase, 0.0), one.normal)
        self._normal |= found
        running = [one for one in seen if one.code is None]
        if not running:
            return None
        idle = self._idle(running)
        learned = max(self._normal.get(one.phase, 0.0) for one in running)
        age = min(one.age for one in running)
        if not all(one.regular and one.phase in self._normal for one in running):
            learned = max(IDLE_SECONDS, learned)
            age = min(age, idle)
        if age <= learned + MARGIN_SECONDS:
            return None
        return Overdue(age, learned, age > learned + PATIENCE_SECONDS)

    def _idle(self, running: Sequence[Seen]) -> float:
        """Return how many seconds the ranks have been idle."""
        now, cpu = time.monotonic(), sum(one.cpu for one in running)
        self._cpu.append((now, cpu))
        while len(self._cpu) > 1 and self._cpu[-1][1] - self._cpu[0][1] > _BUSY * (now - self._cpu[0][0]) + 0.2:
            self._cpu.popleft()
        return now - self._cpu[0][0]

    def slow(self, seen: Sequence[Seen]) -> Slow | None:
        """Return what slows down the steps, once it has lasted for two windows, and again when it has ended."""
        now = time.time()
        if not self._window or any(one.code is not None for one in seen) or len(self._window) != len(seen):
            self._window, self._opened = list(seen), now
            return None
        steps = min(one.polls - before.polls for one, before in zip(seen, self._window, strict=True))
        if any(one.phase not in ("step", "data") or one.step < 0 for one in seen):
            self._window = []  # the run does something else, so that the time of steps cannot be measured
            return None
        if steps < _WINDOW_STEPS or now - self._opened < _WINDOW_SECONDS:
            return None
        found = self._judge(seen, now)
        self._window, opened, self._opened = list(seen), self._opened, now
        if found is None:
            self._suspected = None
            self._told.clear()
            over, self._said = self._said, None
            return None if over is None else dataclasses.replace(over, until=opened)
        kind, rank, factor = found
        before, self._suspected = self._suspected, Slow(kind, rank, factor, opened)
        if before is None or (before.kind, before.rank) != (kind, rank):
            return None
        self._suspected = Slow(kind, rank, factor, before.since)
        if (kind, rank) in self._told:
            return None
        self._told.add((kind, rank))
        self._said = self._suspected
        return self._said

    def _judge(self, seen: Sequence[Seen], now: float) -> tuple[str, int | None, float] | None:
        """Return kind, rank and factor of what slows down the steps of this window."""
        own, data, paces = [], [], []
        for one, before in zip(seen, self._window, strict=True):
            count = one.polls - before.polls
            took = (now - one.age - (self._opened - before.age)) / count
            paces.append(took)
            data.append((one.data_wait - before.data_wait) / count)
            own.append(max(0.0, took - (one.device_wait - before.device_wait) / count - data[-1]))
        pace = statistics.median(paces)
        if pace <= 0:
            return None
        busy = [a + b for a, b in zip(own, data, strict=True)]
        worst = max(range(len(seen)), key=busy.__getitem__)
        # a rank that waits for devices delays no other: its loop's own work overlaps with theirs
        if len(seen) > 1 and pace - busy[worst] < _WAITS * pace:
            held = busy[worst] - statistics.median(busy[:worst] + busy[worst + 1 :])
            factor = pace / max(pace - held, 0.02 * pace)
            if factor >= _SLOW:
                return "starved" if data[worst] > own[worst] else "slow", seen[worst].rank, factor
        if (waits := max(data)) > _STARVED * pace:
            return "starved", seen[0].rank if len(seen) == 1 else None, pace / max(pace - waits, 0.02 * pace)
        if len(self._pace) >= ENOUGH and pace > 1.5 * statistics.median(self._pace):
            return "slow", seen[0].rank if len(seen) == 1 else None, pace / statistics.median(self._pace)
        self._pace.append(pace)
        return None
