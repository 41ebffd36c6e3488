"""Several processes as one run: joining them, stopping them at the same step, and leaving without hanging."""

from __future__ import annotations

import collections
import contextlib
import importlib.util
import logging
import os
import signal
import socket
import stat
import sys
import threading
import time
import traceback
from types import FrameType, TracebackType
from typing import Any, NoReturn

import jax
from jax._src.distributed import global_state as _state
from jax.experimental import multihost_utils

from jaxmodels.errors import UserError
from jaxmodels.parallel import progress

# A process silent for this long is presumed dead and ends the others (JAX's default is 100 s).
_HEARTBEAT_SECONDS = 15
# How long a departing process waits for the others to leave too (JAX's default is 300 s).
_SHUTDOWN_SECONDS = 20
# A process that dies ends the others' wait sooner.
_BARRIER_SECONDS = 24 * 3600
_barriers: collections.Counter[str] = collections.Counter()
# Pods and containers of one job start minutes apart; processes on one machine do not.
_JOIN_SECONDS, _JOIN_LOCAL_SECONDS = 300, 60
_OF_CLUSTERS = ("SLURM_", "OMPI_", "KUBERNETES_", "JOB_COMPLETION_INDEX", "TPU_", "MEGASCALE_")


def initialize() -> None:
    """Join the other processes of this run, if there are any. Call it before any device is used.

    Launchers assign ranks by JAXMODELS_NUM_PROCESSES, JAXMODELS_PROCESS_ID and JAX_COORDINATOR_ADDRESS. Without them
    JAX asks SLURM, Open MPI, Kubernetes or the TPU machine, if one of these shows more than one process.
    JAXMODELS_HEARTBEAT_SECONDS sets after how long a silent process is presumed dead.

    Raises: UserError if the variables contradict each other.
    """
    explicit = _explicit()
    progress.begin()
    alone = not _clustered() if explicit is None else explicit[1] == 1
    if alone:
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    heartbeat = _integer("JAXMODELS_HEARTBEAT_SECONDS", str(_HEARTBEAT_SECONDS))
    timeouts: dict[str, Any] = {"heartbeat_timeout_seconds": heartbeat, "shutdown_timeout_seconds": _SHUTDOWN_SECONDS}
    if explicit is None:
        try:
            jax.distributed.initialize(initialization_timeout=_JOIN_SECONDS, **timeouts)
        except ValueError as error:  # JAX misses some of the variables that describe a job
            found = [name for name in os.environ if name.startswith(_OF_CLUSTERS)]
            raise UserError(
                f"got {', '.join(sorted(found)[:4])} in the environment, expected all variables of such a job "
                f"({' '.join(str(error).split())}), try unsetting them for one process, or jaxmodels launch for several"
            ) from error
    else:
        address, count, index = explicit
        local = _is_loopback(address.rpartition(":")[0])
        _check_name(local)
        jax.distributed.initialize(
            coordinator_address=address,
            num_processes=count,
            process_id=index,
            cluster_detection_method="deactivate",
            initialization_timeout=_JOIN_LOCAL_SECONDS if local else _JOIN_SECONDS,
            **timeouts,
        )
    sys.excepthook = _leave_at_once


def finalize(code: int) -> int:
    """Leave the run; returns the exit code to end the process with.

    Processes that are done (0) or have saved and stopped (75) wait for each other, so that none is presumed dead while
    another is still writing. With any other code the process ends immediately: the others can never reach the barrier
    at exit, where JAX would wait for them, and the exit code must not be lost in its error.
    """
    if not jax.distributed.is_initialized():
        return code
    if code not in (0, 75):
        _exit(code)
    barrier("finalize")
    jax.distributed.shutdown()
    return code


def is_main() -> bool:
    """Whether this process is the one that prints, plots and writes what is written only once."""
    return jax.process_index() == 0


