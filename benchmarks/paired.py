"""Whether one program is slower than another, from turns that they took on a machine that is never quiet.

Three processes take turns in a round: two of the base, whose ratio says what the machine's noise is, and one of the
head. A block is some rounds of the same three processes; the next block starts them anew, since where a process's
memory and threads happen to lie slows it for its whole life.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

DRAWS = 2000
"""Resamplings of the bootstrap."""
CONFIDENCE = 0.95
"""Of the two-sided interval."""
LEAST = 0.01
"""The slowdown below which nothing is said, however quiet the machine is."""
SEEN = 0.05
"""The slowdown that is to be seen: blocks are added until it would be."""
ENOUGH = 0.02
"""What has to be left of it between threshold and interval, so that it is seen whichever way the noise falls."""


class Turn(NamedTuple):
    """Seconds of a round: of the base, of the base in another process, and of the head."""

    base: float
    again: float
    head: float


class Verdict(NamedTuple):
    """How much slower the head is, as shares of the base's time."""

    slowdown: float
    low: float
    high: float
    """The interval of the slowdown."""
    noise: float
    """Half the width of the same interval of the base against itself."""
    threshold: float
    """What the whole interval has to be above."""

    @property
    def slower(self) -> bool:
        return self.low > self.threshold

    @property
    def fine(self) -> bool:
        """Whether more blocks would say nothing new: a slowdown of 5 % would have been seen, or one was."""
        return self.slower or self.least + ENOUGH < SEEN

    @property
    def least(self) -> float:
        """The smallest slowdown that would be seen if the noise added nothing to it."""
        return (self.high - self.low) / 2 + self.threshold

    def line(self) -> str:
        """Say it in one line."""
        found = f"the head's time is {self.slowdown:+.1%} ({self.low:+.1%} to {self.high:+.1%}) from the base's"
        how = f"threshold {self.threshold:.1%}, as this machine tells the base from itself to ±{self.noise:.1%}"
        if self.slower:
            return f"SLOWER: {found}; {how}"
        blind = (
            "" if self.fine else f"; a slowdown below {self.least + ENOUGH:.1%} could be missed on a machine this busy"
        )
        return f"not slower: {found}; {how}{blind}"


def verdict(blocks: Sequence[Sequence[Turn]], seed: int = 0) -> Verdict:
    """Judge turns, at least two blocks of them.

    A block's slowdown is the mean of the medians over its rounds of the logarithms of head ÷ base, for the base's two
    processes: a ratio of two processes is as likely to be late as early, which one with their mean is not. The interval
    is the bootstrap's over blocks, and at least Student's.
    """
    head = np.array([(_block(turns, 2, 0) + _block(turns, 2, 1)) / 2 for turns in blocks])
    base = np.array([_block(turns, 1, 0) for turns in blocks])
    low, high = interval(head, seed)
    far = interval(base, seed + 1)
    # of two processes the base's own difference has 2 parts of noise, and the head's from their mean has 1.5
    noise = (far[1] - far[0]) / 2 * math.sqrt(1.5 / 2)
    slowdown, low, high = (math.expm1(each) for each in (head.mean(), low, high))
    return Verdict(slowdown, low, high, noise, max(LEAST, noise))


def _block(turns: Sequence[Turn], one: int, other: int) -> float:
    """The median over rounds of the logarithm of one process's time ÷ another's."""
    return float(np.median([math.log(turn[one] / turn[other]) for turn in turns]))


def interval(values: np.ndarray, seed: int) -> tuple[float, float]:
    """Return the interval of a mean: the bootstrap's, and at least Student's: few values make it too narrow."""
    from scipy.stats import t

    drawn = np.random.default_rng(seed).choice(values, (DRAWS, len(values))).mean(1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(drawn, (tail, 1 - tail))
    reach = t.ppf(1 - tail, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return min(float(low), float(values.mean() - reach)), max(float(high), float(values.mean() + reach))
