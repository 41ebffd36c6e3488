"""What is normal for a run, learned from it: how long its pauses are in each phase, and how fast its steps come."""

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
"""Beyond what is normal (`jaxmodels.launch.pauses`) after which a job is said to go on no more."""
PATIENCE_SECONDS = 60.0
"""The same after which it is ended: a file system that hangs may go on by itself."""
IDLE_SECONDS = 60.0
"""Without computing that are normal in a phase of which nothing is known yet, or whose length nothing bounds."""

# of a core: what a waiting process still does
_BUSY = 0.02
_WINDOW_SECONDS, _WINDOW_STEPS = 5.0, 8
_SLOW, _STARVED, _WAITS = 1.3, 0.3, 0.2


@dataclass(frozen=True)
class Overdue:
    """A run that does not go on."""

    age: float
    """Seconds since any rank has reported."""
    learned: float
    """Up to how many are normal for it."""
    hopeless: bool
    """Whether to end it."""


@dataclass(frozen=True)
class Slow:
    """What holds up the steps without ending them."""

    kind: str
    """slow, or starved: it waits for its data."""
    rank: int | None
    """None: no rank stands out, all are slower than they were."""
    factor: float
    """So many times as long a step takes as it would without."""
    since: float
    """Unix seconds."""
    until: float | None = None
    """The same; None: it goes on."""


class Limits:
    """Learns from what is seen of the ranks, about once a second, over all attempts of a job."""

    def __init__(self) -> None:
        self._normal: dict[str, float] = {}
        self._cpu: deque[tuple[float, float]] = deque()
        self._pace: deque[float] = deque(maxlen=256)
        self.begin()

    def begin(self) -> None:
        """Another attempt: what was learned stays, what was seen does not."""
        self._cpu.clear()
        self._window: list[Seen] = []
        self._opened = 0.0
        self._suspected: Slow | None = None
        self._said: Slow | None = None
        self._told: set[tuple[str, int | None]] = set()

    def overdue(self, seen: Sequence[Seen]) -> Overdue | None:
        """How long the run has been without any progress, where that is longer than it may be."""
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
        """Seconds for which the ranks have not computed."""
        now, cpu = time.monotonic(), sum(one.cpu for one in running)
        self._cpu.append((now, cpu))
        while len(self._cpu) > 1 and self._cpu[-1][1] - self._cpu[0][1] > _BUSY * (now - self._cpu[0][0]) + 0.2:
            self._cpu.popleft()
        return now - self._cpu[0][0]

    def slow(self, seen: Sequence[Seen]) -> Slow | None:
        """What holds up the steps, a rank or the whole: said once it has lasted a while, and again when it is over."""
        now = time.time()
        if not self._window or any(one.code is not None for one in seen) or len(self._window) != len(seen):
            self._window, self._opened = list(seen), now
            return None
        steps = min(one.polls - before.polls for one, before in zip(seen, self._window, strict=True))
        if any(one.phase not in ("step", "data") or one.step < 0 for one in seen):
            self._window = []  # a pause for something else; the time of steps does not show
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
        """Kind, rank and factor of what holds up this window's steps."""
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
        # who waits for devices holds up nobody: what its loop does besides is done meanwhile
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
