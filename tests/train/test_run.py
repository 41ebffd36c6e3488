"""A run through the real command line: killed, told to stop, damaged, refused; and the same bits at the end."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxmodels import cli
from jaxmodels import config as configs
from jaxmodels.report import goodput
from jaxmodels.train import evaluate, step
from jaxmodels.train.checkpoint import Checkpointer
from jaxmodels.train.job import assemble
from jaxmodels.train.manifest import verify
from tests.quick import FLAGS

STEPS = 60
CONFIG = f"""
from pathlib import Path
from jaxmodels.config import *
from jaxmodels.models.mlp import MLPConfig

def get_config():
    return Config(
        model=MLPConfig(input_shape=(4,), classes=2, hidden=(8,), dropout=0.1),
        task=Classification(),
        data=Table(path=(str(Path(__file__).parent / "rows.jsonl"),), batch_size=8),
        optim=AdamW(peak_lr=1e-2, schedule=Constant()),
        train=Train(steps={STEPS}, ema=0.9),
        eval=Eval(every=10, batches=2),
        checkpoint=Checkpoint(every=5, keep=3),
        metrics=Metrics(every=1, loggers=("paced:Paced",), progress="plain"),
    )
"""
# steps that take so long that a signal comes while there are some left
PACED = """
import time

from jaxmodels import Logger

class Paced(Logger):
    def scalars(self, step, values):
        time.sleep(0.03)
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model so small that a run is little more than its start, on rows whose class is the sign of a number."""
    folder, rng = tmp_path_factory.mktemp("config"), np.random.default_rng(0)
    rows = [{"x": x.tolist(), "label": "low" if x[0] < 0 else "high"} for x in rng.normal(size=(400, 4))]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tiny.py").write_text(CONFIG)
    (folder / "paced.py").write_text(PACED)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield folder / "tiny.py"


class Process:
    """`jaxmodels train` in a process of its own, its output read line by line."""

    def __init__(self, root: Path, config: Path, run: Path, *options: str):
        self.run = run
        environment = {**os.environ, "XLA_FLAGS": FLAGS, "PYTHONPATH": f"{root}:{config.parent}"}
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # all of them run the same programs
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jaxmodels", "train", str(config), "--run-dir", str(run), *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        self.output = ""

    def until(self, step: int) -> Process:
        """Wait until a step of at least this number is reported."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line
            if (found := re.match(r"step (\d+)/", line)) and int(found[1]) >= step:
                return self
        raise AssertionError(f"ended before step {step}:\n{self.output}")

    def end(self, number: signal.Signals | None = None) -> int:
        """Send a signal, if any, and wait; the exit code."""
        if number is not None:
            self.process.send_signal(number)
        self.output += self.process.communicate(timeout=120)[0]
        return self.process.returncode


def broken_checkpoints(run: Path) -> list[str]:
    """What is wrong with the numbered checkpoints of a run."""
    found = []
    for folder in (run / "checkpoints").glob("*"):
        if folder.name.isdigit():
            try:
                verify(folder, lambda tree: None)
            except Exception as error:
                found.append(str(error))
    return found


def bits(run: Path) -> dict[str, str]:
    """A hash of every array of the newest checkpoint."""
    layout = assemble(configs.read(run)[0]).layout
    found = Checkpointer(run / "checkpoints").restore(layout)
    assert found is not None and found[2] == STEPS
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(found[0])}
    leaves[".rng"] = jax.random.key_data(leaves[".rng"])
    return {name: hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest() for name, leaf in leaves.items()}


