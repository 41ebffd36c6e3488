"""A run that is on the disk, ready to be used again; and what only whole texts and images can be judged by."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels import config as configs
from jaxmodels import data
from jaxmodels.config import MeshConfig
from jaxmodels.errors import UserError
from jaxmodels.tasks.metrics import inception_score
from jaxmodels.tasks.task import forward, normalised
from jaxmodels.train import run as runs
from jaxmodels.train.checkpoint import Checkpointer

_AT_ONCE = 100


@dataclass(frozen=True)
class Saved:
    """An experiment with the parameters that evaluation uses, and the statistics, of one of its checkpoints."""

    run: Path
    experiment: runs.Experiment
    params: dict[str, Any]
    stats: dict[str, Any]
    step: int

    def measure(self) -> dict[str, float]:
        """The metrics of the whole evaluation set."""
        return self.experiment.measure()(self.params, self.stats, self.experiment.loader("eval").once()) or {}


def open_run(run: Path, split: str | None = None, best: bool = False, data_dir: str | None = None) -> Saved:
    """A run's newest checkpoint, or its best, on the devices that are here.

    `split` and `data_dir` are taken instead of the run's own.

    Raises:
        UserError: no run or no checkpoint there, or its data are not here.
    """
    cfg, _ = configs.read(run)
    section = cfg.data if split is None else dataclasses.replace(cfg.data, eval_split=split)
    section = section if data_dir is None else dataclasses.replace(section, dir=data_dir)
    # the result does not depend on the mesh: whatever is here will do
    plain = dataclasses.replace(cfg.train, strategy="jit", accumulate=1)
    cfg = dataclasses.replace(cfg, data=section, mesh=MeshConfig(), train=plain)
    experiment = runs.setup(cfg)
    checkpointer = Checkpointer(run / "checkpoints")
    kind = "params" if cfg.train.ema is None else "ema"
    params, _, at = checkpointer.restore_params(
        "best" if best else None, subtree=kind, abstract=experiment.layout.params
    )
    stats = experiment.layout.stats
    if jax.tree.leaves(stats):
        stats, _, _ = checkpointer.restore_params(at, subtree="stats", abstract=stats)
    return Saved(run, experiment, params, stats, at)


def translated(saved: Saved, beams: int = 4) -> dict[str, float]:
    """BLEU of a translator on its evaluation set."""
    from jaxmodels.generate import bleu, translate_texts

    cfg, tokenizer = saved.experiment.cfg, data.load_tokenizer(saved.run)
    sources, references = data.open_pairs(cfg.data, "eval")
    model = saved.experiment.task.networks["model"]
    found = translate_texts(model, saved.params["model"], tokenizer, sources, beams=beams)
    return {"bleu": bleu(found, references)}


def judged(saved: Saved, classifier: Path, count: int = 1000) -> dict[str, float]:
    """What a classifier, the run of which is given, sees in images that a generative model makes.

    `score` as Salimans et al. 2016 have it, by this classifier; `classes`: how many it sees at all; `confidence`.
    """
    samples = saved.experiment.task.samples
    if samples is None:
        raise UserError(
            f"got --classifier for a run of task {saved.experiment.cfg.task.name}, expected a vae or a gan, "
            "try it without"
        )
    judge = open_run(classifier, data_dir=saved.experiment.cfg.data.dir)
    if judge.experiment.cfg.task.name != "classification":
        raise UserError(
            f"got classifier {classifier} of task {judge.experiment.cfg.task.name}, expected classification, "
            "try the run of a classifier"
        )
    model = ("model", judge.experiment.task.networks["model"])
    section = judge.experiment.cfg.data

    @jax.jit
    def probabilities(images: jax.Array) -> jax.Array:
        logits, _ = forward(model, judge.params, judge.stats, normalised(images, section))
        return jax.nn.softmax(logits.astype(jnp.float32))

    images = samples(saved.params, saved.stats, count)
    seen = np.concatenate([probabilities(images[i : i + _AT_ONCE]) for i in range(0, count, _AT_ONCE)])
    chosen = np.unique(seen.argmax(1))
    return {"score": inception_score(seen), "classes": float(len(chosen)), "confidence": float(seen.max(1).mean())}
