"""`jaxmodels launch logs NAME`: the output of a job."""

from __future__ import annotations

from jaxmodels.errors import printable
from jaxmodels.launch import record


def logs(name: str, /, follow: bool = False) -> None:
    """Print the output of a job.

    Args:
        name: the job's name.
        follow: continue until the job has ended.
    """
    found = record.submitted(name)
    for line in found.place.logs(found.job, found.handle, follow):
        print(printable(line), flush=True)
