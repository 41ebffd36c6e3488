"""What a search tries."""

from __future__ import annotations

from dataclasses import dataclass

from jaxmodels.fields import Count, Section, Workers


@dataclass(frozen=True)
class TuneOptions(Section):
    """Where the search lives and what it tries, and the fields of the experiment."""

    space: tuple[str, ...] = ()
    """Fields to choose: optim.peak_lr=1e-4:1e-1:log, model.dropout=0:0.5, optim=adamw,muon."""
    trials: Count = 20
    """Runs in all, those of an earlier command on the same study included."""
    workers: Workers = 1
    """Processes that try at the same time, on this machine; others may join by the same command elsewhere."""
    out: str | None = None
    """Directory of the study and its runs; runs/<name of the config file>-tune when not given."""
