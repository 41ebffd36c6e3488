"""`jaxmodels launch PLACE -- COMMAND`: run a command on many processes, here or on a cluster."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from jaxmodels.commands.places import Placed
from jaxmodels.errors import UserError, printable
from jaxmodels.fields import Section
from jaxmodels.launch import code, record
from jaxmodels.launch.place import Job


@dataclass(frozen=True)
class LaunchOptions(Section):
    """How a job is submitted."""

    name: str | None = None
    """Name of the job; by default made from its command and the time."""
    dry_run: bool = False
    """Print what would be submitted without submitting it."""


def launch(given: Placed, options: LaunchOptions) -> int:
    """Submit a job; return its exit code if it runs in the foreground, else 0."""
    name = options.name or record.name_for(given.command)
    record.check_name(name)
    job = Job(name, given.command, record.JOBS / name, code.here())
    if options.dry_run:
        rendered = given.place.render(job)
        for file, text in rendered.items():
            print((f"# ==> {file} <==\n" if len(rendered) > 1 else "") + text.rstrip("\n"))
        return 0
    if notice := job.code.notice():
        print(f"launch: {printable(notice)}", file=sys.stderr)
    submitted = record.submit(given.place, given.file, job)
    if given.place.stays:
        ended = given.place.status(job, submitted.handle)
        if ended.code is None:
            raise UserError(f"got no end of job {name} ({ended.state}), expected its exit code")
        return ended.code
    print(f"submitted {name}: {submitted.handle}")
    for more in (f"status {name}", f"logs {name} --follow", f"cancel {name}"):
        print(f"  jaxmodels launch {more}")
    return 0
