"""Places that cannot be written to are refused before any work."""

import contextlib
import importlib
import os
import pkgutil
import re
from pathlib import Path

import pytest

import jaxmodels
from jaxmodels import config as configs
from jaxmodels.cli import main
from jaxmodels.errors import UserError, check_place

CONFIG = "configs/gpt_stdlib.py"


@pytest.fixture(scope="module")
def imported():
    """All modules are there before a test changes one, so that none is imported meanwhile and keeps the change."""
    for module in pkgutil.walk_packages(jaxmodels.__path__, "jaxmodels."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


@pytest.mark.parametrize(
    ("place", "folder", "said"),
    [
        ("new.json", False, ""),
        ("file", False, ""),
        ("new", True, ""),
        ("a/new/folder", True, ""),
        (".", True, ""),
        (".", False, "which is a folder, expected a place for a file"),
        ("file", True, "which is a file, expected a place for a folder"),
        ("no/new.json", False, "whose folder does not exist"),
        ("file/new.json", False, "file is no folder"),
        ("file/new/folder", True, "file is no folder"),
        ("kept/new.json", False, "which cannot be written"),
        ("kept/new/folder", True, "which cannot be written"),
    ],
)
def test_a_place_is_one_that_can_be_written(place, folder, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "kept").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "kept")  # root may write everywhere
    with (
        pytest.raises(UserError, match=f"got --out {re.escape(place)}, .*{said}") if said else contextlib.nullcontext()
    ):
        check_place(Path(place), "--out", folder)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "kept"}


@pytest.mark.parametrize(
    "line",
    [
        "report {run} --out {file}",
        "tune {config} --space optim.peak_lr=1e-4:1 --out {file}",
        "plan {config} --on h100:1x8 --json {run}",
        "data prepare {config} --out {file}",
        "data train-tokenizer {config} --out {run}",
        "data clean {config} --out {run}",
        "data inspect {config} --out {run}",
        "export {run} {file}",
        "eval {run} --json {run}",
    ],
)
def test_a_place_that_cannot_be_written_is_refused_before_any_work(line, imported, tmp_path, monkeypatch, capsys):
    for work in ("jaxmodels.train.load_run", "jaxmodels.train.saved.load_run", "jaxmodels.data.corpus.read",
                 "jaxmodels.plan.compile.compiled"):  # fmt: skip
        monkeypatch.setattr(work, lambda *_, **__: pytest.fail("work was done"))
    run, file = tmp_path / "run", tmp_path / "file"
    run.mkdir()
    file.write_text("as it was")
    configs.save(configs.load(CONFIG), run / "config.json", {})
    places = {"run": str(run), "file": str(file), "config": CONFIG}
    assert main([word.format(**places) for word in line.split()]) == 2
    assert f"got {'' if 'export' in line else line.split()[-2] + ' '}{tmp_path}" in capsys.readouterr().err
    assert file.read_text() == "as it was" and [path.name for path in run.iterdir()] == ["config.json"]
