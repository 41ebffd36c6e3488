"""`jaxmodels launch logs NAME`: what a job has printed."""

from __future__ import annotations

from jaxmodels.errors import printable
from jaxmodels.launch import record


def logs(name: str, /, follow: bool = False) -> None:
    """What a job has printed, line by line.

    Args:
        name: the job's name.
        follow: go on until the job has ended.
    """
    found = record.read(name)
    for line in found.place.logs(found.job, found.handle, follow):
        print(printable(line), flush=True)
