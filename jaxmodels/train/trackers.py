"""Trackers of experiments, and a place for Prometheus to read: loggers that need a package of their own."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxmodels.config.explain import flatten
from jaxmodels.train.loggers import Logger

if TYPE_CHECKING:
    from jaxmodels.config import Config

PROJECT = "jaxmodels"
"""Name of the project of W&B and of the experiment of MLflow that runs are reported to, unless their environment
variables name another."""


class WandB(Logger):
    """Reports to Weights & Biases: offline into the run's folder `wandb`, unless $WANDB_MODE or $WANDB_API_KEY is set.

    A resumed run continues the same run there. `wandb sync` sends what was reported offline.
    """

    package, extra = "wandb", "trackers"

    def start(self, run: Path, config: Config, step: int) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        online = {"WANDB_MODE", "WANDB_API_KEY"} & {*os.environ}
        self.wandb = wandb
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), name=str(run), id=_identity(run), resume="allow",
            dir=run, config=flatten(config), mode=None if online else "offline",
            settings=wandb.Settings(silent=True, console="off"),
        )  # fmt: skip

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def images(self, step: int, name: str, images: np.ndarray) -> None:
        self.run.log({name: [self.wandb.Image(image.squeeze()) for image in images]}, step=step)

    def close(self) -> None:
        self.run.finish()


class MLflow(Logger):
    """Reports to MLflow: to $MLFLOW_TRACKING_URI, else to the database `mlflow.db` beside the run's directory.

    A resumed run continues the same run there, whose id is kept in the run's file `mlflow_run_id`.
    """

    package, extra = "mlflow", "trackers"

    def start(self, run: Path, config: Config, step: int) -> None:
        import mlflow  # pyright: ignore[reportMissingImports]
        from mlflow.entities import Metric, Param  # pyright: ignore[reportMissingImports]

        where = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run.absolute().parent / 'mlflow.db'}"
        self.client, self.metric, kept = mlflow.MlflowClient(where), Metric, run / "mlflow_run_id"
        if not kept.exists():
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            found = self.client.get_experiment_by_name(name)
            experiment = found.experiment_id if found else self.client.create_experiment(name)
            kept.write_text(self.client.create_run(experiment, run_name=str(run)).info.run_id)
            params = [Param(key, str(value)) for key, value in flatten(config).items()]
            for begin in range(0, len(params), 100):  # the most that it takes at once
                self.client.log_batch(kept.read_text(), params=params[begin : begin + 100])
        self.id = kept.read_text()
        self.client.update_run(self.id, "RUNNING")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        self.client.log_batch(self.id, [self.metric(name, value, now, step) for name, value in values.items()])

    def close(self) -> None:
        self.client.set_terminated(self.id)


class Prometheus(Logger):
    """Offers a run's newest metrics to Prometheus, at `/metrics` of a port of all of the machine's addresses.

    One gauge, `jaxmodels_run_metric`, has them all, by their names in metrics.jsonl; those of evaluation stay until the
    next one.
    """

    package, extra = "prometheus_client", "serve"

    def __init__(self) -> None:
        self.run, self.step, self.values, self.reported = "", 0, dict[str, float](), time.time()
        self.server: Any = None

    def start(self, run: Path, config: Config, step: int) -> None:
        from prometheus_client import CollectorRegistry, start_http_server

        assert config.metrics.prometheus is not None
        self.run, self.step, registry = str(run), step, CollectorRegistry()
        registry.register(self)  # pyright: ignore[reportArgumentType]  # it asks for `collect` alone
        self.server, self.thread = start_http_server(config.metrics.prometheus, registry=registry)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.step, self.values, self.reported = step, {**self.values, **values}, time.time()

    def collect(self) -> Iterator[Any]:
        """Give what is known at the moment of a scrape."""
        from prometheus_client.core import GaugeMetricFamily

        def gauge(name: str, about: str, found: Mapping[str, float] | float) -> Any:
            labels = ["run", "name"] if isinstance(found, Mapping) else ["run"]
            family = GaugeMetricFamily(f"jaxmodels_run_{name}", about, labels=labels)
            for key, value in (found if isinstance(found, Mapping) else {"": found}).items():
                family.add_metric([self.run, key][: len(labels)], value)
            return family

        yield gauge("metric", "Newest value of each metric.", self.values)
        yield gauge("step", "Step of the newest report.", self.step)
        yield gauge("reported_timestamp_seconds", "When it was reported, in seconds since 1970.", self.reported)

    def close(self) -> None:
        if self.server is not None:
            self.server.shutdown()
            self.server.server_close()
            self.thread.join()


def _identity(run: Path) -> str:
    """Return a name for a run's directory that W&B takes as an id."""
    return hashlib.sha256(str(run.absolute()).encode()).hexdigest()[:16]
