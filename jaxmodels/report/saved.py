"""A run as a report needs it: its experiment, and what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmodels.config import Config
from jaxmodels.models.functional import Model
from jaxmodels.tasks.task import floats, normalised
from jaxmodels.train import run as runs
from jaxmodels.train import saved as saving


@dataclass(frozen=True)
class Saved:
    """An experiment with the parameters and statistics of one of its checkpoints, on one device."""

    name: str
    run: Path
    experiment: runs.Experiment
    params: dict[str, Any]
    stats: dict[str, Any]
    step: int

    @property
    def cfg(self) -> Config:
        return self.experiment.cfg

    @property
    def source(self) -> Any:
        """What is evaluated on."""
        return self.experiment.eval_data

    @property
    def model(self) -> Model:
        """The network of a task that has one."""
        return self.experiment.task.networks["model"]

    def apply(self, *args: Any, network: str = "model", params: Any = None, **kwargs: Any) -> Any:
        """A network's outputs in evaluation."""
        model, params = self.experiment.task.networks[network], self.params[network] if params is None else params
        if network not in self.stats:
            return model.apply(params, *args, **kwargs)
        return model.apply(params, *args, stats=self.stats[network], **kwargs)[0]

    def examples(self, first: int, last: int) -> dict[str, np.ndarray]:
        """A batch of examples of the evaluation's, as far as there are so many."""
        indices = np.arange(first, min(last, len(self.source)))
        return self.source.batch(indices, np.zeros_like(indices))

    def batches(self) -> Iterator[dict[str, np.ndarray]]:
        """All examples of the evaluation, in order, the last batch as it comes."""
        size = self.cfg.eval.batch_size or self.cfg.data.batch_size
        last = len(self.source)
        if self.cfg.eval.batches is not None:
            last = min(last, self.cfg.eval.batches * size)
        for first in range(0, last, size):
            yield self.examples(first, min(first + size, last))

    def inputs(self, batch: dict[str, np.ndarray]) -> tuple[Any, dict[str, Any]]:
        """What a classifier is given of a batch: the first argument, and those with names."""
        named = {name: batch[name] for name in ("segment_ids", "types") if name in batch}
        return normalised(jax.numpy.asarray(batch["inputs"]), self.cfg.data), named

    def class_name(self, index: int) -> str:
        """A class's name in the data, or its number."""
        names = self.source.class_names
        return names[index] if index < len(names) else str(index)

    @cached_property
    def measured(self) -> dict[str, float]:
        """The metrics of a whole evaluation of this checkpoint."""
        found = self.experiment.measure()(self.params, self.stats, self.experiment.loader("eval").once())
        return {f"eval/{name}": value for name, value in (found or {}).items()}


def open_run(run: Path, name: str, split: str | None = None, best: bool = False) -> Saved:
    """A run with the parameters that evaluation uses.

    Raises:
        UserError: no run or no checkpoint there, or its data are not here.
    """
    saved = saving.open_run(run, split, best)
    # bound to no device, so that they go with a mesh and without one
    params, stats = jax.device_put(jax.device_get((saved.params, saved.stats)))
    return Saved(name, run, saved.experiment, params, stats, saved.step)


def pixels(x: np.ndarray) -> np.ndarray:
    """Images as the data has them in [0, 1]."""
    return np.asarray(floats(jax.numpy.asarray(x)))


def length(segment_ids: np.ndarray | None, ids: np.ndarray, most: int) -> int:
    """Tokens of the first text of a row (T,), without what fills it up, and `most` at most."""
    if segment_ids is not None:
        there = int((segment_ids == segment_ids[0]).sum())
    else:
        there = len(np.trim_zeros(ids, "b"))
    return max(1, min(there, most))
