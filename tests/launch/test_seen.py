"""Which ranks are named when none goes on: from counts and stacks as ranks leave them in the supervisor's folder."""

from __future__ import annotations

import functools
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jaxmodels import cli
from jaxmodels.data.loader import Loader, ahead
from jaxmodels.launch import seen as module
from jaxmodels.launch.pauses import Pauses
from jaxmodels.launch.seen import Frame, Seen, grouped, held_up_by, stacks
from jaxmodels.launch.watch import first_failure
from jaxmodels.parallel import progress

PYTHON: list[Frame] = [("/srv/own.py", "7", "read"), ("/srv/main.py", "1", "<module>")]
DEVICE: list[Frame] = [("/x/site-packages/jax/_src/array.py", "9", "block_until_ready"), ("/srv/main.py", "2", "run")]
BARRIER: list[Frame] = [("/x/jaxmodels/parallel/distributed.py", "9", "barrier")]


def ranks(*polls: int) -> list[Seen]:
    return [Seen(index, "host", "cpu", polls=count) for index, count in enumerate(polls)]


@pytest.mark.parametrize(
    ("states", "stuck"),
    [
        ([(20, DEVICE), (20, PYTHON), (20, DEVICE)], [1]),
        ([(20, DEVICE), (20, PYTHON), (20, DEVICE), (20, PYTHON)], [1, 3]),
        ([(21, DEVICE), (20, PYTHON), (21, PYTHON)], [1]),
        ([(20, BARRIER), (20, PYTHON)], [1]),
        ([(20, PYTHON), (20, PYTHON)], [0, 1]),
        ([(20, PYTHON)], [0]),
        # compiling and reading before the first step take their time
        ([(0, PYTHON), (0, PYTHON)], []),
        # nothing sets these apart
        ([(20, DEVICE), (20, DEVICE)], []),
        ([(20, DEVICE), (19, DEVICE), (19, DEVICE)], [1, 2]),
    ],
)
def test_all_ranks_that_the_others_wait_for_are_named(states: list[tuple[int, list[Frame]]], stuck: list[int]) -> None:
    found = dict(enumerate(stack for _, stack in states))
    assert [one.rank for one in held_up_by(ranks(*(count for count, _ in states)), found)] == stuck


def test_all_of_several_stuck_ranks_are_in_the_message() -> None:
    found = first_failure(ranks(20, 20, 20), {0: PYTHON, 1: DEVICE, 2: PYTHON}, "no progress for 9 s")
    assert found is not None and found.rank is not None and (found.kind, found.rank.rank) == ("stuck", 0)
    assert (
        found.why == "no progress for 9 s, stuck at /srv/own.py:7 in read; rank 2 too: stuck at /srv/own.py:7 in read"
    )


def test_stacks_are_grouped_by_likeness_the_odd_ones_first() -> None:
    groups = grouped({0: DEVICE, 1: DEVICE, 2: PYTHON, 3: DEVICE})
    assert [group["ranks"] for group in groups] == [[2], [0, 1, 3]]
    assert groups[0]["stack"] == ["/srv/own.py:7 in read", "/srv/main.py:1 in <module>"]


def test_a_process_says_how_far_it_is_and_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXMODELS_PROGRESS_DIR", str(tmp_path))
    monkeypatch.setenv("JAXMODELS_PROCESS_ID", "3")
    monkeypatch.setattr(progress, "_report", None)
    monkeypatch.setattr(module, "_ANSWER_SECONDS", 0.1)
    progress.begin()
    assert "JAXMODELS_PROGRESS_DIR" not in os.environ, "a child would report for it"
    one = Seen(3, "host", "cpu")
    progress.phase("step", 5)
    for pause in (1.0, 0.0, 0.05):
        time.sleep(pause)
        progress.phase("data")
        progress.phase("step")
        progress.waited(device=1.5, data=0.25)
        progress.poll()
    past = Pauses()
    one.read(tmp_path, past)
    assert (one.phase, one.step, one.polls, one.pauses) == ("step", 5, 3, 2)
    assert (one.device_wait, one.data_wait) == (4.5, 0.75)
    # the first pause is no measure, and what a step takes before it asks for its data and after is one
    assert 0.05 * 3 <= one.normal < 1.0 * 3
    for _ in range(5000):  # more than a report keeps: the newest count
        progress.poll()
    one.read(tmp_path, past)
    assert 2 < one.pauses < 64 and past.of("data")[0] == 2
    assert one.age < 5
    progress.failed(MemoryError("no room"))
    assert (tmp_path / "3.error").exists()
    (stack,) = stacks(tmp_path, {3: os.getpid()}).values()
    assert any(function == "test_a_process_says_how_far_it_is_and_where" for _, _, function in stack)


def test_a_rank_whose_data_worker_is_stuck_is_where_its_worker_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAXMODELS_PROGRESS_DIR", str(tmp_path))
    monkeypatch.setenv("JAXMODELS_PROCESS_ID", "0")
    monkeypatch.setattr(progress, "_report", None)
    progress.begin()
    done = threading.Event()

    def batch_that_hangs(indices: Any, epochs: Any) -> dict[str, Any]:
        done.wait(30)
        return {}

    rows: Any = lambda step: np.zeros(1)  # noqa: E731
    source, order = SimpleNamespace(batch=batch_that_hangs), SimpleNamespace(indices=rows, epochs=rows)
    some: Any = SimpleNamespace(source=source, order=order, rows=slice(None))

    found: list[list[Frame]] = []

    def look() -> None:
        time.sleep(0.3)
        found.extend(stacks(tmp_path, {0: os.getpid()}).values())
        done.set()

    looker = threading.Thread(target=look)
    looker.start()
    list(ahead(functools.partial(Loader.local, some), range(1), 1))
    looker.join()
    assert "batch_that_hangs" in [function for _, _, function in found[0]]


@pytest.mark.parametrize("words", [["eval", "nowhere"], ["tune", "configs/mlp_mnist.py"]])
def test_an_evaluation_and_a_search_report_too(
    words: list[str], root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun: list[bool] = []
    monkeypatch.chdir(root)
    monkeypatch.setattr(progress, "begin", lambda: begun.append(True))
    assert cli.main(words) == 2
    assert begun == [True], capsys.readouterr().err
