"""The place `local`: processes on this machine."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from typing import Literal

from jaxmodels.fields import Workers
from jaxmodels.launch import foreground
from jaxmodels.launch.place import Job


@dataclass(frozen=True, kw_only=True)
class Local(foreground.Foreground):
    """Processes on this machine; the command runs until they have ended."""

    processes: Workers = 2
    """Processes to start: one for each GPU, or one for all of them."""
    devices: Workers | None = None
    """Devices per process: GPUs in order, or virtual CPU devices. None: an equal share of all GPUs, or one."""
    platform: Literal["auto", "cpu", "gpu", "tpu"] = "auto"
    """auto uses GPUs or TPUs where there are any, unless JAX_PLATFORMS says cpu."""

    def render(self, job: Job) -> dict[str, str]:
        return {"job.sh": f"#!/bin/sh\n# what jaxmodels launch runs\nexec {shlex.join(self._command(job))}\n"}

    def submit(self, job: Job) -> str:
        return foreground.stay(job, lambda: foreground.start(self._command(job)))

    def _command(self, job: Job) -> list[str]:
        # one node, also within an allocation of several
        more = ["--nodes", "1", "--log", str(foreground.log(job))]
        return self.supervisor(job, self.processes, self.devices, self.platform, more, sys.executable)

    def locks(self, job: Job) -> str:
        return ""  # the environment is that of the submission
