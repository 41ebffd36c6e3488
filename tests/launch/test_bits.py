"""One spec by every way that starts processes here: the parameters are the same, bit for bit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from benchmarks import slurm
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
PLACE = """
from jaxmodels.launch.slurm import Slurm


def get_place():
    return Slurm(nodes=2, processes=1, platform="cpu")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "spec.py").write_text(CONFIG)
    (tmp_path / "place.py").write_text(PLACE)
    return tmp_path


def start(folder: Path, *command: str, given: Mapping[str, str] = os.environ) -> subprocess.CompletedProcess[str]:
    environment = {**given, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # all of them run the same programs
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


@pytest.mark.timeout(900)  # eight processes that compile
def test_local_open_mpi_ssh_and_slurm_on_two_hosts_give_the_same_bits(folder: Path) -> None:
    ours, cpu = [sys.executable, "-m", "jaxmodels"], ["--platform", "cpu"]
    start(folder, *ours, "launch", "local", "--processes", "2", *cpu, "--", *spec("runs/local"))
    ran, lacking = ["local"], [slurm.missing()] if slurm.missing() else []
    if (mpirun := shutil.which("mpirun")) is not None:
        start(folder, mpirun, "--allow-run-as-root", "--oversubscribe", "-n", "2", *ours, *spec("runs/ranks"))
        ran.append("ranks")
    else:
        lacking.append("needs Open MPI: no mpirun here")
    with two_hosts(folder) as hosts:
        place = ["launch", "ssh", "--config", str(hosts.config), "--hosts", "h1", "h2", *cpu]
        start(folder, *hosts.inside, *ours, *place, "--", *spec("runs/ssh"))
        ran.append("ssh")
        if not slurm.missing():
            (folder / "cluster").mkdir()
            with slurm.on(hosts.namespaces, folder / "cluster") as environ:
                head = hosts.namespaces.inside(0, folder)
                start(folder, *head, *ours, "launch", "place.py", "--", *spec("runs/slurm"), given=environ)
                end = time.monotonic() + 300
                while start(folder, *head, "squeue", "--noheader", given=environ).stdout.strip():
                    assert time.monotonic() < end, "the job of SLURM does not end"
                    time.sleep(0.5)
            ran.append("slurm")
    expected = parameters(folder / "runs/local")
    for name in ran:
        found = parameters(folder / "runs" / name)
        assert found.keys() == expected.keys() and len(found) >= 4
        assert all(np.array_equal(found[leaf], expected[leaf]) for leaf in expected), name
    if lacking:
        pytest.skip(f"{', '.join(ran)} give the same bits; the others: {'; '.join(lacking)}")
