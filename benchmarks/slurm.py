"""A SLURM cluster of this machine's own: munged, slurmctld, and a slurmd for each node."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.hosts import ADDRESSES, NAMES, Hosts

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")

# SLURM starts a job again when its credentials have expired: after 5 s, which is the least that it takes, and not 120
CONF = """
ClusterName=test
SlurmctldHost={head}({address})
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/munge.sock,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=1
ReturnToService=2
KillWait={kill_wait}
SlurmdTimeout=60
SlurmdParameters=config_overrides
SlurmdSpoolDir={root}/spool.%n
StateSaveLocation={root}/state
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
PreemptType=preempt/partition_prio
PreemptMode={preempt}
{nodes}
{partitions}
"""


@dataclass(frozen=True)
class _Node:
    name: str
    machine: str
    address: str
    port: int
    cpus: int = 16
    inside: tuple[str, ...] = ()
    """What a command begins with that runs there."""

    def line(self) -> str:
        return (
            f"NodeName={self.name} NodeHostname={self.machine} NodeAddr={self.address} Port={self.port} "
            f"CPUs={self.cpus}"
        )


def missing() -> str:
    """Why this machine cannot run SLURM; empty where it can."""
    lacking = [program for program in PROGRAMS if shutil.which(program, path=_path()) is None]
    return f"needs SLURM: no {lacking[0]} here; apt-get install slurm-wlm munge" if lacking else ""


def here(root: Path) -> contextlib.AbstractContextManager[dict[str, str]]:
    """Three nodes that are this machine: two, which resolve as hosts, make the partition main; the third one, alone, is
    spot until urgent needs it."""
    host = socket.gethostname()
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(4)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        ports = [probe.getsockname()[1] for probe in probes]
    nodes = [
        _Node(host, host, "127.0.0.1", ports[1]),
        _Node("localhost", host, "127.0.0.1", ports[2]),
        _Node("taken", host, "127.0.0.1", ports[3], cpus=1),
    ]
    partitions = (
        f"PartitionName=main Nodes={host},localhost Default=YES",
        "PartitionName=spot Nodes=taken PriorityTier=1 PreemptMode=CANCEL",
        "PartitionName=urgent Nodes=taken PriorityTier=9 PreemptMode=OFF",
    )
    return _running(root, nodes, partitions, ports[0], preempt="CANCEL", kill_wait=5)


def on(hosts: Hosts, root: Path) -> contextlib.AbstractContextManager[dict[str, str]]:
    """A node on each host. Both are for the partition spot, by default, until urgent needs them."""
    nodes = [
        _Node(name, name, address, 6818, inside=tuple(hosts.inside(i)))
        for i, (name, address) in enumerate(zip(NAMES, ADDRESSES, strict=True))
    ]
    every = f"Nodes={','.join(NAMES)}"
    partitions = (
        f"PartitionName=spot {every} Default=YES PriorityTier=1 PreemptMode=REQUEUE",
        f"PartitionName=urgent {every} PriorityTier=9 PreemptMode=OFF",
    )
    return _running(root, nodes, partitions, 6817, preempt="REQUEUE", kill_wait=30)


@contextlib.contextmanager
def _running(
    root: Path, nodes: Sequence[_Node], partitions: Sequence[str], port: int, preempt: str, kill_wait: int
) -> Iterator[dict[str, str]]:
    """Start the daemons; gives the environment in which sbatch finds them. Nothing of them is left afterwards."""
    head, user = nodes[0], getpass.getuser()
    (root / "state").mkdir()
    (root / "key").write_bytes(os.urandom(128))
    (root / "key").chmod(0o600)
    (root / "slurm.conf").write_text(
        CONF.format(
            head=head.machine, address=head.address, port=port, user=user, root=root, preempt=preempt,
            kill_wait=kill_wait, nodes="\n".join(node.line() for node in nodes), partitions="\n".join(partitions),
        )
    )  # fmt: skip
    environ = {**os.environ, "PATH": _path(), "SLURM_CONF": str(root / "slurm.conf")}
    munge = [f"--{name}={root}/{file}" for name, file in _MUNGE.items()]
    try:
        _start(["munged", "--force", *munge], environ)
        _start([*head.inside, "slurmctld"], environ)
        for node in nodes:
            _start([*node.inside, "slurmd", "-N", node.name], environ)
        for _ in range(300):
            listing = [*head.inside, "sinfo", "-h", "-N", "-o", "%N %T"]
            states = subprocess.run(listing, env=environ, capture_output=True, text=True)
            if sorted(set(states.stdout.splitlines())) == sorted(f"{node.name} idle" for node in nodes):
                break
            time.sleep(0.1)
        else:
            logs = "\n".join(path.read_text()[-500:] for path in root.glob("*.log"))
            raise RuntimeError(f"SLURM does not start: {states.stdout} {states.stderr} {logs}")
        yield environ
        subprocess.run([*head.inside, "scancel", "-u", user], env=environ, check=False)
    finally:
        for file in root.glob("*.pid"):
            with contextlib.suppress(OSError, ValueError):
                os.kill(int(file.read_text()), signal.SIGKILL if "slurm" in file.name else signal.SIGTERM)


_MUNGE = {
    "socket": "munge.sock", "key-file": "key", "pid-file": "munged.pid", "log-file": "munged.log", "seed-file": "seed",
}  # fmt: skip


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def _start(command: list[str], environ: dict[str, str]) -> None:
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command} does not start: {done.stderr}")
