"""A SLURM cluster of this machine's own: munged, slurmctld, and a slurmd for each node that it plays."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")

# SLURM starts a job again when its credentials have expired: after 5 s, which is the least that it takes, and not 120
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
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
KillWait=5
SlurmdTimeout=60
SlurmdParameters=config_overrides
SlurmdSpoolDir={root}/spool.%n
StateSaveLocation={root}/state
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
PreemptType=preempt/partition_prio
PreemptMode=CANCEL
NodeName={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=16
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=16
NodeName=taken NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[3]} CPUs=1
PartitionName=main Nodes={host},localhost Default=YES
PartitionName=spot Nodes=taken PriorityTier=1 PreemptMode=CANCEL
PartitionName=urgent Nodes=taken PriorityTier=9 PreemptMode=OFF
"""


@contextlib.contextmanager
def running(root: Path) -> Iterator[dict[str, str]]:
    """Start the daemons; gives the environment in which sbatch finds them. Nothing of them is left afterwards.

    Two nodes, which resolve as hosts, make the partition main; a third one, alone, is spot until urgent needs it.
    """
    missing = [program for program in PROGRAMS if shutil.which(program, path=_path()) is None]
    if missing:
        pytest.skip(f"needs SLURM: no {missing[0]} here; apt-get install slurm-wlm munge")
    host = socket.gethostname()
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(4)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        ports = [probe.getsockname()[1] for probe in probes]
    (root / "state").mkdir()
    (root / "key").write_bytes(os.urandom(128))
    (root / "key").chmod(0o600)
    (root / "slurm.conf").write_text(CONF.format(host=host, root=root, user=getpass.getuser(), ports=ports))
    environ = {**os.environ, "PATH": _path(), "SLURM_CONF": str(root / "slurm.conf")}
    munge = [f"--{name}={root}/{file}" for name, file in _MUNGE.items()]
    try:
        _start(["munged", "--force", *munge], environ)
        _start(["slurmctld"], environ)
        for node in (host, "localhost", "taken"):
            _start(["slurmd", "-N", node], environ)
        for _ in range(300):
            states = subprocess.run(["sinfo", "-h", "-o", "%T %D"], env=environ, capture_output=True, text=True)
            if states.stdout.split() == ["idle", "3"]:
                break
            time.sleep(0.1)
        else:
            logs = "\n".join(path.read_text()[-500:] for path in root.glob("*.log"))
            pytest.fail(f"SLURM does not start: {states.stdout} {states.stderr} {logs}")
        yield environ
        subprocess.run(["scancel", "-u", getpass.getuser()], env=environ, check=False)
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
        pytest.fail(f"{command[0]} does not start: {done.stderr}")
