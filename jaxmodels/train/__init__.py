"""Training: the step, the loop, evaluation, checkpoints and metrics of a run, and finished runs opened again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxmodels.config import Config
    from jaxmodels.fields import KVCache
    from jaxmodels.train.directory import Resume
    from jaxmodels.train.saved import Run


def load_run(directory: str | Path, *, best: bool = False, kv_cache: KVCache | None = None) -> Run:
    """Open a run's newest or best checkpoint, with its config, model, tokenizer and task. Its data need not be present.

    With `kv_cache="int8"` its model decodes with a key-value cache of codes.

    Raises:
        UserError: there is no run or no checkpoint there, or the checkpoint does not fit its config.
    """
    from jaxmodels.train import saved

    return saved.load_run(directory, best=best, kv_cache=kv_cache)


def train(config: Config, directory: str | Path, *, resume: Resume = "auto") -> Run:
    """Train as configured and open the finished run: what `jaxmodels train` does, in Python.

    Config, metrics, checkpoints and log are left in the run directory. `resume` says what to do with a run that is
    already there: `auto` continues it if it has the same config, `must` requires it, `never` starts anew.

    Raises:
        UserError: the config does not fit the hardware, the data, or the run that is in the directory.
            NotFinite: a loss was not finite.
    """
    from jaxmodels.train import run, saved

    run.train(config, Path(directory), resume)
    return saved.load_run(directory)
