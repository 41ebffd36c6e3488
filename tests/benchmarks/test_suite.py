"""`python -m benchmarks suite`: which benchmarks run where, the page, and the gates."""

from __future__ import annotations

import json
import subprocess
from types import SimpleNamespace

import pytest

from benchmarks import record, suite
from benchmarks.__main__ import BENCHMARKS, main

ABOUT = {
    "hardware": "A CPU", "cores": 2, "devices": 1, "load": 0.1, "platform": "cpu", "kind": "cpu",
    "versions": {"python": "3.11", "jax": "0.10.2"}, "commit": "0" * 40, "changed": False, "command": "", "time": "now",
}  # fmt: skip


@pytest.fixture
def ran(monkeypatch):
    """Let benchmarks end at once, with the exit codes and output in `answers`; the commands that ran are in `asked`."""
    monkeypatch.setattr(suite, "finished", lambda *_: {"figures": ABOUT, "failure": ""})
    answers, asked = {}, []

    def run(command, **_):
        name = command[3]
        asked.append(command[3:])
        code, out, error = answers.get(name, (0, "", ""))
        if "--out" in command:
            folder = suite.Path(command[-1])
            rows = [{"n": name}]
            record.write(f"{name}_here", f"Of {name}", rows, out=folder, about=ABOUT, columns={"n": "n"})
        return SimpleNamespace(returncode=code, stdout=out, stderr=error)

    monkeypatch.setattr(suite.subprocess, "run", run)
    return answers, asked


def test_the_page_joins_what_ran_with_its_tables(ran, tmp_path, capsys):
    answers, asked = ran
    answers["exact"] = (0, "mlp-cpu  as recorded\n", "")
    assert main(["suite", "--quick", "--out", str(tmp_path)]) == 0
    assert [each[0] for each in asked] == ["exact", "attention", "scaling", "startup"]
    assert "no gate fell" in capsys.readouterr().out
    text = (tmp_path / "suite.md").read_text()
    for expected in (
        "# Benchmarks on A CPU", "| exact | done | yes |", "mlp-cpu  as recorded", "## Attention", "### Of attention",
        "| scaling |", "WHOSE SECONDS MEAN NOTHING", "commit: 000000000000", "`python -m benchmarks exact",
    ):  # fmt: skip
        assert expected in text, expected
    assert [row["name"] for row in json.loads((tmp_path / "suite.json").read_text())["rows"]] == [
        "exact", "attention", "scaling", "startup"
    ]  # fmt: skip


def test_a_gate_that_falls_is_named_and_one_that_cannot_be_checked_says_why(ran, tmp_path, capsys):
    answers, _ = ran
    answers["exact"] = (2, "", "benchmarks: got a record of jax 0.10.2, expected jax 0.12.0\n")
    answers["scaling"] = (1, "2 of 4 points were not as planned\n", "")
    answers["startup"] = (1, "it crashed\n", "")  # no gate
    assert main(["suite", "--quick", "--out", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert "gates that fell: scaling" in shown
    assert "exact: not run: benchmarks: got a record of jax 0.10.2" in shown and "startup: not run: it crashed" in shown
    assert "FELL: 2 of 4 points were not as planned" in (tmp_path / "suite.md").read_text()


def test_a_kernel_that_beats_auto_and_a_slower_tree_are_gates_of_the_whole_suite(ran, tmp_path, monkeypatch, capsys):
    answers, asked = ran
    answers["compare"] = (1, "abc against the tree as it is: SLOWER: the head's time is +6 %\n", "")
    monkeypatch.setattr(suite.cells, "overtaken", lambda rows: ["causal T=64, forward: auto takes xla"])
    monkeypatch.setattr(suite, "ENTRIES", {name: suite.ENTRIES[name] for name in ("attention", "scaling")})
    assert main(["suite", "--base", "HEAD~1", "--out", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert "gates that fell: attention, compare" in shown and "FELL: abc against the tree" in shown
    assert asked[-1][:2] == ["compare", "HEAD~1"]


def test_an_accelerator_and_a_cpu_have_their_own_parts_and_all_are_benchmarks():
    assert set(suite.ENTRIES) <= set(BENCHMARKS)
    names = {place: [name for name, *_ in suite.chosen(suite.Options(), place)] for place in ("cpu", "gpu")}
    assert "device" in names["gpu"] and "device" not in names["cpu"] and "startup" not in names["gpu"]
    for place in names:
        assert {"exact", "attention", "scaling"} <= set(names[place])


def test_the_arguments_of_every_entry_are_options_that_exist():
    from typing import get_type_hints

    from benchmarks.__main__ import FOUND
    from jaxmodels.commands.parsing import parse

    for name, each in suite.ENTRIES.items():
        for arguments in (each.arguments, each.quick or ()):
            out = ("--out", "somewhere") if each.records else ()
            assert parse(get_type_hints(FOUND.find(name))["options"], [*arguments, *out], name, about="") is not None


def test_without_a_device_it_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(suite, "finished", lambda *_: {"figures": {}, "failure": "RuntimeError: none"})
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("it ran something"))
    assert main(["suite", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "got no device that can be used (RuntimeError: none)" in error and error.count("\n") == 1
