"""Damaged checkpoints: reported, and the one before is used; never a silent fresh start."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import pytest

from jaxmodels.train.checkpoint import Checkpointer, CheckpointError
from jaxmodels.train.manifest import render
from tests.train.checkpoints import (
    abstract_of,
    flip,
    make_mesh,
    make_state,
    restored_step,
    save,
    some_file,
)

FILES = ["manifest.json", "meta.json", "_METADATA", "manifest.ocdbt", "*"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["flipped", "truncated", "gone"])
def test_a_damaged_file_is_named_and_the_one_before_used(
    tmp_path: Path, saved_pair: Path, caplog: pytest.LogCaptureFixture, name: str, how: str
) -> None:
    shutil.copytree(saved_pair, tmp_path, dirs_exist_ok=True)
    path = some_file(tmp_path / "2", name)
    if how == "flipped":
        flip(path)
    elif how == "truncated":
        os.truncate(path, path.stat().st_size - 1)
    else:
        path.unlink()
    with caplog.at_level(logging.WARNING):
        assert restored_step(tmp_path, make_state(make_mesh(1))) == 1
    assert "CHECKPOINT DAMAGED" in caplog.text and str(path) in caplog.text and "step 1 instead" in caplog.text


def rewritten(manifest: dict, name: str) -> str:
    """A manifest of another kind that has the right hash of itself, or none at all."""
    if name == "deep":
        return "[" * 100_000
    if name == "not an object":
        return "[]"
    changed = {key: value for key, value in manifest.items() if key not in ("sha256", name)}
    changes = {
        "no files": {"files": {}},
        "only some files": {"files": {"meta.json": manifest["files"]["meta.json"]}},
        "files outside": {"files": {**manifest["files"], "state/../../secret": {"sha256": "", "size": 0}}},
        "files as a list": {"files": list(manifest["files"])},
        "no hash": {"files": {name: {} for name in manifest["files"]}},
        "tree of numbers": {"tree": {"w": 5}},
    }
    return render({**changed, **changes.get(name, {})})


@pytest.mark.parametrize(
    "name",
    ["deep", "not an object", "best", "tree", "files", "no files", "only some files", "files outside",
     "files as a list", "no hash", "tree of numbers"],
)  # fmt: skip
def test_a_manifest_that_lacks_something_is_damage(
    tmp_path: Path, saved_pair: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    shutil.copytree(saved_pair, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "2" / "manifest.json"
    path.write_text(rewritten(json.loads(path.read_text()), name))
    assert restored_step(tmp_path, make_state(make_mesh(1))) == 1
    assert caplog.text.count("CHECKPOINT DAMAGED: step 2: file ") == 1 and caplog.text.count("\n") == 1
    assert Checkpointer(tmp_path).best() is None


@pytest.mark.parametrize("name", ["²", "٣", "007", "+7", "1_0", "7 "])
def test_a_folder_that_no_save_has_named_is_no_checkpoint(tmp_path: Path, saved_pair: Path, name: str) -> None:
    shutil.copytree(saved_pair, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).mkdir()
    assert Checkpointer(tmp_path).steps() == [1, 2]
    assert restored_step(tmp_path, make_state(make_mesh(1))) == 2


def test_all_damaged_is_an_error_and_stays_one(tmp_path: Path, saved_pair: Path) -> None:
    shutil.copytree(saved_pair, tmp_path, dirs_exist_ok=True)
    for step in ("1", "2"):
        flip(some_file(tmp_path / step, "*"))
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"got no readable checkpoint.*step 2: file .*; step 1: file "):
            restored_step(tmp_path, make_state(make_mesh(1)))


def test_a_damaged_one_gives_way_to_the_next_save_not_the_good_one(tmp_path: Path, saved_pair: Path) -> None:
    shutil.copytree(saved_pair, tmp_path, dirs_exist_ok=True)
    flip(some_file(tmp_path / "2", "*"))
    state = make_state(make_mesh(1))
    checkpointer = Checkpointer(tmp_path, keep=2)
    assert checkpointer.restore(abstract_of(state, make_mesh(1)))[2] == 1  # type: ignore[index]
    save(checkpointer, 4, state)
    assert checkpointer.steps() == [1, 4]
    flip(some_file(tmp_path / "4", "*"))
    checkpointer = Checkpointer(tmp_path, keep=2)
    assert checkpointer.restore(abstract_of(state, make_mesh(1)))[2] == 1  # type: ignore[index]
    save(checkpointer, 4, state)
    assert checkpointer.steps() == [1, 4] and restored_step(tmp_path, state) == 4
