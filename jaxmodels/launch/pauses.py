"""How long a rank's pauses normally last in each phase, from the median and spread of the earlier ones.

A pause is the time from one poll to the next in a phase of the loop, and the whole length of any other phase.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence

from jaxmodels.parallel.progress import KEPT, LAYOUT, PAUSE, PHASES

ENOUGH = 3
"""Number of pauses in a phase that are needed to say how long the next one may last."""
REGULAR = ("step", "data", "evaluation")
"""Phases that recur with similar pauses."""

_REMEMBERED = 256
_MANY = 50
# so many of the oldest pauses in a report may be overwritten while it is read
_UNSAFE = 16


def normal(pauses: Sequence[float]) -> float:
    """Return the seconds that the next pause may last: the median plus 1.5 times its distance to the longest pause.

    Of 50 pauses or more the longest is left out, so that a single outlier changes nothing, but two do. Few pauses say
    little about the next one, so the result is multiplied by 1 + 4 / count.
    """
    ordered = sorted(pauses)
    middle, longest = statistics.median(ordered), ordered[-2 if len(ordered) >= _MANY else -1]
    return (middle + 1.5 * (longest - middle)) * (1 + 4 / len(ordered))


class Pauses:
    """The newest pauses of one rank, by phase, from its reports."""

    def __init__(self) -> None:
        self._taken = 0
        self._known: dict[str, deque[float]] = {}

    def take(self, report: bytes) -> None:
        """Add the pauses of a report that are new since the last one, as far as the report still has them."""
        count = LAYOUT.unpack_from(report)[5]
        for number in range(max(self._taken, count - KEPT + _UNSAFE), count):
            seconds, phase = PAUSE.unpack_from(report, LAYOUT.size + number % KEPT * PAUSE.size)
            if phase not in range(len(PHASES)):
                continue
            # the first pause is unlike the others: programs are loaded and compiled, caches filled
            known = self._known.get(PHASES[phase])
            if known is None:
                self._known[PHASES[phase]] = deque(maxlen=_REMEMBERED)
            else:
                known.append(seconds)
        self._taken = count

    def of(self, phase: str) -> tuple[int, float]:
        """Return how many pauses in a phase are known, and how many seconds one may normally last."""
        known = self._known.get(phase, ())
        return len(known), normal(known) if known else 0.0

    def regular(self, phase: str) -> bool:
        """Whether earlier pauses alone limit how long one in this phase may last."""
        # a command that reports no phases stays in the first one, and only polls
        return phase in REGULAR or (phase == "start" and self._known.keys() == {"start"})
