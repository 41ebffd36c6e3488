"""`benchmarks.record` and the dispatch of `python -m benchmarks`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import record, startup
from benchmarks.__main__ import BENCHMARKS, FOUND, main


def test_interleaved_functions_take_turns_after_one_call_each_to_compile():
    calls = []
    times = record.interleave({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=3)
    assert calls == list("abc") + list("abc") * 3
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 3, "b": 3, "c": 3}
    assert all(second >= 0 for seconds in times.values() for second in seconds)


def test_a_record_names_hardware_versions_commit_and_command(tmp_path):
    drawn = []
    path = record.write(
        "made",
        "A title",
        [{"n": 1, "ms": 0.00012, "all": [1]}, {"n": 2000, "ms": None}],
        out=tmp_path,
        notes=["a note"],
        columns={"n": "n", "ms": "ms"},
        plot=lambda figure, rows: drawn.append(rows),
    )
    saved = json.loads((tmp_path / "made.json").read_text())
    assert set(saved) >= {"hardware", "cores", "versions", "commit", "changed", "command", "time", "rows", "notes"}
    assert saved["hardware"] and saved["cores"] >= 1 and {"python", "jax", "jaxlib"} <= set(saved["versions"])
    assert saved["rows"][0] == {"n": 1, "ms": 0.00012, "all": [1]}
    text = path.read_text()
    for expected in ("# A title", saved["hardware"], "a note", "| 1 | 1.2e-04 |", "| 2000 | – |", "made.png"):
        assert expected in text
    assert drawn and (tmp_path / "made.png").stat().st_size > 1000


def test_the_commit_is_the_repositorys():
    commit = record.environment()["commit"]
    assert commit == "unknown" or len(commit) == 40


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        (None, "–"),
        (0.0, "0"),
        (1.23456, "1.23"),
        (4.5e-5, "4.5e-05"),
        (12345.6, "12,346"),
        (7, "7"),
        ("x", "x"),
    ],
)
def test_cells_show_three_figures(value, cell):
    assert record.show(value) == cell


def test_a_mistyped_benchmark_is_answered_in_one_line_with_the_nearest(capsys):
    assert main(["atention"]) == 2
    error = capsys.readouterr().err
    assert "did you mean 'attention'?" in error and error.count("\n") == 1
    for wrong, said in (
        (["--rouns", "3"], "did you mean '--rounds'?"),
        (["--rounds", "x"], "got --rounds 'x', expected"),
    ):
        assert main(["startup", *wrong]) == 2
        error = capsys.readouterr().err
        assert error.startswith("benchmarks: got ") and said in error and error.count("\n") == 1


def test_without_a_name_the_benchmarks_are_listed(capsys):
    assert main(["--help"]) == 0 and main([]) == 2
    shown = capsys.readouterr().out
    assert all(name in shown for name in BENCHMARKS)


@pytest.mark.parametrize(("returned", "code"), [(1, 1), (0, 0), (None, 0), (Path("written.md"), 0)])
def test_a_number_that_a_benchmark_returns_is_its_exit_code(returned, code, monkeypatch):
    def run(options: startup.Options):
        return returned

    run.__annotations__ = {"options": startup.Options}
    monkeypatch.setattr(FOUND, "find", lambda name: run)
    assert main(["startup"]) == code
