"""A run's directory has only one writer, whose lock ends with it, and its files are never half written."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from jaxmodels.config import Config
from jaxmodels.errors import UserError
from jaxmodels.models.mlp import MLPConfig
from jaxmodels.train import directory
from jaxmodels.train.checkpoint import Checkpointer, CheckpointError
from jaxmodels.train.display import Display
from jaxmodels.train.manifest import atomic_write

CFG = Config(model=MLPConfig())
HOLD = (
    "import sys, time, pathlib; from jaxmodels.train import directory\n"
    "with directory.held(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
)


@pytest.fixture
def holder(tmp_path: Path, root: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that writes in tmp_path / 'run'."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], cwd=root, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_directory_in_use_is_refused_with_the_holder_and_free_when_that_is_killed(
    tmp_path: Path, holder: subprocess.Popen[bytes]
) -> None:
    run = tmp_path / "run"
    for refused in (
        lambda: directory.check_writable(run),
        lambda: directory.prepared(CFG, run, "auto", {}).__enter__(),
        lambda: directory.prepared(CFG, run, "never", {}).__enter__(),
        lambda: directory.held(run).__enter__(),
    ):
        with pytest.raises(UserError, match=rf"to which process {holder.pid} on '.*', since 20.* is writing, "):
            refused()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"], "nothing was moved aside"
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with directory.prepared(CFG, run, "auto", {}):
        assert json.loads((run / directory.LOCK).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("left", [b"", b"\xff\x00", b"[]", b'{"pid": null}', b"[" * 100_000])
def test_what_a_lock_file_says_does_not_matter_to_the_lock(tmp_path: Path, left: bytes) -> None:
    (tmp_path / directory.LOCK).write_bytes(left)
    with directory.held(tmp_path):
        (tmp_path / directory.LOCK).write_bytes(left)
        with pytest.raises(UserError, match="another process is writing"):
            directory.check_writable(tmp_path)


def test_a_run_moved_aside_leaves_its_directory_to_the_new_one(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with directory.prepared(CFG, run, "auto", {"file": "first"}):
        pass
    with directory.prepared(CFG, run, "never", {"file": "second"}), pytest.raises(UserError, match="one writer"):
        directory.check_writable(run)
    origins = [json.loads((path / "config.json").read_text())["origin"]["file"] for path in sorted(tmp_path.iterdir())]
    assert origins == ["second", "first"]


@pytest.mark.parametrize("what", ["file", "dangling link", "checkpoints is a file"])
def test_what_is_no_directory_is_refused_before_any_work(tmp_path: Path, what: str) -> None:
    run = tmp_path / "a run\nwith ünusual name"
    if what == "file":
        run.write_text("")
    elif what == "dangling link":
        run.symlink_to(tmp_path / "nowhere")
    else:
        run.mkdir()
        (run / "checkpoints").write_text("")
    with pytest.raises(UserError, match="which is not a directory, expected one or nothing there"):
        directory.check_writable(run)


@pytest.mark.parametrize("name", ["", "checkpoints", "metrics.jsonl", "log.txt", "phases.jsonl", directory.LOCK])
def test_what_may_not_be_written_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (run := tmp_path / "run").mkdir()
    kept = run / name
    if name:
        kept.mkdir() if name == "checkpoints" else kept.touch()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != kept)  # root may write everywhere
    said = f"where {name} may not be written, expected the right to go on" if name else "which cannot be written"
    with pytest.raises(UserError, match=rf"got --run-dir {run}, {said}"):
        directory.check_writable(run)


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"model": {}}', "a folder"])
def test_a_config_that_cannot_be_read_is_not_replaced_by_one_that_goes_on(tmp_path: Path, damage: str) -> None:
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    (tmp_path / "checkpoints" / "4" / "manifest.json").touch()
    config = tmp_path / "config.json"
    config.mkdir() if damage == "a folder" else config.write_text(damage)
    with pytest.raises(UserError, match="got --resume must for .*, whose config cannot be read .*moving config"):
        directory.prepared(CFG, tmp_path, "must", {}).__enter__()
    assert config.is_dir() or config.read_text() == damage
    config.rename(tmp_path / "aside")
    with directory.prepared(CFG, tmp_path, "must", {}):
        assert config.is_file()


def test_a_file_that_cannot_be_written_whole_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("before")
    with pytest.raises(OSError, match="full"), atomic_write(path) as part:
        part.write_text("aft")
        raise OSError("full")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("config.json", "before")]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_log_on_a_full_disk_prints_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with directory.logging_to(Path("/dev/full"), Display("plain", 1, "tokens")):
        logging.getLogger("jaxmodels").info("said")
    out, err = capsys.readouterr()
    assert (out, err) == ("said\n", "")


def test_names_with_escape_codes_are_shown_and_not_obeyed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with directory.logging_to(tmp_path / "log.txt", Display("plain", 1, "tokens")):
        logging.getLogger("jaxmodels").info("left out %s", "\x1b]0;title\x07\u202ename.png")
    shown = r"left out \x1b]0;title\x07\u202ename.png" + "\n"
    assert capsys.readouterr().out == shown
    assert (tmp_path / "log.txt").read_text().endswith(" INFO " + shown)


@pytest.mark.parametrize(("progress", "times"), [("plain", 1), ("none", 0)])
def test_a_failed_checkpoint_that_the_log_has_shown_is_known_to_be_so(
    progress: str, times: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    checkpointer = Checkpointer(tmp_path / "checkpoints")
    with directory.logging_to(None, Display(progress, 1, "tokens")):
        checkpointer.save(1, {"w": np.ones(2)}, {})  # type: ignore[arg-type]
        with pytest.raises(CheckpointError, match="NOT saved") as caught:
            checkpointer.wait()
    out, err = capsys.readouterr()
    assert (out, err.count("NOT saved"), caught.value.shown) == ("", times, bool(times))
