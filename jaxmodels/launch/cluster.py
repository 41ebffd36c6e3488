"""Which nodes a job has and which one this is, as the scheduler that started it says in the environment."""

from __future__ import annotations

import glob
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass

from jaxmodels.errors import UserError

# below the ports that Linux gives to outgoing connections, and apart from those that JAX itself would choose
_FIRST, _PAIRS = 20000, 5000
# a pod and a TPU machine have addresses of their own, where no other job listens
_KUBERNETES_PORT, _TPU_PORT = 55527, 8482
_METADATA_TRIES, _METADATA_SECONDS = 6, 5.0


@dataclass(frozen=True)
class Cluster:
    """The nodes of a job, each with one supervisor, and the address at which they meet."""

    nodes: int
    node: int
    """The number of this node, from 0."""
    host: str
    """Name or address of node 0."""
    port: int
    """Port of jax.distributed's coordinator; the supervisors use the next one."""

    @property
    def coordinator(self) -> str:
        """HOST:PORT, with an IPv6 address in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def found(environ: Mapping[str, str]) -> Cluster:
    """Find the nodes of the job in the environment of Open MPI, SLURM, TPUs or Kubernetes; else this machine alone.

    Two jobs, or two steps of one job, that run on the same machine at the same time get different ports.

    Raises:
        UserError: the environment names several nodes, but not all that is needed to reach them.
    """
    # mpirun inside a SLURM job leaves the variables of SLURM too, which then count its daemons and not its ranks
    for ask in (_open_mpi, _slurm, _tpu_pods, _kubernetes, _tpu_machines):
        cluster = ask(environ)
        if cluster is not None:
            if not 0 <= cluster.node < cluster.nodes:
                raise UserError(
                    f"got node {cluster.node} of {cluster.nodes} from the environment ({ask.__name__.strip('_')}), "
                    "expected a lower number, try --nodes, --node and --coordinator"
                )
            return cluster if cluster.nodes > 1 else _alone()
    return _alone()


def _open_mpi(environ: Mapping[str, str]) -> Cluster | None:
    if "OMPI_COMM_WORLD_SIZE" not in environ:
        return None
    nodes, node = _number(environ, "OMPI_COMM_WORLD_SIZE"), _number(environ, "OMPI_COMM_WORLD_RANK")
    if nodes == 1:
        return _alone()
    # 1531576320.0;tcp://10.96.0.1,10.148.0.1:34911 or …;tcp6://[fe80::1,2620::2]:43370, of mpirun itself
    uri = environ.get("OMPI_MCA_orte_hnp_uri", "")
    address = re.match(r"(\d+)\.\d+;tcp6?://\[?([^],]+?)(?:[],]|:\d+(?:;|$))", uri)
    if address is None:
        raise UserError(
            f"got {nodes} ranks of mpirun and OMPI_MCA_orte_hnp_uri={uri!r}, expected the address of mpirun there, as "
            "Open MPI up to version 4 gives it, try --coordinator HOST:PORT with the host of rank 0"
        )
    # its number is a multiple of 2^16
    return Cluster(nodes, node, address[2], _port(int(address[1]) // 2**16))


def _slurm(environ: Mapping[str, str]) -> Cluster | None:
    # a batch script has a SLURM_PROCID too, but is no step of several tasks
    if not {"SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST"} <= environ.keys():
        return None
    nodes, node = _number(environ, "SLURM_STEP_NUM_TASKS"), _number(environ, "SLURM_PROCID")
    job, step = _number(environ, "SLURM_JOB_ID"), _number(environ, "SLURM_STEP_ID")
    # 61 has no divisor in common with the number of pairs: neighbouring jobs are 61 steps apart
    return Cluster(nodes, node, first_host(environ["SLURM_STEP_NODELIST"]), _port(61 * job + step))


def _tpu_pods(environ: Mapping[str, str]) -> Cluster | None:
    """TPUs of GKE; nodes are numbered as libtpu numbers its hosts."""
    hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
    if not hosts or "TPU_WORKER_ID" not in environ:
        return None
    return _slices(environ, hosts.split(","), _number(environ, "TPU_WORKER_ID"))


def _kubernetes(environ: Mapping[str, str]) -> Cluster | None:
    """Pods of an Indexed Job, or of the jobs of a JobSet; `kubernetes.py` sets their number in the environment."""
    if not {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environ.keys():
        return None
    names = ("JAXMODELS_NODES", "JAXMODELS_NODES_PER_JOB", "JAXMODELS_JOB_INDEX", "JAXMODELS_COORDINATOR_HOST")
    missing = [name for name in names if not environ.get(name)]
    if missing:
        raise UserError(
            f"got a pod of an Indexed Job without {' and '.join(missing)}, expected them in its environment as "
            "jaxmodels launch renders it, try --nodes, --node and --coordinator"
        )
    nodes, each, job = (_number(environ, name) for name in names[:3])
    node = job * each + _number(environ, "JOB_COMPLETION_INDEX")
    return Cluster(nodes, node, environ[names[3]], _KUBERNETES_PORT)


def _tpu_machines(environ: Mapping[str, str]) -> Cluster | None:
    """TPU machines of Compute Engine, whose metadata server knows the others."""
    platform = environ.get("JAX_PLATFORMS") or "tpu"
    if "TPU_SKIP_MDS_QUERY" in environ or "tpu" not in platform.split(","):
        return None
    if not (glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*") or "GCE_METADATA_IP" in environ):
        return None
    worker = _metadata(environ, "agent-worker-number")
    if worker is None:
        return None
    # names, or name:id:address of each, of this slice
    endpoints = (_metadata(environ, "worker-network-endpoints") or "").split(",")
    hosts = [parts[2] if len(parts) == 3 else parts[0] for parts in (one.strip().split(":") for one in endpoints)]
    rows = re.findall(r"(?m)^\s*(MEGASCALE_\w+)\s*:\s*'?([^'\n]*)'?\s*$", _metadata(environ, "tpu-env") or "")
    return _slices({**dict(rows), **environ}, hosts, int(worker))


def _slices(environ: Mapping[str, str], hosts: list[str], worker: int) -> Cluster:
    """The hosts of all slices, slice by slice; `worker` counts within this slice."""
    slices = _number(environ, "MEGASCALE_NUM_SLICES", "1")
    index = _number(environ, "MEGASCALE_SLICE_ID", "0")
    first = environ.get("MEGASCALE_COORDINATOR_ADDRESS", "") if slices > 1 else hosts[0]
    if not first:
        raise UserError(
            f"got {slices} slices of TPUs without MEGASCALE_COORDINATOR_ADDRESS, expected the host of the first one, "
            "try --coordinator HOST:PORT"
        )
    return Cluster(slices * len(hosts), index * len(hosts) + worker, first.partition(":")[0], _TPU_PORT)


def first_host(hosts: str) -> str:
    """Return the first of SLURM's list of hosts: node003-ib for node[003-7,9]-ib,login."""
    first = re.match(r"(?:[^,[]|\[[^]]*\])+", hosts)
    return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", first[0] if first else hosts)


