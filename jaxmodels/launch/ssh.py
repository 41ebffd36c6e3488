"""The place `ssh`: a list of hosts without a scheduler."""

from __future__ import annotations

import fnmatch
import os
import shlex
import shutil
import sys
import zlib
from dataclasses import dataclass
from typing import Annotated, Literal

from jaxmodels.errors import ExitCode, UserError
from jaxmodels.fields import Count, Range, Workers
from jaxmodels.launch import foreground
from jaxmodels.launch.hosts import Hosts
from jaxmodels.launch.place import Job

GOES_ALONG = ("JAX_*", "JAXMODELS_*", "XLA_*", "NCCL_*", "LIBTPU_INIT_ARGS", "PYTHONPATH", "CUDA_VISIBLE_DEVICES")
"""Environment variables that are sent to the hosts; ssh itself sends none."""
_OF_RANKS = ("JAX_COORDINATOR_*", "JAX_LOCAL_*", "JAXMODELS_NUM_PROCESSES", "JAXMODELS_PROCESS_ID", "JAXMODELS_JOB")

_SCRIPT = """#!/bin/sh
# node {node} of {nodes}: {host}
cd {directory} || exit {mistake}
exec 3<&0
{command} </dev/null &
supervisor=$!
# each line of input names a signal to pass on; the input ends with the command that sends them
{{ while read -r signal; do kill -s "$signal" $supervisor; done <&3; kill -s TERM $supervisor; }} 2>/dev/null &
told=$!
wait $supervisor
code=$?
kill $told 2>/dev/null
exit $code
"""


@dataclass(frozen=True, kw_only=True)
class SSH(foreground.Foreground):
    """Hosts that are reached by ssh and share this directory; the command runs until all have ended."""

    hosts: tuple[str, ...]
    """The hosts as ssh takes them, [USER@]HOST; ranks meet on the first one. ssh must ask for no password."""
    processes: Workers = 1
    """Processes on each host: one for each GPU, or one for all of them."""
    devices: Workers | None = None
    """Devices per process. None: an equal share of a host's GPUs, or one CPU device."""
    platform: Literal["auto", "cpu", "gpu", "tpu"] = "auto"
    """auto uses GPUs or TPUs where there are any, unless JAX_PLATFORMS says cpu."""
    directory: str = ""
    """The working directory on the hosts; default: this one."""
    python: str = ""
    """The interpreter on the hosts; default: this one."""
    address: str = ""
    """The first host's address, as the other hosts reach it; default: its name."""
    port: Annotated[int, Range(1024, 65534)] | None = None
    """Port of the coordinator on the first host; supervisors use the next one. None: a function of the job's name."""
    min_hosts: Count | None = None
    """Continue on as few hosts as this if others are lost. None: only on all of them."""
    config: str = ""
    """A configuration file of ssh to use instead of the default ones (ssh -F)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.hosts:
            raise UserError("got no hosts, expected at least one, try --hosts node1 node2")
        if odd := [host for host in self.hosts if host.startswith("-") or not host.strip() or " " in host]:
            raise UserError(f"got host {odd[0]!r}, expected [USER@]HOST, as ssh takes it")
        if len(set(self.hosts)) < len(self.hosts):
            twice = next(host for host in self.hosts if self.hosts.count(host) > 1)
            raise UserError(f"got host {twice} twice, expected each once, try more --processes on it")
        if (self.min_hosts or 1) > len(self.hosts):
            raise UserError(f"got min_hosts {self.min_hosts}, expected at most the {len(self.hosts)} hosts")

    def render(self, job: Job) -> dict[str, str]:
        first = self.address or self.hosts[0].rpartition("@")[2]
        # a pair of ports for each name, so that jobs on the same hosts rarely collide; below the ephemeral ports
        port = self.port or 20000 + 2 * (zlib.crc32(job.name.encode()) % 5000)
        taken_along = {
            name: value
            for name, value in sorted(os.environ.items())
            if any(fnmatch.fnmatch(name, form) for form in GOES_ALONG)
            and not any(fnmatch.fnmatch(name, form) for form in _OF_RANKS)
        }
        scripts = {}
        for node, host in enumerate(self.hosts):
            more = ["--nodes", str(len(self.hosts)), "--node", str(node), "--coordinator", f"{first}:{port}"]
            more += [] if self.min_hosts is None else ["--min-nodes", str(self.min_hosts)]
            python = self.python or sys.executable
            command = self.supervisor(job, self.processes, self.devices, self.platform, more, python, taken_along)
            scripts[f"host-{node}.sh"] = _SCRIPT.format(
                node=node, nodes=len(self.hosts), host=host, mistake=ExitCode.MISTAKE.value,
                directory=shlex.quote(self.directory or str(job.code.directory)), command=shlex.join(command),
            )  # fmt: skip
        return scripts

    def submit(self, job: Job) -> str:
        if shutil.which("ssh") is None:
            raise UserError("got no program 'ssh' here, expected it on PATH, try installing openssh-client")
        options = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=20"]
        options += ["-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=4"]
        options += ["-F", self.config] if self.config else []
        scripts = zip(self.hosts, self.render(job).values(), strict=True)
        commands = {host: ["ssh", *options, host, f"exec sh -c {shlex.quote(script)}"] for host, script in scripts}
        with open(foreground.log(job), "a") as log:
            return foreground.stay(job, lambda: Hosts(commands, self.min_hosts or len(self.hosts), log))
