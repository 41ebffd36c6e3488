"""Prometheus reads what a run reports; W&B and MLflow keep it, offline and across restarts."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from jaxmodels import cli
from jaxmodels.config import Config, Metrics
from jaxmodels.errors import UserError
from jaxmodels.models.mlp import MLPConfig
from jaxmodels.train import loggers
from jaxmodels.train.trackers import Prometheus

CONFIG = Config(model=MLPConfig())
SMALL = [
    "configs/gpt_stdlib.py", "--model", "mlp", "--model.hidden", "8", "--task", "classification", "--data", "synthetic",
    "--train.steps", "2", "--metrics.every", "1", "--metrics.progress", "none", "--eval.batches", "1",
]  # fmt: skip


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("", 0))
        return taken.getsockname()[1]


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"needs {package}: the extra trackers")


def read(url: str) -> str:
    return urllib.request.urlopen(url, timeout=10).read().decode()


@pytest.fixture
def offered():
    """A run's metrics at a port, reported twice: of training, then of evaluation."""
    port = free_port()
    logger = Prometheus()
    logger.start(Path("runs/own"), dataclasses.replace(CONFIG, metrics=Metrics(prometheus=port)), 0)
    logger.scalars(3, {"train/loss": 2.5, "perf/step_seconds": 0.1})
    logger.scalars(4, {"eval/group/a b/loss": 1.5})
    yield port
    logger.close()


def test_a_scrape_gives_the_newest_of_each_metric_by_its_name(offered):
    from prometheus_client.parser import text_string_to_metric_families

    families = {family.name: family.samples for family in text_string_to_metric_families(
        read(f"http://localhost:{offered}/metrics"))}  # fmt: skip
    values = {sample.labels["name"]: sample.value for sample in families["jaxmodels_run_metric"]}
    assert values == {"train/loss": 2.5, "perf/step_seconds": 0.1, "eval/group/a b/loss": 1.5}
    assert [(sample.labels, sample.value) for sample in families["jaxmodels_run_step"]] == [({"run": "runs/own"}, 4.0)]
    assert abs(families["jaxmodels_run_reported_timestamp_seconds"][0].value - time.time()) < 60


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs Debian's prometheus")
def test_prometheus_itself_scrapes_it(offered, tmp_path):
    own = free_port()
    scrape = {"job_name": "train", "static_configs": [{"targets": [f"localhost:{offered}"]}]}
    (tmp_path / "prometheus.yml").write_text(
        json.dumps({"global": {"scrape_interval": "1s", "scrape_timeout": "1s"}, "scrape_configs": [scrape]})
    )
    command = ["prometheus", "--config.file=prometheus.yml", "--storage.tsdb.path=data"]
    process = subprocess.Popen(
        [*command, f"--web.listen-address=localhost:{own}"], cwd=tmp_path, stderr=subprocess.DEVNULL
    )
    query, found = f"http://localhost:{own}/api/v1/query?query=jaxmodels_run_metric", []
    try:
        for _ in range(300):
            try:
                if found := json.loads(read(query))["data"]["result"]:
                    break
            except OSError:  # it is starting
                assert process.poll() is None
            time.sleep(0.1)
    finally:
        process.terminate()
        process.wait(30)
    assert {row["metric"]["name"]: float(row["value"][1]) for row in found}["train/loss"] == 2.5


def test_a_port_that_is_taken_is_named_and_harms_no_run(root, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(root)
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert cli.main(["train", *SMALL, "--run-dir", str(tmp_path / "run"), "--metrics.prometheus", port]) == 0
    assert "logger prometheus failed (OSError" in (tmp_path / "run" / "log.txt").read_text()
    for wrong in (["--metrics.prometheus", "65536"], ["--metrics.loggers", "prometheus"]):
        assert cli.main(["train", *SMALL, "--run-dir", str(tmp_path / "wrong"), *wrong]) == 2


@pytest.mark.parametrize(
    ("section", "package", "extra"),
    [
        (Metrics(loggers=("wandb",)), "wandb", "trackers"),
        (Metrics(loggers=("mlflow",)), "mlflow", "trackers"),
        (Metrics(prometheus=9100), "prometheus_client", "serve"),
    ],
)
def test_a_package_that_is_not_there_is_named_before_work_begins(monkeypatch, section, package, extra):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"expected the package {package} to be installed, try pip install '.*{extra}"):
        loggers.find_loggers(section)


def reported(name: str, run: Path) -> None:
    """A run that is killed after step 2 and goes on after step 1."""
    for first, steps in ((0, (1, 2)), (1, (2, 3))):
        logger = loggers.find_loggers(Metrics(loggers=(name,)))[name]()
        logger.start(run, CONFIG, first)
        for step in steps:
            logger.scalars(step, {"train/loss": 1 / step})
        logger.close()


@needs("mlflow")
def test_mlflow_has_one_run_for_a_directory_with_all_fields(tmp_path, monkeypatch):
    import mlflow

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "run").mkdir()
    reported("mlflow", tmp_path / "run")
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (experiment,) = [each for each in client.search_experiments() if each.name == "jaxmodels"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["optim.peak_lr"] == str(CONFIG.optim.peak_lr)
    history = {each.step: each.value for each in client.get_metric_history(run.info.run_id, "train/loss")}
    assert history == {1: 1.0, 2: 0.5, 3: 1 / 3}


@needs("wandb")
def test_wandb_keeps_a_run_offline_in_its_directory(tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "run").mkdir()
    reported("wandb", tmp_path / "run")
    kept = sorted(tmp_path.glob("run/wandb/offline-run-*/run-*.wandb"))
    assert len({path.name for path in kept}) == 1, "a resumed run has the same id"
    assert b"train/loss" in b"".join(path.read_bytes() for path in kept)


@needs("wandb")
def test_wandb_takes_images(tmp_path):
    (tmp_path / "run").mkdir()
    logger = loggers.find_loggers(Metrics(loggers=("wandb",)))["wandb"]()
    logger.start(tmp_path / "run", CONFIG, 0)
    logger.images(3, "samples", np.arange(128, dtype=np.uint8).reshape(2, 8, 8, 1))
    logger.close()
    assert len(list(tmp_path.glob("run/wandb/offline-run-*/files/media/images/*.png"))) == 2
