"""A run's timeline is drawn from its events."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from jaxmodels.launch import events
from jaxmodels.report import timeline
from jaxmodels.report.pieces import Picture, Table


def story(run: Path) -> None:
    """Three attempts: a rank is killed, a node is lost, and what is left ends."""
    moment = 1e9

    def tell(seconds: float, event: events.Name, **fields: object) -> None:
        events.append(run, event, time=moment + seconds, **fields)

    for attempt, (at, first, processes) in enumerate([(0, 0, 8), (70, 20, 8), (140, 40, 4)]):
        tell(at, "start", attempt=attempt, processes=processes, step=first or None)
        tell(at + 5, "phase", rank=0, phase="restore", step=0)
        tell(at + 10, "phase", rank=0, phase="compile", step=None)
        tell(at + 25, "phase", rank=0, phase="step", step=first)
        tell(at + 45, "saved", rank=0, phase="save", step=first + 20)
        if attempt == 0:
            tell(60, "failed", rank=3, kind="killed", phase="step", step=34, message="killed by SIGKILL")
        if attempt == 1:
            tell(110, "slow", rank=5, kind="slow", factor=1.8, since=moment + 100, phase="step", step=38)
            tell(120, "unsaved", rank=0, phase="save", step=40, message="No space left on device")
            tell(130, "failed", rank=4, kind="link", phase="step", step=55, message="node 1 has not been heard of")
    tell(260, "phase", rank=0, phase="evaluation", step=100)
    tell(290, "done", step=100)


def test_attempts_failures_and_what_was_slow_are_shown(tmp_path: Path) -> None:
    story(tmp_path)
    picture, table = timeline.show({"run": tmp_path})
    assert isinstance(picture, Picture) and isinstance(table, Table)
    above, below = picture.figure.axes
    assert {text.get_text() for text in above.texts} == {"killed, rank 3", "link, rank 4"}
    assert [label.get_text() for label in below.get_yticklabels()] == [
        f"{i} ({n} processes)" for i, n in enumerate((8, 8, 4))
    ]
    assert [np.min(line.get_ydata()) for line in above.lines if line.get_linestyle() == "-"] == [0, 20, 40]
    assert below.get_xlabel() == "minutes since the start"
    assert picture.caption == "3 attempts; the last event is: done."
    assert [row[1:3] for row in table.rows] == [("killed", "3"), ("slow", "5"), ("unsaved", "0"), ("link", "4")]
    assert table.rows[2][-1] == "No space left on device"
    assert picture.png().startswith(b"\x89PNG")


def test_a_run_without_events_has_no_timeline(tmp_path: Path) -> None:
    assert timeline.show({"run": tmp_path}) == []


def test_a_run_that_has_only_begun_has_one(tmp_path: Path) -> None:
    events.append(tmp_path, "start", attempt=0, processes=1)
    (picture,) = timeline.show({"run": tmp_path})
    assert isinstance(picture, Picture) and picture.caption == "1 attempt; under way."
    assert picture.png()
