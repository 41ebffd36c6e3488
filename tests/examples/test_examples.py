"""The packages of examples/ are at home in every command, and found again in other processes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from jaxmodels import load_run
from jaxmodels.cli import main
from jaxmodels.generate import sample
from tests.conftest import ROOT
from tests.quick import own_lines

OUTSIDE = ("own_kernel", "own_launcher", "own_logger", "own_model", "own_source", "own_task")
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
        patch.setattr("jaxmodels.report.curves.draw", lambda run, out, lines=None: None)  # it takes as long as a run
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
    picture = ["--out", str(tmp_path / "seen.png")]
    assert main(["data", "inspect", f"{run}.py", *(picture if run == "photos" else [])]) == 0
    assert main(["report", f"runs/{run}", "--out", str(tmp_path / "report")]) == 0
    capsys.readouterr()


def test_predict_says_what_the_model_the_source_and_the_task_from_outside_say(folder, capsys):
    assert main(["predict", "runs/photos", "photos/low"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(found) == 16 and all(set(each) == {"where", "number"} for each in found)
    assert len({each["number"] for each in found}) == 16
    (folder / "new.txt").write_text("[1.0, 2.0, 3.0]\n[1.0, 2.0]\n")
    assert main(["predict", "runs/sensor", "new.txt"]) == 0
    good, bad = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert good["label"] in ("low", "high") and sum(good["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert "shape" in bad["error"]


def test_a_plan_compiles_them_in_its_child_process(folder, monkeypatch, tmp_path, capsys):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs the compiler libtpu: pip install 'jaxmodels[aot]'")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *PACKAGES]))
    assert main(["plan", "photos.py", "--on", "v5e:1x1", "--json", str(tmp_path / "plan.json")]) == 0
    (found,) = json.loads((tmp_path / "plan.json").read_text())
    capsys.readouterr()
    run = load_run("runs/photos")
    assert found["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(run.params))
    assert jax.tree.leaves(run.stats) == []


def test_a_kernel_from_outside_trains_samples_and_is_exported(folder, capsys, tmp_path):
    small = "--model.layers 1 --model.width 16 --model.heads 2 --model.context 16 --data.seq-len 16 --data.batch-size 8"
    options = f"{small} --train.steps 1 --eval.batches 1 --metrics.progress none --model.attention own_kernel:plain"
    config = str(ROOT / "configs" / "gpt_stdlib.py")
    assert main(["train", config, "--run-dir", "runs/kernel", *options.split()]) == 0
    capsys.readouterr()
    assert main(["sample", "runs/kernel", "--tokens", "4", "--temperature", "0"]) == 0  # it knows no cache: auto's does
    found = capsys.readouterr().out.removesuffix("\n")
    run = load_run("runs/kernel")
    prompt = run.tokenizer.encode("\n")
    row = sample(run.model, run.params["model"], prompt, 4, temperature=0, cached=False)[0]
    assert found.endswith(run.tokenizer.decode(row[len(prompt) :]).rstrip("\n"))
    assert main(["export", "runs/kernel", str(tmp_path / "weights")]) == 0
    assert (tmp_path / "weights" / "model.safetensors").is_file()
    assert main(["export", "runs/sensor", str(tmp_path / "none")]) == 2
    assert "which transformers does not have" in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_options_take_kinds_from_outside(folder, capsys):
    own = ["--data", "own_source:Readings", "--model", "own_model:DenseConfig", "--run-dir", "runs/named"]
    assert main(["train", "sensor.py", *own]) == 0
    assert main(["train", "sensor.py", "--task", "own_task:Regresion"]) == 2
    assert "Regression" in capsys.readouterr().err


PROBES = '''
from dataclasses import dataclass
from typing import Literal

from own_source import Lines, Readings


@dataclass(frozen=True)
class Probes(Readings):
    first: int = 1
    """The first line to read."""
    order: Literal["up", "down"] = "up"
    """Which way to read."""

    def records(self, split):
        lines = list(enumerate(open(self.path).read().splitlines(), 1))[self.first - 1 :]
        return Lines(self.path, lines[:: 1 if self.order == "up" else -1])
'''


def test_eval_takes_the_fields_that_only_a_source_from_outside_has(folder, capsys, monkeypatch, tmp_path):
    (tmp_path / "probes.py").write_text(PROBES)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "more.txt").write_text("".join(f"{i},1,2,{'high' if i % 2 else 'low'}\n" for i in range(20)))
    more = ["--data.path", str(tmp_path / "more.txt")]
    assert main(["eval", "runs/sensor", *more]) == 0  # the run's own kind
    assert "4 arrays" in (said := capsys.readouterr().out) and "more.txt" in said
    probes = ["eval", "--data", "probes:Probes", *more, "runs/sensor"]
    assert main([*probes, "--data.first", "6", "--data.order", "down"]) == 0
    assert "15 arrays" in capsys.readouterr().out
    for wrong, hint in (
        (["--data.first", "six"], "got --data.first 'six', expected INT or None"),
        (["--data.order", "dwn"], "expected one of down, up, None"),
        (["--data.frist", "6"], "did you mean '--data.first'?"),
        (["--data.name", "mnist"], "got --data.name 'mnist' for data probes:Probes, which has no such field"),
    ):
        assert main([*probes, *wrong]) == 2
        assert hint in capsys.readouterr().err
    assert main([*probes, "--help"]) == 0
    assert "The first line to read." in capsys.readouterr().out


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
