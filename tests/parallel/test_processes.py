"""Two and four real processes compute what one does."""

import json
import os
import subprocess
import sys

import jax
import pytest

from jaxmodels.launch import events
from jaxmodels.train import load_run
from tests.quick import FLAGS

FIELDS = [
    "--metrics.every",
    "1",
    "--checkpoint.every",
    "3",
    "--eval.batches",
    "2",
    "--model.width",
    "32",
    "--model.attention",
    "xla",
    "--data.seq-len",
    "32",
    "--data.batch-size",
    "8",
    "--eval.every",
    "3",
    "--metrics.progress",
    "plain",
    # a step that compiles quickly, and is the same whatever the number of steps
    "--optim",
    "adamw",
    "--optim.schedule",
    "constant",
]


MIXTRAL = """
from jaxmodels.config import AdamW, Config, Stdlib, Train
from jaxmodels.models.mixtral import MixtralConfig


def get_config() -> Config:
    return Config(
        model=MixtralConfig(vocab_size=256, width=32, heads=4, kv_heads=2, mlp_width=64, experts=4),
        data=Stdlib(),
        optim=AdamW(peak_lr=4e-3, warmup_steps=2),
        train=Train(),
    )
"""


KILLER = """
import os
import signal
import time

from jaxmodels.train.loggers import Logger


class Killer(Logger):
    def start(self, run, config, step):
        self.run = run

    def scalars(self, step, values):
        if step == 5 and os.environ["JAXMODELS_ATTEMPT"] == "0":
            while not (self.run / "checkpoints" / "3").exists():
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGKILL)
"""


def train(run, processes, root, *fields, config="configs/gpt_stdlib.py", devices=4, layers=1, steps=6):
    command = [
        sys.executable,
        "-m",
        "jaxmodels.launch.node",
        "--processes",
        str(processes),
        "--devices",
        str(devices // processes),
        "--platform",
        "cpu",
        "--",
        "train",
        str(config),
        "--run-dir",
        str(run),
        *FIELDS,
        "--model.layers",
        str(layers),
        "--train.steps",
        str(steps),
        *fields,
    ]
    # what a test writes beside the run can be imported by name
    env = {
        **os.environ,
        "XLA_FLAGS": FLAGS,
        "PYTHONPATH": f"{run.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return rows, done.stdout + done.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory, root):
    folder = tmp_path_factory.mktemp("processes")
    fields = ("--mesh.data", "2", "--mesh.fsdp", "2")
    return folder, train(folder / "one", 1, root, *fields, steps=10), train(folder / "two", 2, root, *fields)


def test_two_processes_give_the_losses_of_one(runs):
    _, (one, _), (two, _) = runs
    assert [row["step"] for row in two] == [1, 2, 3, 4, 5, 6]
    for name in ("train/loss", "train/grad_norm", "eval/loss", "eval/accuracy"):
        a, b = ([row[name] for row in rows if name in row and row["step"] <= 6] for rows in (one, two))
        assert len(a) == len(b) and a
        assert b == pytest.approx(a, abs=1e-5), name


def test_a_run_whose_rank_is_killed_goes_on_by_itself_and_ends_with_the_bits_of_the_undisturbed(runs, root):
    folder, _, (whole, _) = runs
    (folder / "killer.py").write_text(KILLER)
    fields = ("--mesh.data", "2", "--mesh.fsdp", "2", "--metrics.loggers", "killer:Killer")
    rows, shown = train(folder / "killed", 2, root, *fields)
    for name in ("train/loss", "train/grad_norm", "eval/loss"):
        assert [row.get(name) for row in rows] == [row.get(name) for row in whole], name
    ours, theirs = (load_run(folder / name).params for name in ("killed", "two"))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), ours, theirs))
    told = [(row["event"], row.get("kind"), row["rank"]) for row in events.read(folder / "killed")]
    assert [row for row in told if row[0] in ("failed", "done")] == [("failed", "killed", 0), ("done", None, None)]
    assert "rank 0 failed first" in shown and "resumed at step 3 of 6" in shown


def test_only_the_first_process_shows_progress(runs):
    _, _, (_, shown) = runs
    assert sum("step 6/6  loss" in line for line in shown.splitlines()) == 1


def test_a_run_of_two_processes_goes_on_as_one_and_as_two_again(runs, root):
    folder, (alone, _), _ = runs
    # two processes cut the tokens, and the two devices of each the heads
    meshes = ("--mesh.data", "4"), ("--mesh.data", "1", "--mesh.context", "2", "--mesh.tensor", "2")
    for processes, steps, before, mesh in ((1, 8, 6, meshes[0]), (2, 10, 8, meshes[1])):
        rows, shown = train(folder / "two", processes, root, *mesh, "--resume", "must", steps=steps)
        assert f"resumed at step {before} of {steps}" in shown
    assert [row["step"] for row in rows] == list(range(1, 11))
    for name in ("train/loss", "train/grad_norm"):
        assert [row[name] for row in rows] == pytest.approx([row[name] for row in alone], abs=1e-5)


def test_four_processes_of_two_devices_give_the_losses_of_one_device(tmp_path, root):
    """Stages and experts are cut from process to process, `tensor` within each."""
    axes, config = {"stage": 2, "expert": 2, "tensor": 2}, tmp_path / "mixtral.py"
    config.write_text(MIXTRAL)
    one, _ = train(tmp_path / "one", 1, root, config=config, devices=1, layers=2)
    fields = [word for axis, size in {"data": 1, **axes}.items() for word in (f"--mesh.{axis}", str(size))]
    four, _ = train(tmp_path / "four", 4, root, *fields, config=config, devices=8, layers=2)
    for name in ("train/loss", "train/grad_norm", "eval/loss"):
        a, b = ([row[name] for row in rows if name in row] for rows in (one, four))
        assert len(a) == len(b) and a
        assert b == pytest.approx(a, abs=1e-5), name
