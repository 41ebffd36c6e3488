"""`jaxmodels goodput RUN`: where a run's wall-clock time went, over all restarts."""

from __future__ import annotations

import json as jsons
from pathlib import Path

from jaxmodels.errors import printable


def goodput(run: Path, /, json: bool = False) -> None:
    """Report how much of a run's time went into steps that were kept, and where the rest went.

    Args:
        run: run directory.
        json: print JSON instead of a table; times in seconds.
    """
    from jaxmodels.report.goodput import account, table

    found = account(run)
    print(jsons.dumps(found, indent=2) if json else printable(table(found)))
