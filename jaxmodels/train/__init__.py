"""The loop: state, optimizer, step, evaluation, checkpoints and metrics of a run; runs that are opened again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxmodels.train.saved import Run


def load_run(directory: str | Path, *, best: bool = False) -> Run:
    """A run's newest checkpoint, or its best, with its config, model, tokenizer and task; its data need not be here.

    Raises:
        UserError: no run or no checkpoint there, or one that does not fit its config.
    """
    from jaxmodels.train import saved

    return saved.load_run(directory, best=best)
