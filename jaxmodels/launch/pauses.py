"""How long is normal for a rank's pauses in each phase: their median, and how far they spread."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence

from jaxmodels.parallel.progress import KEPT, LAYOUT, PAUSE, PHASES

ENOUGH = 3
"""Pauses in a phase from which on they say how long the next one may last."""
REGULAR = ("step", "data", "evaluation")
"""Phases that come again and again in the same way."""

_REMEMBERED = 256
_MANY = 50
# of the newest pauses that a report keeps, so many may be written over while it is read
_UNSAFE = 16


def normal(pauses: Sequence[float]) -> float:
    """Seconds that the next pause may last: the median, and one and a half times the way from there to the longest.

    Of many pauses the longest is left out, so that one alone changes nothing, and two of a kind do. Few pauses say
    little of the next one, so that it may last longer: twice as long after four, a twelfth after fifty.
    """
    ordered = sorted(pauses)
    middle, longest = statistics.median(ordered), ordered[-2 if len(ordered) >= _MANY else -1]
    return (middle + 1.5 * (longest - middle)) * (1 + 4 / len(ordered))


class Pauses:
    """The newest pauses of one rank, by phase, taken from its reports."""

    def __init__(self) -> None:
        self._taken = 0
        self._known: dict[str, deque[float]] = {}

    def take(self, report: bytes) -> None:
        """Take the pauses of a report that have come since the one before; of very many, the newest."""
        count = LAYOUT.unpack_from(report)[5]
        for number in range(max(self._taken, count - KEPT + _UNSAFE), count):
            seconds, phase = PAUSE.unpack_from(report, LAYOUT.size + number % KEPT * PAUSE.size)
            if phase not in range(len(PHASES)):
                continue
            # the first one is no measure of the others: programs are loaded and compiled, caches filled
            known = self._known.get(PHASES[phase])
            if known is None:
                self._known[PHASES[phase]] = deque(maxlen=_REMEMBERED)
            else:
                known.append(seconds)
        self._taken = count

    def of(self, phase: str) -> tuple[int, float]:
        """How many pauses in a phase are known, and how long one may normally last."""
        known = self._known.get(phase, ())
        return len(known), normal(known) if known else 0.0

    def regular(self, phase: str) -> bool:
        """Whether a phase's past alone says how long it may last."""
        # who has never left the start tells of no phases, and polls alone
        return phase in REGULAR or (phase == "start" and self._known.keys() == {"start"})
