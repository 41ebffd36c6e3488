"""What is normal for a run is learned from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest

from jaxmodels.launch import limits
from jaxmodels.launch.limits import Limits, Slow
from jaxmodels.launch.pauses import Pauses
from jaxmodels.launch.seen import Seen
from jaxmodels.parallel import progress


class Clock:
    """Time that a test moves on."""

    def __init__(self) -> None:
        self.now = 1000.0

    def time(self) -> float:
        return self.now

    monotonic = time


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(limits, "time", made)
    return made


def steps(clock: Clock, found: Limits, waits: list[float], data: list[float], windows: int = 4) -> list[Slow]:
    """Windows of 10 steps of a second each, in which each rank waits so long for its devices, and for its data."""
    seen = [Seen(rank, "host", "cpu", step=0, phase="step") for rank in range(len(waits))]
    said = [found.slow(seen)]
    for _ in range(windows):
        clock.now += 10
        seen = [
            dataclasses.replace(
                one,
                polls=one.polls + 10,
                device_wait=one.device_wait + 10 * wait,
                data_wait=one.data_wait + 10 * starved,
            )
            for one, wait, starved in zip(seen, waits, data, strict=True)
        ]
        said.append(found.slow(seen))
    return [one for one in said if one is not None]


@pytest.mark.parametrize(
    ("waits", "data", "said"),
    [
        ([0.9, 0.9, 0.9], [0.0, 0.0, 0.0], None),
        # rank 1 does something for half a second in which the others wait
        ([0.9, 0.1, 0.9], [0.0, 0.3, 0.0], ("slow", 1, 5.0)),
        ([0.9, 0.0, 0.9], [0.0, 0.6, 0.0], ("starved", 1, 10.0)),
        # rank 0 writes metrics while its devices work
        ([0.4, 0.9, 0.9], [0.0, 0.0, 0.0], None),
        # all wait for data
        ([0.4, 0.4], [0.5, 0.5], ("starved", None, 2.0)),
        ([0.4], [0.5], ("starved", 0, 2.0)),
        # alone, nothing says how long its own work should take
        ([0.1], [0.0], None),
    ],
)
def test_who_holds_up_the_steps_is_said_once_and_nobody_else(
    clock: Clock, waits: list[float], data: list[float], said: tuple[str, int | None, float] | None
) -> None:
    found = steps(clock, Limits(), waits, data)
    assert len(found) == (said is not None)
    for one in found:
        assert said is not None and (one.kind, one.rank) == said[:2] and one.since == 1000
        assert one.factor == pytest.approx(said[2], rel=0.01)


def test_a_holdup_that_is_over_is_said_with_its_end(clock: Clock) -> None:
    found = Limits()
    (slow,) = steps(clock, found, [0.9, 0.1], [0.0, 0.0])
    assert slow.until is None
    found._window = []  # an evaluation comes in between
    (over,) = steps(clock, found, [0.9, 0.9], [0.0, 0.0])
    assert (over.kind, over.rank, over.since) == ("slow", 1, 1000) and over.until == 1040
    found._window = []
    assert steps(clock, found, [0.9, 0.9], [0.0, 0.0]) == []


def paused(phase: str, age: float, normal: float, regular: bool = True) -> list[Seen]:
    return [Seen(0, "host", "cpu", phase=phase, polls=50, pauses=50, normal=normal, regular=regular, age=age)]


def test_a_pause_is_too_long_beyond_what_is_normal_and_then_hopeless(clock: Clock) -> None:
    found = Limits()
    assert found.overdue(paused("step", 0.0, 2.0)) is None
    assert found.overdue(paused("step", 16.9, 2.0)) is None
    late = found.overdue(paused("step", 17.1, 2.0))
    assert late is not None and (late.learned, late.hopeless) == (2.0, False)
    late = found.overdue(paused("step", 62.1, 2.0))
    assert late is not None and late.hopeless
    # what another attempt has shown is known in the next
    found.begin()
    assert found.overdue([dataclasses.replace(paused("step", 20.0, 0.0)[0], pauses=0)]) is not None


def reported(pauses: Sequence[float], phase: str = "step") -> tuple[int, float]:
    """What is known of these pauses, and what is normal, once a rank has reported them one by one."""
    past, report = Pauses(), bytearray(progress.LAYOUT.size + progress.KEPT * progress.PAUSE.size)
    for number, seconds in enumerate([1000.0, *pauses]):  # the first one of all compiles
        place = progress.LAYOUT.size + number % progress.KEPT * progress.PAUSE.size
        progress.PAUSE.pack_into(report, place, seconds, progress.PHASES.index(phase))
        progress.LAYOUT.pack_into(report, 0, 0, 0, 0.0, 0.0, 0.0, number + 1, phase.encode())
        past.take(bytes(report))
    return past.of(phase)


@pytest.mark.parametrize(
    ("series", "least", "most"),
    [
        # few pauses are generous
        ([10.0] * 3, 23.3, 23.4),
        ([10.0] * 8, 15.0, 15.0),
        # even steps, with a little noise
        ([1.0 + 0.01 * (n % 10) for n in range(200)], 1.1, 1.2),
        # every tenth step writes metrics for 20 s: that is normal, and twice that is not
        ([20.0 if n % 10 == 9 else 0.5 for n in range(200)], 20.0, 32.0),
        # steps become slower and slower, as sequences grow: the next one is normal
        ([1.0 + 0.05 * n for n in range(200)], 11.0, 20.0),
        # they became ten times slower long ago: what was before is forgotten
        ([1.0] * 1000 + [10.0] * 256, 10.0, 10.2),
        # a file system was away for a minute, once; and again: that is how it is here
        ([1.0] * 100 + [60.0] + [1.0] * 100, 1.0, 1.1),
        ([1.0] * 100 + [60.0] + [1.0] * 50 + [60.0] + [1.0] * 50, 60.0, 92.0),
        ([1.0] * 20 + [60.0], 60.0, 120.0),
    ],
    ids=["three", "eight", "even", "bimodal", "drift", "slower", "once", "twice", "early"],
)
def test_what_is_normal_is_the_median_and_the_spread_of_what_was(
    series: Sequence[float], least: float, most: float
) -> None:
    count, normal = reported(series)
    assert count == min(len(series), 256)
    assert least <= normal <= most + 1e-9


def test_a_long_evaluation_or_save_says_nothing_of_the_steps() -> None:
    past, report = Pauses(), bytearray(progress.LAYOUT.size + progress.KEPT * progress.PAUSE.size)
    series = [("step", 30.0), ("step", 1.0), ("save", 90.0), ("step", 1.0), ("save", 90.0), ("evaluation", 50.0)] * 8
    for number, (phase, seconds) in enumerate(series):
        place = progress.LAYOUT.size + number * progress.PAUSE.size
        progress.PAUSE.pack_into(report, place, seconds if number else 500.0, progress.PHASES.index(phase))
    progress.LAYOUT.pack_into(report, 0, 0, 0, 0.0, 0.0, 0.0, len(series), b"step")
    past.take(bytes(report))
    assert past.of("step")[1] == pytest.approx((1.0 + 1.5 * 29.0) * (1 + 4 / 23))
    assert past.of("save")[1] == pytest.approx(90.0 * (1 + 4 / 15))
    assert past.of("evaluation")[1] == pytest.approx(50.0 * (1 + 4 / 7))
    assert past.of("compile") == (0, 0.0)
    assert [past.regular(phase) for phase in ("step", "data", "evaluation", "save")] == [True, True, True, False]


@pytest.mark.parametrize("phase", ["save", "compile", "restore", "start"])
def test_where_nothing_bounds_a_phase_it_may_last_while_anything_is_computed(clock: Clock, phase: str) -> None:
    busy, idle = Limits(), Limits()
    for second in range(0, 200, 5):
        clock.now += 5
        one = dataclasses.replace(paused(phase, float(second), 1.0, False)[0], cpu=0.5 * second)
        assert busy.overdue([one]) is None
        late = idle.overdue([dataclasses.replace(one, cpu=3.0)])
        assert (late is not None) == (second > 75), second
        assert late is None or late.hopeless == (second > 120)
