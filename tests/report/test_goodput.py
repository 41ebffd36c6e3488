"""Where a run's time went, from records with known times: kills, hangs, other meshes, names used again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jaxmodels import cli
from jaxmodels.errors import UserError
from jaxmodels.launch import events
from jaxmodels.report.goodput import BUCKETS, account, duration, table
from jaxmodels.train import phases

Line = dict[str, Any]


def line(began: float, step: int, first: int | None = 0, **more: Any) -> Line:
    """A line of an attempt that began at a time; `seconds` and the rest by name."""
    seconds = {name: float(more.pop(name, 0)) for name in phases.PHASES if name != "step"}
    seconds["step"] = float(more.pop("steps", 0))
    at = began + sum(seconds.values())
    row = {"began": began, "time": at, "first": first, "step": step, "saved": None, "phase": "step", "open": 0.0}
    return {**row, "ended": None, "seconds": seconds, "devices": 8, "mesh": "fsdp=8", "config": "a", **more}


def run(folder: Path, *lines: Line, checkpoints: tuple[int, ...] = ()) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / phases.FILE).write_text("".join(json.dumps(each) + "\n" for each in lines))
    for step in checkpoints:
        (folder / "checkpoints" / str(step)).mkdir(parents=True)
    return folder


def spent(found: dict[str, Any]) -> dict[str, float]:
    """The buckets that have time, once they are seen to add up."""
    assert set(found["seconds"]) == set(BUCKETS)
    assert sum(found["seconds"].values()) == pytest.approx(found["wall_seconds"], rel=1e-9)
    return {name: seconds for name, seconds in found["seconds"].items() if seconds}


KILLED = (
    line(1000, 100, start=20, compile=30, steps=100, data=10, save=2, saved=50),
    # 30 more steps of a second, and half of the next one
    line(1000, 130, start=20, compile=30, steps=130.5, data=16, save=4, evaluation=5, open=0.5, saved=100),
)
WENT_ON = line(1300, 200, 100, start=15, restore=3, compile=5, steps=100, save=2, ended="done", saved=200)


def test_steps_behind_the_checkpoint_that_a_kill_left_are_lost(tmp_path: Path):
    found = account(run(tmp_path / "run", *KILLED, WENT_ON, checkpoints=(150, 200)))
    assert spent(found) == {
        "productive": 200, "data wait": 10, "start": 35, "restore": 3, "compile": 35, "evaluation": 5, "save": 6,
        "lost work": 36.5, "restart": 1300 - (1000 + 205.5),
    }  # fmt: skip
    assert found["wall_seconds"] == 425 and found["goodput"] == 200 / 425 and found["steps"] == 200
    assert [each["ended"] for each in found["attempts"]] == ["killed", "done"]


def test_a_later_attempt_that_begins_further_back_makes_the_work_of_several_lost(tmp_path: Path):
    third = line(1500, 200, 50, start=1, steps=150, ended="done", saved=200)
    found = account(run(tmp_path / "run", *KILLED, WENT_ON | {"ended": None}, third, checkpoints=(200,)))
    # 50 of the first attempt's steps stay, half of what it had at its save of 100, with half of the waits
    assert spent(found)["productive"] == 50 + 150
    assert spent(found)["lost work"] == 50 + 30.5 + 5 + 6 + 100
    assert spent(found)["data wait"] == 5


def test_what_was_not_saved_is_lost_as_long_as_nobody_has_gone_on(tmp_path: Path):
    folder = run(tmp_path / "run", *KILLED, checkpoints=(50, 100))
    assert spent(account(folder))["lost work"] == 36.5
    assert spent(account(folder, now=KILLED[-1]["time"] + 1))["productive"] == 130.5  # it runs
    stopped = run(tmp_path / "stopped", KILLED[0], KILLED[1] | {"ended": "preempted"})
    assert "lost work" not in spent(account(stopped))


def test_a_hang_is_idle_but_for_the_step_that_was_under_way(tmp_path: Path):
    hung = line(1000, 100, start=20, steps=400, open=300)
    found = account(run(tmp_path / "run", line(1000, 100, start=20, steps=100), hung, checkpoints=(100,)))
    assert spent(found) == {"productive": 100, "start": 20, "lost work": 1, "idle": 299}


def test_steps_that_wait_for_another_rank_are_not_all_productive(tmp_path: Path):
    # in its loop it is at steps for 200 s of 250
    folder = run(tmp_path / "run", line(1000, 200, start=50, steps=200, save=50, saved=200, ended="done"))
    events.append(folder, "start", time=1010, processes=4)
    slow = {"rank": 2, "kind": "slow", "factor": 2.0, "since": 1100}
    events.append(folder, "slow", time=1115, **slow)
    # 100 s, of which 80 are steps, that took twice as long
    events.append(folder, "slow", time=1210, **slow, until=1200)
    events.append(folder, "slow", time=1250, rank=3, kind="starved", factor=4.0, since=1240)
    # warnings without a factor end nothing; nor does what all ranks wait for count, which rank 0 has seen itself
    events.append(folder, "slow", time=1255, rank=1, kind="stuck", since=1250)
    events.append(folder, "slow", time=1270, rank=None, kind="starved", factor=2.0, since=1260)
    events.append(folder, "slow", time=1280, rank=0, kind="starved", factor=2.0, since=1270)
    events.append(folder, "done", time=1300)
    lost = {"straggler": 80 * (1 - 1 / 2), "data wait": 20 * 0.8 * (1 - 1 / 4)}
    found = spent(account(folder))
    assert found == pytest.approx({"productive": 200 - sum(lost.values()), "start": 50, "save": 50, **lost})


def test_the_only_process_has_no_straggler(tmp_path: Path):
    folder = run(tmp_path / "run", line(1000, 200, steps=200, saved=200, ended="done"))
    events.append(folder, "start", time=1010, processes=1)
    events.append(folder, "slow", time=1115, rank=0, kind="slow", factor=2.0, since=1100)
    assert spent(account(folder)) == {"productive": 200}


def test_time_between_attempts_is_a_restart_after_a_failure_and_idle_after_a_stop(tmp_path: Path):
    def between(ended: str | None) -> dict[str, float]:
        first = line(0, 10, steps=10, saved=10, ended=ended)
        return spent(account(run(tmp_path / "run", first, line(100, 20, 10, steps=10, ended="done"))))

    assert between(None) == between("failed: RuntimeError") == {"productive": 20, "restart": 90}
    assert between("preempted") == between("failed: KeyboardInterrupt") == {"productive": 20, "idle": 90}


def test_other_devices_and_attempts_without_a_step_are_in_their_places(tmp_path: Path):
    never = line(1250, 0, None, start=10, restore=2, devices=4, mesh="fsdp=4")
    found = account(run(tmp_path / "run", *KILLED, never, WENT_ON | {"devices": 4, "mesh": "fsdp=4"}))
    assert spent(found)["restart"] == 425 - 205.5 - 125 - 12
    assert [(each["devices"], each["first"]) for each in found["attempts"]] == [(8, 0), (4, None), (4, 100)]


def test_a_name_that_is_used_again_counts_its_newest_run_alone(tmp_path: Path):
    another = line(5000, 30, start=5, steps=30, ended="done", saved=30)
    found = account(run(tmp_path / "run", *KILLED, WENT_ON, another))
    assert spent(found) == {"productive": 30, "start": 5} and found["left_out"] == 2
    # one that failed before its first checkpoint begins at 0 too, and is the same run
    failed = line(4900, 7, start=5, steps=7)
    found = account(run(tmp_path / "run", failed, another))
    assert spent(found) == {"productive": 30, "start": 10, "lost work": 7, "restart": 88} and not found["left_out"]
    found = account(run(tmp_path / "run", failed | {"config": "b"}, another))
    assert spent(found) == {"productive": 30, "start": 5} and found["left_out"] == 1


def test_a_run_without_times_and_what_is_no_run_get_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(UserError, match="expected one trained since they are kept"):
        account(run(tmp_path / "old"))
    assert cli.main(["goodput", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_command_prints_a_table_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = run(tmp_path / "run", *KILLED, WENT_ON)
    events.append(folder, "failed", time=1206.0, rank=3, host="node-7", kind="memory")
    assert cli.main(["goodput", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "200 steps in 7 min 5 s, goodput 47.1%" in shown and "memory (rank 3 on node-7)" in shown
    assert all(f"\n{name}" in shown for name in BUCKETS)
    assert cli.main(["goodput", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == account(folder)


def test_what_the_record_cannot_tell_is_said(tmp_path: Path):
    found = account(run(tmp_path / "run", WENT_ON, line(1350, 210, 200, steps=10, ended="done")))
    assert "the first 100 steps were taken before times were kept" in table(found)
    assert "attempts overlap by 75.0 s" in table(found)


def test_durations_read_as_people_say_them():
    assert [duration(each) for each in (3.14, 245, 12_000, 183_600)] == ["3.1 s", "4 min 5 s", "3 h 20 min", "2 d 3 h"]
