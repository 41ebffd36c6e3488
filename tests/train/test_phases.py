"""The trainer's clock: every second belongs to one phase, and the record of it outlives a kill."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxmodels.train import phases
from jaxmodels.train.phases import Phases, Starved


class Now:
    """A clock that goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 1e6

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Now:
    clock = Now()
    monkeypatch.setattr(phases.time, "perf_counter", clock)
    monkeypatch.setattr(phases.time, "time", lambda: clock.now + 1e9)
    return clock


def spent(clock: Phases) -> dict[str, float]:
    return {name: seconds for name, seconds in clock.seconds().items() if seconds}


def test_every_second_is_one_phases_and_the_time_before_the_clock_is_the_starts(now: Now) -> None:
    told: list[tuple[str, int]] = []
    clock = Phases(began=now.now + 1e9 - 7, tell=lambda phase, step: told.append((phase, step)))
    now.now += 3
    clock.enter("step")
    now.now += 20
    clock.done(4)
    with clock.during("evaluation"):
        now.now += 5
        with clock.during("save"):
            now.now += 2
    now.now += 1
    assert spent(clock) == {"start": 10, "step": 21, "evaluation": 5, "save": 2}
    line = clock.line()
    assert (line["time"] - line["began"], line["step"], line["open"]) == (38, 4, 1)
    assert told == [("step", 0), ("evaluation", 4), ("save", 4), ("evaluation", 4), ("step", 4)]


def test_what_is_traced_within_a_trace_counts_once_and_never_beyond_its_phase(now: Now) -> None:
    clock = Phases()
    now.now += 10
    clock.enter("evaluation")
    now.now += 3
    clock.compiled(2)  # within the next one
    now.now += 1
    clock.compiled(4)
    now.now += 5
    clock.compiled(50)  # said to have begun before the phase did
    assert spent(clock) == {"start": 10, "compile": 9}


def test_compilations_of_the_main_thread_are_heard_and_not_those_of_others() -> None:
    with Phases().watched() as clock:
        jax.jit(lambda x: jnp.sin(x) * 2.5 + 1)(jnp.ones(3)).block_until_ready()
        here = clock.seconds()["compile"]
        thread = threading.Thread(target=lambda: jax.jit(lambda x: jnp.cos(x) * 3.5 - 1)(jnp.ones(3)))
        thread.start()
        thread.join()
        assert 0 < here == clock.seconds()["compile"]
    jax.jit(lambda x: jnp.tan(x) - 4)(jnp.ones(3))
    assert clock.seconds()["compile"] == here


def test_a_record_keeps_a_line_a_save_and_its_last_line_is_the_newest(tmp_path: Path, now: Now) -> None:
    clock = Phases()
    clock.record(tmp_path, devices=8)
    clock.enter("step")
    for step in (10, 20):
        now.now += step
        clock.done(step)
        clock.keep()
    now.now += 2
    assert clock._record is not None
    clock._record.write()  # as its thread does each second; a kill here loses no more than that second
    first, second, last = phases.read(tmp_path)
    assert [(row["step"], row["seconds"]["step"], row["devices"]) for row in (first, second)] == [
        (10, 10, 8),
        (20, 30, 8),
    ]
    assert (last["step"], last["seconds"]["step"], last["open"], last["ended"]) == (20, 32, 2, None)
    clock._record.close()


def test_a_torn_line_costs_no_other(tmp_path: Path, now: Now) -> None:
    (tmp_path / phases.FILE).write_bytes(b'{"began": 1, "ti')
    with Phases().watched() as clock:
        clock.record(tmp_path)
        clock.ended = "done"
    with pytest.raises(KeyError), Phases().watched() as other:
        other.record(tmp_path)
        raise KeyError("x")
    assert [row["ended"] for row in phases.read(tmp_path)] == ["done", "failed: KeyError"]
    assert all(len(line) == 1023 for line in (tmp_path / phases.FILE).read_bytes().split(b"\n")[:3])


def test_a_disk_that_takes_nothing_costs_no_run(tmp_path: Path) -> None:
    with Phases().watched() as clock:
        clock.record(tmp_path / "gone")
        clock.keep()
    assert phases.read(tmp_path) == []


class Step:
    """A step's metrics, which a device is done with when it is told to be."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def is_ready(self) -> bool:
        return self.event.is_set()

    def block_until_ready(self) -> Step:
        self.event.wait()
        return self


def test_a_wait_for_data_counts_as_far_as_the_devices_had_nothing_to_do(
    monkeypatch: pytest.MonkeyPatch, now: Now
) -> None:
    monkeypatch.setattr(phases.jax, "Array", Step)
    starved = Starved()

    def step(device: float, data: float) -> float:
        """A step that takes so long on the device, while the next batch takes so long to come."""
        metrics: Any = Step()
        starved.dispatched(metrics)
        asked = now.now
        now.now += min(device, data)
        if device <= data:
            metrics.event.set()
            if starved.ended is not None:
                starved.ended.result(timeout=60)  # its thread has seen what time it is
            now.now += data - device
        idle = starved.wait(asked, {"loss": metrics})
        metrics.event.set()
        return idle

    assert step(0.2, 0.05) == 0  # the device was not done
    assert step(0.1, 0.3) == pytest.approx(0.2)
    starved.noticed = False  # as after a batch that was there at once
    assert step(0.1, 0.3) == pytest.approx(0.3)  # the first wait counts in full
    assert starved.wait(now.now - 0.05, None) == pytest.approx(0.05)
    starved.close()


def test_a_mark_costs_next_to_nothing() -> None:
    clock = Phases()
    began = time.thread_time()  # what other threads of this process do is not its cost
    for step in range(2000):
        with clock.during("data"):
            pass
        clock.done(step)
    # two changes a step; 0.2 % of the shortest step worth a thought, 50 ms, is 100 microseconds
    assert (time.thread_time() - began) / 2000 < 1e-4


def test_lines_are_whole_whatever_they_say(tmp_path: Path) -> None:
    (tmp_path / phases.FILE).write_text("[]\n" + json.dumps({"began": 1, "time": 2, "step": True}) + "\nnull\n\xff\n")
    assert phases.read(tmp_path) == []
