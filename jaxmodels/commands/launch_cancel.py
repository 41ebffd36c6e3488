"""`jaxmodels launch cancel NAME`: tell a job to save and stop."""

from __future__ import annotations

from jaxmodels.launch import record


def cancel(name: str, /) -> None:
    """Tell a job to save and stop; one that has ended is left alone.

    Args:
        name: the job's name.
    """
    found = record.read(name)
    found.place.cancel(found.job, found.handle)
    print(f"{name} is told to stop; jaxmodels launch status {name} says when it has")
