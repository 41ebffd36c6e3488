"""The options of a search over config fields."""

from __future__ import annotations

from dataclasses import dataclass

from jaxmodels.fields import Count, Section, Workers


@dataclass(frozen=True)
class TuneOptions(Section):
    """Where a search is kept, which fields it chooses and how many runs it makes."""

    space: tuple[str, ...] = ()
    """Fields to choose, with their values: optim.peak_lr=1e-4:1e-1:log, model.dropout=0:0.5, optim=adamw,muon."""
    trials: Count = 20
    """Runs in total, including those of earlier commands on the same study."""
    workers: Workers = 1
    """Processes that run trials at the same time on this machine. Others may join from elsewhere with this command."""
    out: str | None = None
    """Directory of the study and its runs. None: runs/<name of the config file>-tune."""
