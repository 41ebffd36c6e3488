"""The loop: state, optimizer, step, evaluation, checkpoints and metrics of a run; runs that are opened again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxmodels.config import Config
    from jaxmodels.train.directory import Resume
    from jaxmodels.train.saved import Run


def load_run(directory: str | Path, *, best: bool = False) -> Run:
    """A run's newest checkpoint, or its best, with its config, model, tokenizer and task; its data need not be here.

    Raises:
        UserError: no run or no checkpoint there, or one that does not fit its config.
    """
    from jaxmodels.train import saved

    return saved.load_run(directory, best=best)


def train(config: Config, directory: str | Path, *, resume: Resume = "auto") -> Run:
    """Train as configured, and open the run: what `jaxmodels train` does, in Python.

    The run directory is left with config, metrics, checkpoints and log; training resumes what is there, `resume` says
    when (auto: of the same config; must; never).

    Raises:
        UserError: the config does not fit the hardware, the data, or the run that is in the directory.
        NotFinite: a loss stopped being a number.
    """
    from jaxmodels.train import run, saved

    run.train(config, Path(directory), resume)
    return saved.load_run(directory)
