"""Saves that were killed or ran out of disk space: a checkpoint is complete or absent."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jaxmodels.train import arrays, checkpoint
from jaxmodels.train.checkpoint import Checkpointer, CheckpointError
from tests.quick import FLAGS, own_lines
from tests.train.checkpoints import (
    State,
    abstract_of,
    bits,
    make_mesh,
    make_state,
    restored_step,
    save,
)


def test_what_killed_runs_left_is_removed_and_a_replaced_one_is_put_back(tmp_path: Path, state: State) -> None:
    save(Checkpointer(tmp_path), 1, state)
    (tmp_path / "1").rename(tmp_path / "1.replaced")
    for name in ("2.saving", "3.retired"):
        (tmp_path / name / "state").mkdir(parents=True)
    assert Checkpointer(tmp_path).steps() == []  # only looking changes nothing
    assert (tmp_path / "2.saving").exists()
    assert restored_step(tmp_path, state) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1"]


@pytest.mark.parametrize("left", ["3.saving", "3.replaced", "3.retired"])
@pytest.mark.parametrize("kind", ["file", "link", "folder", "folder that stays"])
def test_what_was_left_behind_gives_way_to_the_next_save(
    tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch, left: str, kind: str
) -> None:
    save(Checkpointer(tmp_path), 3, make_state(make_mesh(1), 9))
    if kind == "file":
        (tmp_path / left).write_text("")
    elif kind == "link":
        (tmp_path / left).symlink_to("nowhere")
    else:
        (tmp_path / left / "state").mkdir(parents=True)
        (tmp_path / left / "state" / "x").write_text("")
    if kind == "folder that stays":
        monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # as where it is another user's
    checkpointer = Checkpointer(tmp_path)
    save(checkpointer, 3, state)
    assert checkpointer.steps() == [3]
    assert bits(checkpointer.restore(abstract_of(state, make_mesh(1)))[0]) == bits(state)  # type: ignore[index]


def test_a_reader_follows_a_run_that_removes_what_is_being_read(
    tmp_path: Path, saved_pair: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(saved_pair, tmp_path, dirs_exist_ok=True)
    load = checkpoint.load

    def overtaken(folder: Path, leaves: dict) -> dict:
        if folder.parent.name == "2":
            (tmp_path / "2").rename(tmp_path / "3")
            shutil.rmtree(tmp_path / "1")
        return load(folder, leaves)

    monkeypatch.setattr(checkpoint, "load", overtaken)
    assert Checkpointer(tmp_path).restore_params()[2] == 3
    assert caplog.text == ""


def test_a_run_that_was_removed_does_not_come_back(tmp_path: Path, state: State) -> None:
    checkpointer = Checkpointer(tmp_path / "run" / "checkpoints")
    checkpointer.save(1, state, {})
    with pytest.raises(CheckpointError, match="step 1 NOT saved: .*No such file"):
        checkpointer.wait()
    assert not (tmp_path / "run").exists()


SAVE_FOR_EVER = """
import sys, itertools, numpy as np, jax
from jaxmodels.train.checkpoint import Checkpointer
checkpointer = Checkpointer(sys.argv[1])
first = max(checkpointer.steps(), default=0)
for step in itertools.count(first + 1):
    tree = {"w": jax.numpy.full((128, 128), step), "b": np.arange(9)}
    checkpointer.save(step - step % 2, tree, {}, best=step % 3 == 0)
    print("saving", flush=True)
"""


def test_kill_9_at_any_moment_leaves_only_complete_checkpoints(tmp_path: Path) -> None:
    chance = random.Random(0)
    newest = []
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOR_EVER, str(tmp_path)],
            cwd=Path(__file__).parents[2],
            env=os.environ | {"XLA_FLAGS": FLAGS},
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        for _ in range(chance.randint(3, 5)):
            assert process.stdout.readline() == b"saving\n"
        time.sleep(chance.uniform(0.0, 0.4))
        process.send_signal(signal.SIGKILL)
        process.wait()
        for step in Checkpointer(tmp_path).steps():
            found, _, _ = Checkpointer(tmp_path).restore_params(step, subtree="w")
            assert found.shape == (128, 128) and int(found[0, 0]) - step in (0, 1) and (found == found[0, 0]).all()
        newest.append(max(Checkpointer(tmp_path).steps(), default=0))
    assert newest == sorted(set(newest)), "each run goes on from the last one and gets further"


@pytest.fixture
def small_disk(tmp_path: Path):
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder]).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_that_nobody_foresaw_is_one_line(small_disk: Path) -> None:
    code = (
        "import sys, numpy as np; from jaxmodels.train import checkpoint; checkpoint.needed_bytes = lambda leaves: 0\n"
        "tree = {f'q{i}': np.random.default_rng(i).normal(size=2**14) for i in range(60)}\n"
        "checkpointer = checkpoint.Checkpointer(sys.argv[1]); checkpointer.save(1, tree, {}); checkpointer._join()"
    )
    command = [sys.executable, "-c", code, str(small_disk / "checkpoints")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True)
    said = own_lines(done.stderr)
    assert len(said) == 1 and "step 1 NOT saved: No space left on device" in said[0]


@pytest.mark.parametrize(("leaves", "size"), [(1, 10), (100, 10), (10, 10_000)])
def test_the_room_that_is_asked_for_is_what_a_checkpoint_takes(tmp_path: Path, leaves: int, size: int) -> None:
    tree = {f"layers/attention/q{i}": np.random.default_rng(i).normal(size=size) for i in range(leaves)}
    save(Checkpointer(tmp_path), 1, tree)  # type: ignore[arg-type]
    taken = sum(path.stat().st_blocks * 512 for path in tmp_path.rglob("*"))
    needed = arrays.needed_bytes(arrays.named_leaves(tree))
    assert taken <= needed <= taken + 300_000


# TensorStore's remaining writes end after the event loop of the failed save is gone.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_is_said_and_the_last_good_one_survives(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = small_disk / "checkpoints"
    tree = {"w": np.random.default_rng(0).normal(size=2**17), "b": np.arange(3)}  # 1 MB
    checkpointer = Checkpointer(folder)
    checkpointer.save(1, tree, {})
    checkpointer.wait()
    (small_disk / "ballast").write_bytes(bytes(2_300_000))
    checkpointer.save(2, tree, {})
    checkpointer.save(3, tree, {})  # reports the failure of 2 and tries again
    assert "checkpoint of step 2 NOT saved" in caplog.text
    with pytest.raises(
        CheckpointError, match=r"step 3 NOT saved: No space left on device; .* MB free.*last good checkpoint: 1;"
    ):
        checkpointer.wait()
    assert sorted(path.name for path in folder.iterdir()) == ["1"]
    (small_disk / "ballast").unlink()
    checkpointer.save(4, tree, {})
    checkpointer.wait()
    found = Checkpointer(folder).restore(tree)
    assert found is not None and found[2] == 4 and bits(found[0]) == bits(tree)


def test_a_disk_with_no_room_for_the_folder_itself_is_said_too(tmp_path: Path, state: State) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    checkpointer = Checkpointer(tmp_path / "checkpoints")
    checkpointer.save(1, state, {})
    with pytest.raises(CheckpointError, match="step 1 NOT saved: .*last good checkpoint: None"):
        checkpointer.wait()
