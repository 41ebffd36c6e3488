"""Of two commands that write to one place the first is not hurt, and the second is refused in one line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from jaxmodels.commands.data_prepare import together
from jaxmodels.data import clean
from jaxmodels.errors import UserError
from jaxmodels.hf import save
from jaxmodels.parts import MARK, filled, locked


@pytest.mark.parametrize("kind", [save.complete, together])
def test_the_first_of_two_writers_is_not_hurt(tmp_path: Path, kind: Callable[[Path], AbstractContextManager[Path]]):
    out = tmp_path / "new" / "out"
    with kind(out) as part:
        (part / "a.bin").write_text("first")
        with pytest.raises(UserError, match="out, into which another process is writing, expected one writer"):
            kind(out).__enter__()
        assert (part / "a.bin").read_text() == "first"
    assert {path.name: path.read_text() for path in out.iterdir()} == {"a.bin": "first"}
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("part", [Path("/proc/part"), Path("/proc/part/lock")])
def test_where_nothing_can_be_made_nobody_waits_for_it(part: Path):
    with pytest.raises(UserError, match="got out, where no file can be made"):
        locked(part, Path("out")).__enter__()


def test_what_a_killed_process_left_is_removed_and_its_lock_is_free(tmp_path: Path, root: Path):
    code = (
        "import os, pathlib, sys; from jaxmodels.parts import filled; part = pathlib.Path(sys.argv[1])\n"
        "with filled(part, part): (part / 'half').mkdir(); (part / 'b').touch(); os.kill(os.getpid(), 9)"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path / "part")], cwd=root)
    assert ended.returncode == -9 and (tmp_path / "part" / "half").is_dir()
    with filled(tmp_path / "part", tmp_path / "out"):
        assert [path.name for path in (tmp_path / "part").iterdir()] == [MARK]


def test_a_place_that_another_process_has_filled_meanwhile_stays_as_that_left_it(tmp_path: Path):
    with pytest.raises(UserError, match="out, which is there by now"), save.complete(tmp_path / "out"):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (tmp_path / "out" / "theirs").is_file()


def test_texts_are_cleaned_into_a_file_by_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "in.txt").write_text("a text of some words\n" * 3)
    inputs, out, sift, told = (str(tmp_path / "in.txt"),), tmp_path / "out.jsonl", clean._sift, []

    def second(*args: Any) -> None:
        monkeypatch.setattr(clean, "_sift", sift)
        with pytest.raises(UserError, match="another process is writing") as refused:
            clean.clean(inputs, out, "text", True, clean.Rules())
        told.append(refused)
        sift(*args)

    monkeypatch.setattr(clean, "_sift", second)
    first = clean.clean(inputs, out, "text", True, clean.Rules())
    assert told and first.kept == len(out.read_text().splitlines())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.txt", "out.jsonl", "out.jsonl.report.json"]