def values(run: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl, without what the clock says."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in sorted(row) if not name.startswith("perf/")} for row in rows]


def snapshot(run: Path) -> dict[str, Any]:
    """Contents of what a run that does nothing must not touch."""
    paths = [run / "metrics.jsonl", *(p for p in (run / "checkpoints").rglob("*") if p.is_file())]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


@pytest.fixture(scope="module")
def whole(root: Path, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed."""
    process = Process(root, config, tmp_path_factory.mktemp("whole") / "run")
    assert process.end() == 0, process.output
    return process.run


@dataclass
class Disturbed:
    """A run that was stopped in every way, and what was seen."""

    run: Path
    codes: dict[str, int] = field(default_factory=dict)
    output: dict[str, str] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    saved: dict[str, list[int]] = field(default_factory=dict)
    began: list[float] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)


@pytest.fixture(scope="module")
def disturbed(root: Path, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Disturbed:
    seen = Disturbed(tmp_path_factory.mktemp("disturbed") / "run")
    checkpoints = Checkpointer(seen.run / "checkpoints")

    def disturb(name: str, process: Process, number: signal.Signals | None = None) -> None:
        seen.codes[name] = process.end(number)
        seen.ended.append(time.time())
        seen.output[name] = process.output
        seen.broken += broken_checkpoints(seen.run)
        seen.saved[name] = checkpoints.steps()

    def start() -> Process:
        seen.began.append(time.time())
        return Process(root, config, seen.run)

    disturb("kill", start().until(12), signal.SIGKILL)
    process = start().until(18)
    patience = time.monotonic() + 20
    while not list(checkpoints.directory.glob("*.saving")) and time.monotonic() < patience:
        time.sleep(0.001)
    disturb("kill while saving", process, signal.SIGKILL)
    with (seen.run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "train/lo')  # what a kill may leave of a line
    disturb("SIGTERM", start().until(27), signal.SIGTERM)
    disturb("SIGINT", start().until(38), signal.SIGINT)
    newest, older = checkpoints.steps()[:-3:-1]
    flip(largest(checkpoints.directory / str(newest)))
    cut(largest(checkpoints.directory / str(older)))
    disturb("damage", start())
    return seen


def largest(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def test_a_run_stopped_in_every_way_ends_in_the_same_bits(whole: Path, disturbed: Disturbed) -> None:
    assert [disturbed.codes[name] for name in ("kill", "kill while saving")] == [-signal.SIGKILL] * 2
    assert bits(disturbed.run) == bits(whole)


def test_metrics_have_each_step_once_with_the_same_values(whole: Path, disturbed: Disturbed) -> None:
    assert [row["step"] for row in values(whole)] == list(range(1, STEPS + 1))
    assert sum("eval/loss" in row for row in values(whole)) == STEPS // 10
    assert values(disturbed.run) == values(whole)


def test_a_kill_leaves_only_readable_checkpoints(disturbed: Disturbed) -> None:
    assert disturbed.saved["kill"] and disturbed.saved["kill while saving"]
    assert disturbed.broken == []


def test_sigterm_and_ctrl_c_save_and_exit_with_75(disturbed: Disturbed) -> None:
    for name, least in (("SIGTERM", 27), ("SIGINT", 38)):
        at = disturbed.saved[name][-1]
        assert disturbed.codes[name] == 75 and at >= least
        assert f"stopped and saved at step {at} in" in disturbed.output[name]
    assert f"resumed at step {disturbed.saved['SIGTERM'][-1]} of {STEPS}" in disturbed.output["SIGINT"]


def test_damaged_checkpoints_are_said_and_the_one_before_is_used(disturbed: Disturbed) -> None:
    third, second, first = disturbed.saved["SIGINT"][-3:]
    said = disturbed.output["damage"]
    assert disturbed.codes["damage"] == 0
    assert f"error: CHECKPOINT DAMAGED: step {first}: " in said and f"Using step {third} instead" in said
    assert "its sha256 differs" in said and re.search(rf"step {second}: file \S+ has \d+ bytes, not \d+", said)
    assert "CHECKPOINT DAMAGED" in (disturbed.run / "log.txt").read_text()


def test_every_second_of_a_run_stopped_in_every_way_is_accounted_for(disturbed: Disturbed) -> None:
    found = goodput.account(disturbed.run, now=math.inf)
    each, seconds = found["attempts"], found["seconds"]
    assert [attempt["ended"] for attempt in each] == ["killed", "killed", "preempted", "preempted", "done"]
    resumed = [disturbed.saved[name][-1] for name in ("kill", "kill while saving", "SIGTERM")]
    assert [attempt["first"] for attempt in each] == [0, *resumed, disturbed.saved["SIGINT"][-3]]
    # as somebody with a watch beside it has seen it, but for what Python needs to begin and to leave
    wall = disturbed.ended[-1] - disturbed.began[0]
    assert 0.93 * wall < found["wall_seconds"] < wall + 0.1
    assert sum(seconds.values()) == pytest.approx(found["wall_seconds"], rel=0.01)
    for attempt, began, ended in zip(each, disturbed.began, disturbed.ended, strict=True):
        assert began - 0.1 < attempt["began"] < attempt["until"] < ended + 0.1
        assert all(value >= 0 for value in attempt["seconds"].values())
    # the fifth began before where the fourth had
    assert each[3]["seconds"]["lost work"] > 0 == each[4]["seconds"]["lost work"]
    assert [attempt["seconds"]["restart"] > 0 for attempt in each] == [True, True, False, False, False]
    assert min(seconds[name] for name in ("productive", "start", "restore", "compile", "evaluation", "save")) > 0


def train(config: Path, run: Path, *options: str) -> int:
    """The command line in this process."""
    return cli.main(["train", str(config), "--run-dir", str(run), *options])


def test_a_finished_run_says_so_and_changes_nothing(
    config: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(whole)
    assert train(config, whole) == 0
    assert "nothing is left to do" in capsys.readouterr().out
    assert snapshot(whole) == before


def test_a_run_directory_of_another_config_is_refused_with_the_difference(
    config: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(whole), (whole / "config.json").read_bytes()
    assert train(config, whole, "--optim.peak-lr", "1e-4", "--metrics.every", "2") == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "(optim.peak_lr was 0.01, now 0.0001), expected the same" in message
    assert (snapshot(whole), (whole / "config.json").read_bytes()) == before


def test_other_data_is_refused(config: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, rows = snapshot(whole), config.parent / "rows.jsonl"
    text = rows.read_text()
    try:
        rows.write_text(text.replace("low", "high", 1))
        assert train(config, whole) == 2
    finally:
        rows.write_text(text)
    message = capsys.readouterr().err
    assert "got data with fingerprint" in message and "--resume must" in message
    assert snapshot(whole) == before


def test_must_wants_a_checkpoint_and_never_moves_the_run_aside(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ("--train.steps", "3", "--eval.every", "0")
    run = tmp_path / "run"
    assert train(config, run, *short, "--resume", "must") == 2
    assert "expected a checkpoint there" in capsys.readouterr().err and not run.exists()
    assert train(config, run, *short) == 0
    first = snapshot(run)
    assert train(config, run, "--train.steps", "2", "--resume", "must") == 2
    assert f"got train.steps 2 for {run}, which is at step 3" in capsys.readouterr().err
    assert train(config, run, "--train.steps", "5", "--eval.every", "0", "--resume", "must") == 0
    assert "resumed at step 3 of 5" in capsys.readouterr().out
    assert [row["step"] for row in values(run)] == [1, 2, 3, 4, 5]
    went_on = snapshot(run)
    assert train(config, run, *short, "--resume", "never") == 0
    assert f"moved the run that was in {run} to {run}.old1" in capsys.readouterr().out
    assert [row["step"] for row in values(run)] == [1, 2, 3]
    assert len(went_on) == len(snapshot(tmp_path / "run.old1")) and first != went_on


def test_a_loss_that_is_not_finite_stops_the_run(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, wild = tmp_path / "run", ("--optim", "sgd", "--optim.clip-norm", "None", "--optim.peak-lr", "1e30")
    assert train(config, run, *wild, "--checkpoint.every", "1", "--train.ema", "None") == 1
    message = capsys.readouterr().err
    found = re.search(r"loss (\S+) at step (\d+), on examples ([\d, ]+); last good checkpoint: step (\d+);", message)
    assert found, message
    loss, step, examples, good = found.groups()
    assert not math.isfinite(float(loss)) and int(good) == int(step) - 1
    order = assemble(configs.read(run)[0]).loader("train").order
    assert [int(i) for i in examples.split(",")] == list(order.indices(int(step) - 1))
    assert broken_checkpoints(run) == [] and int(good) in Checkpointer(run / "checkpoints").steps()
    assert [row["step"] for row in values(run)] == list(range(1, int(step)))


def test_an_early_stop_keeps_the_best_checkpoint_and_is_not_undone(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # nothing is learned, and no average is rounded, so that the first evaluation stays the best
    nothing = "--optim.peak-lr 1e-30 --train.ema None"
    options = f"--eval.every 3 --eval.early-stop 2 {nothing} --checkpoint.best True --checkpoint.keep 1".split()
    run = tmp_path / "run"
    assert train(config, run, *options) == 0
    assert "stopped early at step 9" in capsys.readouterr().out
    checkpoints = Checkpointer(run / "checkpoints")
    best = checkpoints.best()
    assert checkpoints.steps() == [3, 9] and best is not None and best["step"] == 3
    assert best["metric"] == {"eval/loss": pytest.approx(values(run)[2]["eval/loss"])}
    before = snapshot(run)
    assert train(config, run, *options) == 0
    said = capsys.readouterr().out
    assert "nothing is left to do" in said and "stopped early at step 9" in said
    assert snapshot(run) == before


def test_the_moving_average_is_what_is_evaluated(whole: Path) -> None:
    cfg = configs.read(whole)[0]
    job = assemble(cfg)
    found = Checkpointer(whole / "checkpoints").restore(job.layout)
    assert found is not None
    measure = evaluate.build_evaluate(job.task, job.mesh)
    average, plain = [
        measure(part, found[0].stats, job.loader("eval").once(cfg.eval.batches))
        for part in (found[0].ema, found[0].params)
    ]
    assert average is not None and plain is not None and abs(average["loss"] - plain["loss"]) > 1e-3
    assert values(whole)[-1]["eval/loss"] == pytest.approx(average["loss"], rel=1e-6)


def test_the_compiler_is_given_options_and_one_that_it_does_not_know_is_named(config, tmp_path, capsys):
    assert step.compiler_options(("xla_a=true", "xla_b=3", "xla_c=x=y")) == {"xla_a": True, "xla_b": 3, "xla_c": "x=y"}
    train = ["train", str(config), "--train.steps", "1", "--run-dir", str(tmp_path / "run")]
    assert cli.main([*train, "--train.xla", "xla_no_such_thing=true"]) == 2
    said = capsys.readouterr().err
    assert "got train.xla xla_no_such_thing, which this compiler does not know" in said and said.count("\n") == 1
    assert cli.main([*train, "--train.xla", "xla_cpu_enable_fast_math=false"]) == 0
