"""One spec by every way that starts processes here: the parameters are the same, bit for bit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.launch.namespaces import two_hosts

CONFIG = """
from jaxmodels.config import Classification, Config, Eval, Mesh, Metrics, Synthetic, Train
from jaxmodels.models.mlp import MLPConfig


def get_config():
    return Config(
        model=MLPConfig(input_shape=(4, 4, 1), classes=2, hidden=(16,)),
        task=Classification(),
        data=Synthetic(batch_size=8),
        train=Train(steps=3),
        eval=Eval(batches=1),
        mesh=Mesh(data=1, fsdp=2),
        metrics=Metrics(progress="none", loggers=()),
    )
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "spec.py").write_text(CONFIG)
    return tmp_path


def start(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def parameters(run: Path) -> dict[str, np.ndarray]:
    import jax

    from jaxmodels import load_run

    leaves = jax.tree_util.tree_leaves_with_path(load_run(run).params["model"])
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def spec(run: str) -> Sequence[str]:
    return "train", "spec.py", "--run-dir", run


@pytest.mark.timeout(600)  # six processes that compile
def test_local_open_mpi_and_ssh_between_hosts_give_the_same_bits(folder: Path) -> None:
    ours, cpu = [sys.executable, "-m", "jaxmodels"], ["--platform", "cpu"]
    start(folder, *ours, "launch", "local", "--processes", "2", *cpu, "--", *spec("runs/local"))
    ran = ["local"]
    if (mpirun := shutil.which("mpirun")) is not None:
        start(folder, mpirun, "--allow-run-as-root", "--oversubscribe", "-n", "2", *ours, *spec("runs/ranks"))
        ran.append("ranks")
    with two_hosts(folder) as hosts:
        place = ["launch", "ssh", "--config", str(hosts.config), "--hosts", "h1", "h2", *cpu]
        start(folder, *hosts.inside, *ours, *place, "--", *spec("runs/ssh"))
        ran.append("ssh")
    expected = parameters(folder / "runs/local")
    for name in ran:
        found = parameters(folder / "runs" / name)
        assert found.keys() == expected.keys() and len(found) >= 4
        assert all(np.array_equal(found[leaf], expected[leaf]) for leaf in expected), name
