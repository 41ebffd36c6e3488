"""A run continues on whatever mesh it finds: the same parameters, the same examples in the same order."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxmodels import config
from jaxmodels.config import Constant, Mesh
from jaxmodels.train import run
from jaxmodels.train.checkpoint import Checkpointer
from jaxmodels.train.job import assemble

MESHES = {
    "data=4 fsdp=2": (Mesh(data=4, fsdp=2), "jit"),
    "pmap": (Mesh(), "pmap"),
    "tensor=8": (Mesh(data=1, tensor=8), "jit"),
    "stage=2 fsdp=2 tensor=2": (Mesh(data=1, stage=2, fsdp=2, tensor=2), "jit"),
}


def experiment(root, mesh, strategy, steps):
    cfg = config.load(root / "configs" / "gpt_stdlib.py")
    return dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, layers=2, width=32, heads=8, attention="xla"),
        data=dataclasses.replace(cfg.data, seq_len=16, batch_size=16),
        # a schedule of its own length would change with the number of steps
        optim=dataclasses.replace(cfg.optim, schedule=Constant(), warmup_steps=2),
        train=dataclasses.replace(cfg.train, steps=steps, strategy=strategy),
        eval=dataclasses.replace(cfg.eval, every=100, batches=1),
        metrics=dataclasses.replace(cfg.metrics, every=1, progress="none", loggers=()),
        mesh=mesh,
    )


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_a_run_that_moves_from_mesh_to_mesh_is_the_run_that_stays(root, tmp_path):
    run.train(experiment(root, Mesh(), "jit", 2 * len(MESHES)), tmp_path / "stays")
    before = None
    for index, (mesh, strategy) in enumerate(MESHES.values()):
        cfg = experiment(root, mesh, strategy, 2 * index + 2)
        if before is not None:
            layout = assemble(cfg).layout
            restored = Checkpointer(tmp_path / "moves" / "checkpoints").restore(layout)
            assert restored is not None and restored[2] == 2 * index
            assert bits(restored[0].params) == before
        _, result = run.train(cfg, tmp_path / "moves", resume="must" if index else "auto")
        before = bits(result.state.params)
    stays, moves = losses(tmp_path / "stays"), losses(tmp_path / "moves")
    assert list(moves) == list(stays) == list(range(1, 2 * len(MESHES) + 1))
    assert list(moves.values()) == pytest.approx(list(stays.values()), abs=1e-5)
    # another order of examples would be seen
    assert min(abs(np.diff(list(stays.values())))) > 1e-4
