"""Which ranks are named when none goes on: from counts and stacks as ranks leave them in the launcher's folder."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any, cast

import pytest

from jaxmodels.launch import progress
from jaxmodels.launch.progress import Progress
from jaxmodels.launch.watch import Rank, judge

MAIN = "0x00007f0000000001"
PYTHON = '/srv/own.py", line 7 in read'
DEVICE = '/x/site-packages/jax/_src/array.py", line 9 in block_until_ready'
BARRIER = '/x/jaxmodels/parallel/distributed.py", line 9 in barrier'


class Process:
    """Answers SIGUSR1 as faulthandler does: all threads, each with its innermost frame first."""

    pid = 2**30

    def __init__(self, path: Path, frame: str) -> None:
        self.path, self.frame = path, frame
        path.write_text(MAIN + "\n")

    def send_signal(self, number: int) -> None:
        assert number == signal.SIGUSR1
        with self.path.open("a") as file:
            file.write(f'Thread 0x00007f0000000002:\n  File "{DEVICE}\n\n')
            file.write(f'Current thread {MAIN} (most recent call first):\n  File "{self.frame}\n')


@pytest.fixture
def ranks(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "_ANSWER_SECONDS", 0.0)

    def make(*states: tuple[int, str]) -> list[Rank]:
        made = []
        for index, (count, frame) in enumerate(states):
            (tmp_path / f"{index}.report").write_text(f"{count:020d}")
            made.append(Rank(index, cast(Any, Process(tmp_path / f"{index}.stack", frame))))
        return made

    return make


@pytest.mark.parametrize(
    ("states", "stuck"),
    [
        ([(20, DEVICE), (20, PYTHON), (20, DEVICE)], [1]),
        ([(20, DEVICE), (20, PYTHON), (20, DEVICE), (20, PYTHON)], [1, 3]),
        ([(21, DEVICE), (20, PYTHON), (21, PYTHON)], [1]),
        ([(20, BARRIER), (20, PYTHON)], [1]),
        ([(20, PYTHON), (20, PYTHON)], [0, 1]),
        # compiling and reading before the first step take their time
        ([(0, PYTHON), (0, PYTHON)], []),
        # nothing sets these apart
        ([(20, DEVICE), (20, DEVICE)], []),
        ([(20, DEVICE), (19, DEVICE), (19, DEVICE)], [1, 2]),
    ],
)
def test_all_ranks_that_the_others_wait_for_are_named(
    ranks: Any, tmp_path: Path, states: list[tuple[int, str]], stuck: list[int]
) -> None:
    every = ranks(*states)
    found = Progress(tmp_path).find_stuck(every)
    assert [rank.index for rank in found] == stuck
    assert [rank.index for rank in every if rank.stuck] == stuck
    assert all(f"{states[i][0]} polls after its start" in every[i].stuck for i in stuck)


def test_a_stall_is_warned_of_once_and_names_each_rank_and_place(ranks: Any, tmp_path: Path) -> None:
    every, watched = ranks((20, PYTHON), (20, DEVICE), (20, PYTHON)), Progress(tmp_path, patience=0.0)
    assert watched.stall_warning(every) == ""  # it has just seen them for the first time
    said = watched.stall_warning(every)
    assert "rank 0 is stuck at /srv/own.py:7 in read" in said and "rank 2 is stuck at" in said
    assert said.endswith("and the others wait for them")
    assert watched.stall_warning(every) == ""
    (tmp_path / "0.report").write_text("21")
    assert watched.stall_warning(every) == "" and not any(rank.stuck for rank in every)


def test_all_of_several_stuck_ranks_are_in_the_last_message(ranks: Any, tmp_path: Path) -> None:
    every = ranks((20, PYTHON), (20, DEVICE), (20, PYTHON))
    Progress(tmp_path).find_stuck(every)
    code, said = judge(every, [[], [], []], "still running 6 s after it was told to stop", began=0.0)
    assert code == 1 and said.startswith("rank 0 failed first")
    assert "told to stop, stuck at /srv/own.py:7 in read" in said
    assert "; rank 2 too: stuck at /srv/own.py:7 in read" in said