def planned() -> int:
    """Processes of this run while no node is lost; a supervisor that goes on with fewer says it."""
    return max(_integer("JAXMODELS_PLANNED_PROCESSES", "1"), jax.process_count())


def barrier(name: str) -> None:
    """Wait until every process is here, however long that takes; `name` must be the same in all of them.

    Before the first step this is required: on CPUs the first collective of each group of devices fails if one process
    enters it 30 s after another (gloo's limit, which no flag changes); later ones may wait indefinitely.
    """
    # Not a collective, such as multihost_utils.sync_global_devices, which would hit the same limit.
    client = _state.client
    if client is not None:
        # Counted by name, so that threads may wait at different barriers in any order.
        _barriers[name] += 1
        client.wait_at_barrier(f"jaxmodels/{name}/{_barriers[name]}", timeout_in_ms=_BARRIER_SECONDS * 1000)


_said: dict[str, str] = {}  # where there is no coordinator, what this one process has said


def publish(name: str, text: str) -> None:
    """Leave a text of this process with the coordinator, once for each name, for `collect`."""
    announce(f"{name}/{jax.process_index()}", text)


def announce(name: str, text: str) -> None:
    """Leave a text for all with the coordinator; the first one that is left under a name stays."""
    if _state.client is None:
        _said.setdefault(name, text)
    else:
        _state.client.key_value_set(f"jaxmodels/{name}", text)


def heard(name: str, seconds: float) -> str | None:
    """Wait for what is announced under a name, at most so long; None: nothing was."""
    if _state.client is None:
        return _said.pop(name, None)
    try:
        return _state.client.blocking_key_value_get(f"jaxmodels/{name}", max(1, int(1000 * seconds)))
    except Exception:  # jaxlib has no type of its own for a time that is over
        return None


def collect(name: str, seconds: float) -> dict[int, str]:
    """The texts that processes have published under a name, by their index; those not heard of in time are missing."""
    end = time.monotonic() + seconds
    found = {i: heard(f"{name}/{i}", end - time.monotonic()) for i in range(jax.process_count())}
    return {i: text for i, text in found.items() if text is not None}


def own_address() -> str:
    """The address of this machine from which it reaches the coordinator."""
    host, _, port = (_state.coordinator_address or "127.0.0.1:1").rpartition(":")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:  # sends nothing
        probe.connect((host.strip("[]"), int(port)))
        return probe.getsockname()[0]


class Preemption:
    """Turns SIGTERM, SIGINT and SIGHUP (the terminal is gone) into a stop between two steps, the same on every process.

    In a single process, a handler records the signal. Among several processes, SIGTERM belongs to JAX's preemption
    service from `initialize` on (and no longer kills anybody): it informs all of them within about a second and picks
    the next poll that all can reach. Other signals are forwarded to it. A second Ctrl-C raises KeyboardInterrupt at
    once, and a third ends the process immediately. Under nohup SIGHUP stays ignored.
    """

    step: int | None = None
    """The step at which to stop; None if not asked to."""

    def __init__(self) -> None:
        self._polls = 0
        self._signals: set[int] = set()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Preemption:
        # Python delivers signals only to the main thread, and only that thread may set handlers.
        if threading.current_thread() is threading.main_thread():
            caught = [signal.SIGINT] if jax.distributed.is_initialized() else [signal.SIGINT, signal.SIGTERM]
            if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
                caught.append(signal.SIGHUP)
            self._previous = {number: signal.signal(number, self._note) for number in caught}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def requested(self, step: int) -> bool:
        """Whether to save and stop now; once true, always true.

        Every process must call this equally often, at the same points: each step, and each batch of an evaluation.
        """
        progress.poll()
        if self.step is None:
            # JAX stops at one exact number, and an evaluation polls many times within a step, so polls are counted
            self._polls += 1
            alone = not jax.distributed.is_initialized()
            if bool(self._signals) if alone else multihost_utils.reached_preemption_sync_point(self._polls):
                self.step = step
        return self.step is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in self._signals:
            # cleanup may take long, since it awaits a save under way, which the next Ctrl-C interrupts
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            raise KeyboardInterrupt
        if number == signal.SIGHUP:
            _leave_terminal()
        self._signals.add(number)
        if jax.distributed.is_initialized():
            signal.raise_signal(signal.SIGTERM)


