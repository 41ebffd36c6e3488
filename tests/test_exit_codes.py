"""A process ends with the exit code of what happened, also while its threads compute."""

import atexit
import functools
import importlib
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest

from jaxmodels import cli, commands
from tests.quick import FLAGS

CONFIG = """
from jaxmodels.config import *
from jaxmodels.models.mlp import MLPConfig

def get_config():
    return Config(
        model=MLPConfig(input_shape=(4,), classes=3, hidden=(8,)),
        task=Classification(),
        data=Synthetic(batch_size=8),
        optim=AdamW(peak_lr=1e35, clip_norm=None),
        metrics=Metrics(progress="none"),
    )
"""


def test_a_run_that_fails_ends_with_1_each_time(root, tmp_path):
    # batches are still made ahead, and a step is still computed, when the loss is found to be no number
    (tmp_path / "diverges.py").write_text(CONFIG)
    command = [sys.executable, "-m", "jaxmodels", "train", str(tmp_path / "diverges.py")]
    env = {**os.environ, "PYTHONPATH": str(root), "XLA_FLAGS": FLAGS}
    env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # all of them run the same programs
    for turn in range(3):
        where = ["--run-dir", str(tmp_path / f"run{turn}")]
        ended = subprocess.run([*command, *where], cwd=root, env=env, capture_output=True, text=True)
        assert ended.returncode == 1, ended.stderr
        assert ended.stderr.splitlines()[-1].startswith("error: got loss nan"), ended.stderr


def test_an_error_in_code_from_outside_names_its_line(monkeypatch, tmp_path, capsys):
    (tmp_path / "own_code.py").write_text("import json\n\n\ndef build(text):\n    return json.loads(text)\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    own = importlib.import_module("own_code")
    monkeypatch.setattr(commands, "run", lambda *argv: own.build("{"))  # it fails in the standard library
    assert cli.main(["models", "gpt2"]) == 1
    said = capsys.readouterr().err
    assert f"(in {tmp_path}/own_code.py, line 5, in build: the traceback is in {tmp_path}" in said
    assert said.startswith("error: JSONDecodeError: ") and "a fault of jaxmodels" not in said
    monkeypatch.setattr(commands, "run", functools.partial(commands.split, 3))
    assert cli.main(["models", "gpt2"]) == 1
    assert "(a fault of jaxmodels: the traceback is in" in capsys.readouterr().err


def test_code_from_outside_that_branches_on_a_traced_array_is_refused_by_its_line(monkeypatch, tmp_path, capsys):
    (tmp_path / "own_branch.py").write_text("class Mine:\n    def loss(self, x):\n        return 1 if x > 0 else 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    own = importlib.import_module("own_branch")
    monkeypatch.setattr(commands, "run", lambda *argv: jax.jit(own.Mine().loss)(1.0))
    assert cli.main(["models", "gpt2"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: got Mine.loss in {tmp_path}/own_branch.py, whose line 3 asks for the value of an ")
    assert said.endswith("try jnp.where(condition, a, b) in place of if\n") and said.count("\n") == 1


def test_an_error_that_nobody_foresaw_ends_one_of_several_processes_at_once(monkeypatch, capsys):
    """JAX's barrier at exit would hold it for 20 s, in which the others fail of it and look like the first."""

    def fails():
        raise KeyError("no such thing")

    monkeypatch.setattr(cli, "main", fails)
    monkeypatch.setattr(atexit, "_run_exitfuncs", lambda: pytest.fail("waited for others"))
    monkeypatch.setitem(sys.modules, "jaxmodels.parallel.distributed", SimpleNamespace(finalize=sys.exit))
    with pytest.raises(SystemExit) as end:
        cli.process()
    assert end.value.code == 1 and "KeyError: 'no such thing'" in capsys.readouterr().err
