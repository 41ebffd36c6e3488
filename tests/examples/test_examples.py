"""The packages of examples/ are at home in every command, and found again in other processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from jaxmodels.cli import main
from tests.conftest import ROOT
from tests.quick import own_lines

OUTSIDE = ("own_model", "own_task", "own_source", "own_logger", "own_launcher")
PACKAGES = [str(ROOT / "examples" / name) for name in OUTSIDE]
CONFIG = """
from own_model import DenseConfig
from own_source import Readings
from own_task import Regression

from jaxmodels.config import Classification, Config, Images, Metrics, Train


def sensor():
    return Config(
        model=DenseConfig(input_shape=(3,), classes=2, width=8),
        task=Classification(),
        data=Readings(batch_size=8),
        train=Train(steps=2),
        metrics=Metrics(every=1, loggers=("own_logger:Losses",), progress="none"),
    )


def photos():
    return Config(
        model=DenseConfig(input_shape=(8, 8, 3), classes=1, width=8),
        task=Regression(power=2.0),
        data=Images(path=("photos",), eval_fraction=0.3, batch_size=8),
        train=Train(steps=2),
        metrics=Metrics(progress="none"),
    )
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with data, configs, and a run of each."""
    where = tmp_path_factory.mktemp("outside")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(where)
        for package in PACKAGES:
            patch.syspath_prepend(package)
        rng = np.random.default_rng(0)
        for name in ("low", "high"):
            (where / "photos" / name).mkdir(parents=True)
            for k in range(16):
                Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(where / "photos" / name / f"{k}.png")
        lines = [f"{i},{i + 1},{2 * i},{'high' if i > 30 else 'low'}\n" for i in range(60)]
        (where / "readings.txt").write_text("".join(lines))
        for name in ("sensor", "photos"):
            (where / f"{name}.py").write_text(f"{CONFIG}\n\nget_config = {name}\n")
            assert main(["train", f"{name}.py"]) == 0
        yield where


def in_another_process(folder, *argv, found=True):
    path = os.pathsep.join([str(ROOT), *(PACKAGES if found else [])])
    return subprocess.run(
        [sys.executable, "-m", "jaxmodels", *argv],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )


def test_a_run_says_by_which_name_each_is_found(folder):
    said = (folder / "runs" / "sensor" / "config.json").read_text()
    assert "own_model:DenseConfig" in said and "own_source:Readings" in said
    assert "own_task:Regression" in (folder / "runs" / "photos" / "config.json").read_text()
    assert "2 eval/loss" in (folder / "runs" / "sensor" / "losses.txt").read_text()


@pytest.mark.parametrize("run", ["sensor", "photos"])
def test_commands_take_runs_of_what_is_outside(folder, run, capsys, tmp_path):
    assert main(["train", f"{run}.py", "--train.steps", "4", "--resume", "must"]) == 0
    assert main(["eval", f"runs/{run}", "--json", str(tmp_path / "found.json")]) == 0
    assert np.isfinite(json.loads((tmp_path / "found.json").read_text())["loss"])
    assert main(["config", "explain", f"runs/{run}", "train.steps"]) == 0
    assert main(["data", "inspect", f"{run}.py", "--out", str(tmp_path / "seen.png")]) == 0
    assert main(["report", f"runs/{run}", "--out", str(tmp_path / "report")]) == 0
    capsys.readouterr()


def test_options_take_kinds_from_outside(folder, capsys):
    own = ["--data", "own_source:Readings", "--model", "own_model:DenseConfig", "--run-dir", "runs/named"]
    assert main(["train", "sensor.py", *own]) == 0
    assert main(["train", "sensor.py", "--task", "own_task:Regresion"]) == 2
    assert "Regression" in capsys.readouterr().err


def test_another_process_finds_them_or_says_what_is_missing(folder):
    done = in_another_process(folder, "eval", "runs/sensor")
    assert done.returncode == 0, done.stderr
    done = in_another_process(folder, "eval", "runs/sensor", found=False)
    (line,) = own_lines(done.stderr)
    assert done.returncode == 2 and "own_model" in line and "PYTHONPATH" in line


def test_a_place_from_outside_is_launched_on(folder, capsys):
    assert main(["launch", "own_launcher:Background", "--processes", "3", "--dry-run", "--", "train", "sensor.py"]) == 0
    assert "jaxmodels.launch.node --processes 3 " in capsys.readouterr().out
    assert main(["launch", "own_launcher:Background", "--proceses", "3", "--", "train", "sensor.py"]) == 2
    assert "did you mean '--processes'?" in capsys.readouterr().err


def test_workers_of_a_search_find_them(folder, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *PACKAGES]))
    search = ["--space", "optim.peak_lr=1e-4:1e-2:log", "--trials", "2", "--workers", "2", "--out", "runs/tuned"]
    assert main(["tune", "sensor.py", *search]) == 0
    capsys.readouterr()