def _leave_terminal() -> None:
    """Redirect to /dev/null what goes to a terminal that is gone, or to a program that died with it: writes would
    fail."""
    with open(os.devnull, "w") as nowhere:
        for descriptor in (1, 2):
            with contextlib.suppress(OSError):
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    os.dup2(nowhere.fileno(), descriptor)


def _explicit() -> tuple[str, int, int] | None:
    """Return coordinator, number of processes and index as a launcher set them; None if it did not."""
    names = ("JAX_COORDINATOR_ADDRESS", "JAXMODELS_NUM_PROCESSES", "JAXMODELS_PROCESS_ID")
    if not any(name in os.environ for name in names[1:]):
        return None
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise UserError(
            f"got a run of several processes without {' and '.join(missing)}, expected all of "
            f"{', '.join(names)}, try jaxmodels launch, which sets them"
        )
    count, index = _integer(names[1]), _integer(names[2])
    if not 0 <= index < count:
        raise UserError(
            f"got {names[2]}={index} with {names[1]}={count}, expected an index from 0 to {count - 1}, "
            "try jaxmodels launch, which sets them"
        )
    return os.environ[names[0]], count, index


def _clustered() -> bool:
    """Whether more than one process was started, as far as the environment shows without asking a server.

    A SLURM allocation is not enough: its batch script and a one-task step run alone.
    """
    env = os.environ
    if "SLURM_PROCID" in env and "SLURM_STEP_NODELIST" in env and _integer("SLURM_STEP_NUM_TASKS", "1") > 1:
        return True
    if _integer("OMPI_COMM_WORLD_SIZE", "1") > 1:
        return True
    if "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env:
        return True
    platforms = env.get("JAX_PLATFORMS") or "tpu"
    if "tpu" not in platforms.split(",") or importlib.util.find_spec("libtpu") is None:
        return False
    hosts = env.get("TPU_PROCESS_ADDRESSES", env.get("TPU_WORKER_HOSTNAMES"))
    if hosts is not None or "MEGASCALE_NUM_SLICES" in env:
        return "," in (hosts or "") or _integer("MEGASCALE_NUM_SLICES", "1") > 1
    # Importing JAX sets this on machines without TPUs; on those with TPUs, the metadata server knows its peers.
    return "TPU_SKIP_MDS_QUERY" not in env


def _integer(name: str, default: str | None = None) -> int:
    value = os.environ.get(name) or default or ""
    if not value.isdecimal():
        raise UserError(f"got {name}={value!r}, expected a whole number, try unset {name}")
    return int(value)


def _is_loopback(host: str) -> bool:
    try:
        return socket.gethostbyname(host).startswith("127.")
    except OSError:
        return False


def _check_name(local: bool) -> None:
    """Report what gloo does not: it meets its peers at the address of this machine's name, and no setting helps."""
    if os.environ.get("JAX_PLATFORMS") != "cpu":
        return
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        raise UserError(
            f"got a machine name {name} that has no address, expected a name that resolves to this machine, "
            "try a line with its address and name in /etc/hosts"
        ) from None
    if address.startswith("127.") and not local:
        print(
            f"warning: this machine's name {name} has the address {address}, which no other machine can reach; if "
            f"processes do not find each other, give {name} its real address in /etc/hosts",
            file=sys.stderr,
        )


def _leave_at_once(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Excepthook: print, then end, because an ordinary exit would wait for peers that wait for this process."""
    traceback.print_exception(kind, error, trace)
    progress.failed(error)
    _exit(130 if issubclass(kind, KeyboardInterrupt) else 1)


def _exit(code: int) -> NoReturn:
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
