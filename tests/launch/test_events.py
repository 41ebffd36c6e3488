from __future__ import annotations

import json
from pathlib import Path

from jaxmodels.launch import events


def test_an_event_says_when_where_and_what_and_is_read_back(tmp_path: Path) -> None:
    run = tmp_path / "run"
    events.append(run, "start", attempt=0, processes=2)
    said = events.append(run, "failed", kind="killed", rank=1, phase="step", step=7, time=12.5)
    assert {"time", "event", "rank", "host", "phase", "step", "kind"} <= said.keys() and said["time"] == 12.5
    assert events.read(run)[1] == said
    assert [row["event"] for row in events.read(run)] == ["start", "failed"]


def test_a_torn_line_costs_no_other_event(tmp_path: Path) -> None:
    events.append(tmp_path, "start")
    with (tmp_path / events.FILE).open("a") as file:
        file.write('{"time": 3, "event": "sav')
    assert [row["event"] for row in events.read(tmp_path)] == ["start"]
    events.append(tmp_path, "done")
    (tmp_path / events.FILE).open("a").write(json.dumps({"event": "unheard of", "time": 1}) + "\n[]\n\n")
    assert [row["event"] for row in events.read(tmp_path)] == ["start", "done"]


def test_a_run_without_events_has_none(tmp_path: Path) -> None:
    assert events.read(tmp_path) == []
