"""A place of your own to launch on: this machine, in the background."""

import os
import shlex
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

from jaxmodels.fields import Workers
from jaxmodels.launch.output import growing
from jaxmodels.launch.place import Place, State, Status

SCRIPT = """#!/bin/sh
trap : TERM
{command}
echo $? > {code}.part && mv {code}.part {code}
"""


@dataclass(frozen=True, kw_only=True)
class Background(Place):
    """Processes on this machine that continue when the terminal is closed."""

    processes: Workers = 2
    """Processes to start."""

    def render(self, job):
        command = shlex.join(self.supervisor(job, self.processes, python=job.code.python))
        return {"job.sh": SCRIPT.format(command=command, code=shlex.quote(str(job.directory / "code")))}

    def submit(self, job):
        with open(job.directory / "log.txt", "w") as log:
            process = subprocess.Popen(
                ["sh", str(job.directory / "job.sh")],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        return str(process.pid)

    def status(self, job, handle):
        code = job.directory / "code"
        if code.exists():
            return Status.ended(int(code.read_text()))
        return Status(State.RUNNING if Path(f"/proc/{handle}").exists() else State.GONE)

    def logs(self, job, handle, follow=False):
        return growing(job.directory / "log.txt", lambda: follow and self.status(job, handle).state == State.RUNNING)

    def cancel(self, job, handle):
        if self.status(job, handle).state == State.RUNNING:
            os.killpg(int(handle), signal.SIGTERM)
