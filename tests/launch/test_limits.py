"""What is normal for a run is learned from it."""

from __future__ import annotations

import dataclasses

import pytest

from jaxmodels.launch import limits
from jaxmodels.launch.limits import Limits, Slow
from jaxmodels.launch.seen import Seen


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


def paused(phase: str, age: float, longest: float, **more: float) -> list[Seen]:
    return [Seen(0, "host", "cpu", phase=phase, polls=50, pauses=50, longest=longest, age=age, **more)]  # type: ignore[arg-type]


def test_a_pause_is_too_long_beyond_the_longest_so_far_and_then_hopeless(clock: Clock) -> None:
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


@pytest.mark.parametrize("phase", ["save", "compile", "restore", "start"])
def test_where_nothing_bounds_a_phase_it_may_last_while_anything_is_computed(clock: Clock, phase: str) -> None:
    busy, idle = Limits(), Limits()
    for second in range(0, 200, 5):
        clock.now += 5
        one = dataclasses.replace(paused(phase, float(second), 1.0)[0], pauses=4, cpu=0.5 * second)
        assert busy.overdue([one]) is None
        late = idle.overdue([dataclasses.replace(one, cpu=3.0)])
        assert (late is not None) == (second > 75), second
        assert late is None or late.hopeless == (second > 120)