def _port(job: int) -> int:
    return _FIRST + 2 * (job % _PAIRS)


def _alone() -> Cluster:
    """This machine, with a port that is free and whose successor is free too."""
    while True:
        with socket.socket() as one, socket.socket() as next_one:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            try:
                next_one.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return Cluster(1, 0, "127.0.0.1", port)


def _number(environ: Mapping[str, str], name: str, default: str = "") -> int:
    value = environ.get(name) or default
    if not re.fullmatch(r"[0-9]+", value):
        raise UserError(
            f"got {name}={value!r}, expected a whole number, try --nodes, --node and --coordinator instead of what the "
            "environment says"
        )
    return int(value)


def _metadata(environ: Mapping[str, str], key: str) -> str | None:
    """Return what the metadata server knows about this machine; None if there is no server, or it lacks the key.

    Raises:
        UserError: there is a server, but it does not answer.
    """
    host = environ.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{host}/computeMetadata/v1/instance/attributes/{key}"
    # no proxy stands between a machine and its own metadata
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    error: Exception | None = None
    for attempt in range(_METADATA_TRIES):
        time.sleep(0.5 * (attempt > 0))
        try:
            request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
            with opener.open(request, timeout=_METADATA_SECONDS) as answer:
                return answer.read().decode()
        except urllib.error.HTTPError as refusal:
            if refusal.code == 404:
                return None
            error = refusal
        except urllib.error.URLError as failure:
            if isinstance(failure.reason, socket.gaierror):  # this is no machine of Google's
                return None
            error = failure
        except OSError as failure:
            error = failure
    raise UserError(
        f"got no answer of the metadata server {host} to {key} ({error}), expected one on a TPU machine, try "
        "--nodes 1 where it stands alone"
    )
