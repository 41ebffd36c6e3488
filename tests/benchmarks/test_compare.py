"""`python -m benchmarks compare`: the statistics on timings that are made up, and commits of a small repository."""

from __future__ import annotations

import json
import os
import signal
import subprocess

import numpy as np
import pytest

from benchmarks import compare, paired, record
from benchmarks.__main__ import main
from benchmarks.paired import Turn, Verdict


def block(rng, slowdown, process, turn, rounds=8):
    """Turns on a busy machine: each process is off for its life, each turn is late by itself, some by much, and the
    machine's speed wanders."""
    off, drift = rng.normal(0, process, 3), np.cumsum(rng.normal(0, 0.05, rounds))
    late = np.abs(rng.normal(0, turn, (rounds, 3))) + (rng.random((rounds, 3)) < 0.08) * rng.exponential(
        0.3, (rounds, 3)
    )
    seconds = np.exp(off + late + drift[:, None]) * [1, 1, 1 + slowdown]
    return [Turn(*each) for each in seconds]


def session(seed, slowdown, process, turn):
    """The verdict of a comparison, and how many blocks it took."""
    rng = np.random.default_rng(seed)
    blocks = [block(rng, slowdown, process, turn) for _ in range(compare.FEWEST)]
    while not (found := paired.verdict(blocks)).fine and len(blocks) < compare.MOST:
        blocks.append(block(rng, slowdown, process, turn))
    return found, len(blocks)


@pytest.mark.parametrize(("process", "turn"), [(0.003, 0.01), (0.006, 0.03), (0.01, 0.05)])
def test_a_commit_is_never_slower_than_itself_and_5_percent_are_seen(process, turn, monkeypatch):
    monkeypatch.setattr(paired, "DRAWS", 500)
    same = [session(seed, 0.0, process, turn)[0] for seed in range(50)]
    slow = [session(seed, 0.05, process, turn)[0] for seed in range(1000, 1100)]
    assert not any(each.slower for each in same)
    assert sum(each.slower for each in slow) >= 95
    assert np.mean([each.slowdown for each in slow]) == pytest.approx(0.05, abs=0.004)
    # of the intervals of 95 %, few miss what is there
    assert sum(not each.low <= 0.05 <= each.high for each in slow) <= 12


def test_a_faster_head_is_not_slower_and_the_threshold_is_the_machines_noise():
    found, _ = session(1, -0.2, 0.006, 0.03)
    assert not found.slower and found.slowdown == pytest.approx(-0.2, abs=0.02)
    quiet, _ = session(2, 0.0, 0.0005, 0.001)
    loud, blocks = session(2, 0.0, 0.05, 0.2)
    assert quiet.threshold == paired.LEAST and loud.threshold == loud.noise > 2 * paired.LEAST
    assert blocks == compare.MOST and "could be missed on a machine this busy" in loud.line()
    assert "could be missed" not in quiet.line() and quiet.line().startswith("not slower: the head's time is ")


def test_a_verdict_is_the_same_each_time_and_two_blocks_are_too_few_for_a_small_one():
    rng = np.random.default_rng(3)
    blocks = [block(rng, 0.05, 0.006, 0.03) for _ in range(2)]
    assert paired.verdict(blocks) == paired.verdict(blocks)
    assert not paired.verdict(blocks).slower  # Student's interval of two values


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository of five commits that stands for the project's, and their names."""
    monkeypatch.setattr(record, "ROOT", tmp_path)

    def run(*words):
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)

    run("init", "--quiet")
    for number in range(5):
        (tmp_path / "number").write_text(str(number))
        run("add", "number")
        run("commit", "--quiet", "--message", f"Number {number}")
    return compare.git("rev-list", "--reverse", "HEAD").split()


def measured(monkeypatch, slow_from):
    """Let commits from a number on be slow by 6 %, without running them."""
    seen = []

    def turns(options, arguments, before, after, folder):
        number = int((after / "number").read_text())
        assert int((before / "number").read_text()) == 0
        seen.append(number)
        return block(np.random.default_rng(len(seen)), 0.06 * (number >= slow_from), 0.003, 0.01)

    monkeypatch.setattr(compare, "block", turns)
    monkeypatch.setattr(compare, "configured", lambda *_: None)
    return seen


def test_a_slower_head_ends_with_1_and_bisect_names_the_commit(repository, monkeypatch, tmp_path, capsys):
    measured(monkeypatch, slow_from=3)
    assert main(["compare", repository[0], "HEAD", "--bisect", "--out", str(tmp_path / "out")]) == 1
    shown = capsys.readouterr().out
    assert f"{repository[0][:12]} against {repository[4][:12]}: SLOWER: the head's time is +" in shown
    assert f"slower since {repository[3][:12]} Number 3" in shown
    saved = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert len(saved["rows"]) == compare.FEWEST and saved["rows"][0]["verdict"]["slower"]
    assert "SLOWER" in (tmp_path / "out" / "compare.md").read_text()
    assert len(compare.git("worktree", "list").splitlines()) == 1  # its work trees are gone


def test_an_equal_head_ends_with_0_and_without_head_the_tree_as_it_is_is_measured(repository, monkeypatch, capsys):
    seen = measured(monkeypatch, slow_from=9)
    assert main(["compare", repository[0], repository[1]]) == 0 and set(seen) == {1}
    (record.ROOT / "number").write_text("7")
    assert main(["compare", repository[0]]) == 0 and seen[-1] == 7
    assert "against the tree as it is: not slower" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_comparison_that_is_told_to_end_removes_its_work_trees(repository, monkeypatch, number):
    measured(monkeypatch, slow_from=9)
    monkeypatch.setattr(compare, "block", lambda *_: os.kill(os.getpid(), number))
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as ended:
            main(["compare", repository[0], "HEAD"])
        assert ended.value.code == 128 + number and signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert len(compare.git("worktree", "list").splitlines()) == 1


def test_bisect_finds_each_commit_that_it_could_be():
    good, bad = (Verdict(0.0, low, 0.1, 0.01, 0.02) for low in (0.0, 0.05))
    names = "abcdefg"
    for first in range(len(names)):
        assert (
            compare.bisected(names, lambda each, first=first: bad if names.index(each) >= first else good)
            == (names[first])
        )


def test_a_mistake_is_answered_in_one_line_before_any_work(repository, monkeypatch, capsys):
    measured(monkeypatch, slow_from=9)
    for arguments, message in (
        (["nowhere"], "got commit 'nowhere', expected one of this repository"),
        (["a", "b", "c"], "got 3 commits, expected BASE and perhaps HEAD"),
        (["HEAD~1", "--bisect"], "got --bisect without HEAD"),
        (["HEAD", "HEAD~1", "--bisect"], "expected a BASE before HEAD for --bisect"),
        (["HEAD", "--rounds", "1"], "got rounds 1, expected at least 3"),
    ):
        assert main(["compare", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
