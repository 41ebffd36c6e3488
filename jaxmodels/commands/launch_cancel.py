"""`jaxmodels launch cancel NAME`: tell a job to save and stop."""

from __future__ import annotations

from jaxmodels.errors import printable
from jaxmodels.launch import record
from jaxmodels.launch.place import State


def cancel(name: str, /) -> None:
    """Tell a job to save and stop, unless it has ended.

    Args:
        name: the job's name.
    """
    found = record.submitted(name)
    now = found.place.status(found.job, found.handle)
    going = now.state in (State.WAITING, State.STARTING, State.RUNNING)
    # the command of a place that stays with its job may be about to request the machines again
    if going or (now.state is State.GONE and found.place.stays):
        found.place.cancel(found.job, found.handle)
    if going:
        print(f"{name} is told to stop; jaxmodels launch status {name} says when it has")
    else:
        print(printable(f"{name} has ended: {now}"))
