from __future__ import annotations

import pytest

from jaxmodels.launch.console import Console


def test_a_mistake_that_all_ranks_make_is_shown_once(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(2)
    for rank in (1, 0):
        console.line(rank, "jaxmodels: error: got x, expected y")
        console.line(rank, "loaded")
    assert capsys.readouterr().out == "[1] jaxmodels: error: got x, expected y\n[1] loaded\n[0] loaded\n"


def test_ranks_line_up(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(11)
    console.line(3, "x")
    console.line(10, "y")
    assert capsys.readouterr().out == "[ 3] x\n[10] y\n"


def test_a_redrawn_line_keeps_its_prefix_and_makes_way_for_others(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(2)
    console.redraw(0, "step 1")
    console.redraw(0, "\r\x1b[2Kstep 2")
    console.line(1, "warning")
    console.redraw(0, "\r\x1b[2Kstep 3\nended\n")
    assert capsys.readouterr().out == (
        "[0] step 1\r\x1b[2K[0] step 2\r\x1b[2K[1] warning\n\r\x1b[2K[0] step 3\n[0] ended\n"
    )
    assert [line for line in console.tails[0] if line] == ["step 3", "ended"]
