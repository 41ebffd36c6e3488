"""A training that loses a node, goes on without it, and takes it in again is the training that was left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jaxmodels import config
from jaxmodels.launch import events
from jaxmodels.train import run as runs
from tests.conftest import ROOT
from tests.launch.test_faults import two_ports
from tests.quick import FLAGS

STEPS, BATCH = 80, 8
# attempts with as many processes compile once
CACHE = {"XDG_CACHE_HOME": "cache", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
# The first attempt stops where it will be killed, after a checkpoint. The second one takes its time after some
# steps, until the node that has come back makes it save.
SOURCE = """
import os
import time
from dataclasses import dataclass

from jaxmodels.config import Synthetic
from jaxmodels.data import Source

ATTEMPT, RANK = int(os.environ.get("JAXMODELS_ATTEMPT", "-1")), os.environ.get("JAXMODELS_PROCESS_ID")


class Told(Source):
    def __init__(self, source):
        self.source, self.fingerprint, self.calls = source, source.fingerprint, 0

    def __len__(self):
        return STEPS * BATCH

    def batch(self, indices, epochs):
        if len(indices) > 1:
            with open(f"examples-{ATTEMPT}-{RANK}", "a") as file:
                print(*indices, file=file)
            self.calls += 1
            if ATTEMPT == 0 and self.calls > 12:
                time.sleep(600)
            if ATTEMPT == 1 and self.calls > 6:
                time.sleep(0.3)
        return self.source.batch(indices, epochs)

    def describe(self):
        return "examples that are told of"


@dataclass(frozen=True)
class Telling(Synthetic):
    def examples(self, opening, task):
        source = super().examples(opening, task)
        return Told(source) if opening.split == "train" else source
"""
SPEC = """
from telling import Telling

from jaxmodels.config import Checkpoint, Classification, Config, Eval, Metrics, Train
from jaxmodels.models.mlp import MLPConfig


def get_config():
    return Config(
        model=MLPConfig(input_shape=(4, 4, 1), classes=4, hidden=(16,)),
        task=Classification(),
        data=Telling(batch_size=BATCH, prefetch=0),
        train=Train(steps=STEPS),
        eval=Eval(batches=1),
        checkpoint=Checkpoint(every=10),
        metrics=Metrics(every=1, progress="none", loggers=()),
    )
"""


class Node:
    """A supervisor at work, and what it prints."""

    def __init__(self, folder: Path, node: int, port: int) -> None:
        where = ["--nodes", "2", "--node", str(node), "--coordinator", f"127.0.0.1:{port}", "--min-nodes", "1"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jaxmodels.launch.node", "--processes", "1", "--platform", "cpu", *where, "--",
             "train", "spec.py", "--run-dir", "run"],
            cwd=folder, env={**os.environ, "PYTHONPATH": f"{ROOT}:{folder}", "XLA_FLAGS": FLAGS, **CACHE}, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.output = ""
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line

    def until(self, true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not true():
            assert time.monotonic() < deadline and self.process.poll() is None, self.output
            time.sleep(0.1)


def losses(run: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, STEPS + 1))
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


@pytest.mark.timeout(400)
def test_a_run_that_loses_a_node_and_gets_it_back_has_the_losses_and_examples_of_one_that_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in (("telling.py", SOURCE), ("spec.py", SPEC)):
        (tmp_path / name).write_text(text.replace("STEPS", str(STEPS)).replace("BATCH", str(BATCH)))
    port = two_ports()
    nodes = [Node(tmp_path, node, port) for node in (1, 0)]
    first = nodes[-1]
    try:
        first.until((tmp_path / "run/checkpoints/10").is_dir)
        nodes[0].process.send_signal(signal.SIGKILL)
        told = tmp_path / "examples-1-0"
        first.until(lambda: told.exists() and told.read_text().count("\n") > 6)
        nodes.append(Node(tmp_path, 1, port))
        assert first.process.wait(timeout=120) == 0, first.output
    finally:
        for node in nodes:
            node.process.kill()
            node.reader.join(timeout=10)
    starts = [row for row in events.read(tmp_path / "run") if row["event"] == "start"]
    assert [row["processes"] for row in starts] == [2, 1, 2], first.output
    assert f"on 1 of 2 processes: 2 microbatches keep the batch at {BATCH}" in (tmp_path / "run/log.txt").read_text()

    begun = [row["step"] or 0 for row in starts]
    assert begun[:2] == [0, 10] and 16 <= begun[2] < STEPS
    taken = []
    for attempt, (begin, end) in enumerate(zip(begun, [*begun[1:], STEPS], strict=True)):
        for rank in range(starts[attempt]["processes"]):
            lines = (tmp_path / f"examples-{attempt}-{rank}").read_text().splitlines()
            taken += [int(index) for line in lines[: end - begin] for index in line.split()]
    assert sorted(taken) == list(range(STEPS * BATCH))

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    runs.train(config.load(tmp_path / "spec.py"), tmp_path / "alone")
    alone, found = losses(tmp_path / "alone"), losses(tmp_path / "run")
    assert list(found.values()) == pytest.approx(list(alone.values()), abs=1e-5)
    assert np.median(np.abs(np.diff(list(alone.values())))) > 1e-3, "another order of examples would not show"
