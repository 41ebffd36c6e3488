"""`jaxmodels launch status [NAME]`: the state of one job, or of all."""

from __future__ import annotations

from jaxmodels.errors import UserError, printable
from jaxmodels.launch import record
from jaxmodels.launch.place import State, Status


def status(name: str | None = None, /) -> None:
    """Print the state of one job, or of all jobs that were submitted from this directory.

    Args:
        name: the job's name, as `jaxmodels launch` printed it.
    """
    names = record.names() if name is None else [name]
    if not names:
        print(f"no job has been submitted from here: {record.JOBS} has none")
    width = max(map(len, names), default=0)
    for each in names:
        try:
            shown = str(_status(record.read(each)))
        except UserError as error:
            if name is not None:
                raise
            shown = f"unknown: {error}"
        print(printable(f"{each:{width}}  {shown}"))


def _status(found: record.Record) -> Status:
    if not found.handle:
        return Status(State.GONE, "the submission was cut off")
    return found.place.status(found.job, found.handle)
