"""Compress a run: another run like it, with a record of what was done."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxmodels import config as configs
from jaxmodels.compress.calibration import Calibration, open_source
from jaxmodels.compress.methods import METHODS, Compressed, MethodConfig, Work
from jaxmodels.data.special import FILE as SPECIAL
from jaxmodels.data.tokenizer import FILE as TOKENIZER
from jaxmodels.errors import UserError
from jaxmodels.hf import beside, save
from jaxmodels.models.coded import is_coded, value
from jaxmodels.parallel.mesh import Mesh, make_mesh
from jaxmodels.train import bases, saved
from jaxmodels.train import run as runs
from jaxmodels.train.checkpoint import Checkpointer
from jaxmodels.train.sections import Init
from jaxmodels.train.state import coded

log = logging.getLogger("jaxmodels")

RECORD = "compress.json"
"""File in a compressed run that says what was done."""


def compress(
    directory: Path,
    method: MethodConfig,
    out: Path,
    *,
    batches: int = 16,
    best: bool = False,
    data: Mapping[str, Any] | None = None,
    kind: str | None = None,
) -> dict[str, Any]:
    """Write a run `out` that is the one in `directory` compressed, and return its record.

    Inputs are measured on the first `batches` batches that the run was trained on, or on other data: `data` and `kind`
    are those of `saved.Run.evaluation`.

    Raises:
        UserError: there is no such run, `out` is there already, the method does not fit the model, or the data are not
            what the run's task takes.
    """
    if not (directory / "config.json").is_file():
        raise UserError(f"got {directory}, expected a run directory with config.json, try one that train has written")
    with save.complete(out) as part:
        run = saved.read_run(directory, best=best)
        if coded(run.config, run.networks) is not None:
            raise UserError(
                f"got {directory}, whose weights are codes already, expected a run of float32 weights, try the run "
                "that it was made from"
            )
        task, everywhere = run.task, NamedSharding(make_mesh(Mesh()), PartitionSpec())
        method.check(Work(run.config, task, run.params, run.stats, None))
        calibration = None
        if method.asks != "nothing":
            calibration = Calibration.of(run, open_source(run, data or {}, kind), batches)
            log.info("calibration: %d batches of %s", batches, calibration.described)
        params, stats = jax.device_put((run.params, run.stats), everywhere)
        began = time.perf_counter()
        found = method.apply(Work(run.config, task, params, stats, calibration, lambda line: log.info("%s", line)))
        record = {
            "method": METHODS.name_of(type(method)),
            "options": dataclasses.asdict(method),
            "source": str(directory.absolute()),
            "step": run.step,
            "hash": bases.fingerprint(run.params),
            "calibration": calibration and {"data": calibration.described, "batches": batches},
            "seconds": round(time.perf_counter() - began, 1),
            "parameters": count(run.params),
            "compressed": count(found.params),
            "zeros": zeros(found.params),
            "matrices": {name.partition("/")[2]: facts for name, facts in found.matrices.items()},
            "left": {name.partition("/")[2]: why for name, why in found.left.items()},
            "versions": runs.versions(),
            "commit": runs.commit(),
        }
        write(run, found, part, record)
    return record


def write(run: saved.Run, found: Compressed, part: Path, record: Mapping[str, Any]) -> None:
    """Write a compressed run into a folder."""
    for name in (saved.KEPT, TOKENIZER, SPECIAL):
        if (run.directory / name).is_file():
            shutil.copyfile(run.directory / name, part / name)
    if (run.directory / beside.KEPT).is_dir():
        shutil.copytree(run.directory / beside.KEPT, part / beside.KEPT)
    # what it is made of lies in its own checkpoint: no adapter, no average beside the weights, no source
    cfg = dataclasses.replace(
        found.config, adapter=None, init=Init(), train=dataclasses.replace(found.config.train, ema=None)
    )
    (part / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    meta = {"config": configs.to_json(cfg), "versions": runs.versions(), "metric": None}
    checkpointer = Checkpointer(part / "checkpoints")
    checkpointer.save(run.step, {"params": found.params, "stats": found.stats}, meta)
    checkpointer.wait()
    origin = {
        "file": str(run.directory),
        "overrides": [],
        "compressed": {name: record[name] for name in ("method", "options", "source", "step", "hash", "calibration")},
        "versions": runs.versions(),
        "commit": runs.commit(),
    }
    configs.save(cfg, part / "config.json", origin)  # last, because without it this is not a run


def count(params: Any) -> int:
    """Count the parameters, those that codes stand for too."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params, is_leaf=is_coded))


def zeros(params: Any) -> int:
    """Count the parameters of matrices and tables that are 0, those that codes stand for too."""
    leaves = (leaf for leaf in jax.tree.leaves(params, is_leaf=is_coded) if leaf.ndim > 1)
    return sum(int(np.sum(np.asarray(value(leaf)) == 0)) for leaf in leaves)
