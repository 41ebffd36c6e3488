"""Start the ranks of one node with their environments, observe them once a second, and leave none running."""

from __future__ import annotations

import codecs
import contextlib
import ctypes
import dataclasses
import fcntl
import glob
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jaxmodels.errors import UserError
from jaxmodels.launch.console import Console
from jaxmodels.launch.pauses import Pauses
from jaxmodels.launch.seen import Frame, Seen, stacks

Platform = Literal["auto", "cpu", "gpu", "tpu"]
_PR_SET_PDEATHSIG = 1
_TICK = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Assignment:
    """The ranks that a node starts for an attempt."""

    attempt: int
    first: int
    """The rank of its first process."""
    count: int
    """Number of ranks on all nodes."""
    coordinator: str
    """HOST:PORT at which the ranks connect."""
    planned: int = 0
    """Number of ranks when no node is missing."""


@dataclass
class _Rank:
    seen: Seen
    process: subprocess.Popen[bytes]
    pauses: Pauses = field(default_factory=Pauses)
    ended: float = 0.0
    stopped: float = 0.0
    reader: threading.Thread | None = None


class Ranks:
    """The processes of one attempt on this node."""

    def __init__(
        self,
        command: Sequence[str],
        environments: Sequence[Mapping[str, str]],
        first: int,
        console: Console,
        ended: Callable[[], object],
    ) -> None:
        """Start the processes; `ended` is called, in another thread, as soon as one of them has ended."""
        self.folder = Path(tempfile.mkdtemp(prefix="launch-"))
        self.console = console
        self._ranks: list[_Rank] = []
        self._memory_kills = _memory_kills()
        outputs = []
        try:
            for index, environment in enumerate(environments, first):
                screen = console if console.live and index == 0 else None
                process, output = _start(command, {**environment, "JAXMODELS_PROGRESS_DIR": str(self.folder)}, screen)
                outputs.append(output)
                device = environment.get("CUDA_VISIBLE_DEVICES") if "CUDA_VISIBLE_DEVICES" in environment else None
                device = f"GPU {device}" if device else environment.get("JAX_PLATFORMS") or "device"
                self._ranks.append(_Rank(Seen(index, socket.gethostname(), device), process))
        except BaseException:
            self.kill()
            raise
        # Threads start only after the last fork.
        for rank, output in zip(self._ranks, outputs, strict=True):
            rank.reader = threading.Thread(target=_read, args=(rank.seen.rank, output, console), daemon=True)
            rank.reader.start()
            threading.Thread(target=self._wait, args=(rank, ended), daemon=True).start()

    def _wait(self, rank: _Rank, ended: Callable[[], object]) -> None:
        code = rank.process.wait()
        # wait for its last lines, but not for long: a child process may keep the pipe open
        if rank.reader is not None:
            rank.reader.join(timeout=1.0)
        rank.ended = time.monotonic()
        rank.seen.memory_killed = code == -signal.SIGKILL and _memory_kills() > self._memory_kills
        with contextlib.suppress(OSError, ValueError):
            error = json.loads((self.folder / f"{rank.seen.rank}.error").read_text())
            rank.seen.error = {str(name): str(value) for name, value in error.items()}
        rank.seen.tail = list(self.console.tails[rank.seen.rank])
        rank.seen.code = code
        ended()

    def seen(self) -> list[Seen]:
        """Return the current state of each rank."""
        now = time.monotonic()
        for rank in self._ranks:
            rank.seen.read(self.folder, rank.pauses)
            if rank.seen.code is None:
                state, rank.seen.cpu = _process(rank.process.pid, rank.seen.cpu)
                rank.stopped = (rank.stopped or now) if state == "T" else 0.0
                rank.seen.frozen = now - rank.stopped if rank.stopped else 0.0
            else:
                rank.seen.ended, rank.seen.frozen = now - rank.ended, 0.0
        return [dataclasses.replace(rank.seen) for rank in self._ranks]

    def stacks(self) -> dict[int, list[Frame]]:
        """Return the stacks of the main threads of the running ranks."""
        running = [rank for rank in self._ranks if rank.seen.code is None]
        for rank in running:  # the last lines of a rank may name another rank
            rank.seen.tail = list(self.console.tails[rank.seen.rank])
        return stacks(self.folder, {rank.seen.rank: rank.process.pid for rank in running if not rank.stopped})

    def run(self) -> Path | None:
        """Return the run directory, if rank 0 is on this node and has reported it."""
        with contextlib.suppress(OSError, ValueError):
            return Path(json.loads((self.folder / "0.run").read_text()))
        return None

    def unsaved(self) -> dict[str, Any] | None:
        """Return step, message and time of the newest checkpoint that rank 0, if on this node, failed to write."""
        with contextlib.suppress(OSError, ValueError):
            return json.loads((self.folder / "0.unsaved").read_text())
        return None

    def tell(self) -> None:
        """Tell the ranks to save and stop."""
        for rank in self._ranks:
            if rank.seen.code is None:
                # Ctrl-C is passed on as SIGTERM too, which stops all ranks at one step without a traceback.
                rank.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill the ranks and every process that they started, and wait until they have ended."""
        for rank in self._ranks:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(rank.process.pid, signal.SIGKILL)
        for rank in self._ranks:
            with contextlib.suppress(subprocess.TimeoutExpired):
                rank.process.wait(timeout=10)
            if rank.reader is not None:
                rank.reader.join(timeout=1.0)
        shutil.rmtree(self.folder, ignore_errors=True)


def _process(pid: int, before: float) -> tuple[str, float]:
    """Return a process's state and CPU seconds as /proc reports them; on other systems "" and the seconds before."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", before
    return fields[0], (int(fields[11]) + int(fields[12])) / _TICK


def _memory_kills() -> int:
    """Count the processes that the kernel has killed for lack of memory, in this container if known, else here."""
    for path, name in (("/sys/fs/cgroup/memory.events", "oom_kill"), ("/proc/vmstat", "oom_kill")):
        with contextlib.suppress(OSError):
            if found := re.search(rf"(?m)^{name} (\d+)$", Path(path).read_text()):
                return int(found[1])
    return 0


def environments(processes: int, devices: int | None, platform: Platform, given: Assignment) -> list[dict[str, str]]:
    """Return the environment of each rank of this node.

    Raises:
        UserError: there are fewer than one process or device, or more GPUs are wanted than this machine has.
    """
    if processes < 1 or (devices is not None and devices < 1):
        raise UserError(
            f"got {processes} processes with {devices} devices each, expected at least one of both, "
            "try --processes 2 --devices 1"
        )
    gpus = _gpus()
    wanted = os.environ.get("JAX_PLATFORMS", "")
    on_gpu = platform == "gpu" or (platform == "auto" and bool(gpus) and not wanted.startswith(("cpu", "tpu")))
    on_tpu = platform == "tpu" or (platform == "auto" and not on_gpu and _has_tpu() and not wanted.startswith("cpu"))
    if on_tpu and processes > 1:
        raise UserError(f"got {processes} processes on a host of TPUs, expected one a host, try --processes 1")
    each = devices or (max(1, len(gpus) // processes) if on_gpu else 1)
    if on_gpu and processes * each > len(gpus):
        raise UserError(
            f"got {processes} processes with {each} GPUs each, expected at most the {len(gpus)} visible here, "
            "try --platform cpu"
        )
    common = {name: value for name, value in os.environ.items() if name != "JAX_LOCAL_DEVICE_IDS"}
    common |= {
        "JAX_COORDINATOR_ADDRESS": given.coordinator,
        "JAXMODELS_NUM_PROCESSES": str(given.count),
        "JAXMODELS_PLANNED_PROCESSES": str(max(given.planned, given.count)),
        "JAXMODELS_ATTEMPT": str(given.attempt),
        "PYTHONUNBUFFERED": "1",
    }
    if given.coordinator.startswith("127."):
        common["JAX_COORDINATOR_BIND_ADDRESS"] = given.coordinator
    if not on_gpu and not on_tpu:
        flags = re.sub(r"--xla_force_host_platform_device_count=\S*", "", common.get("XLA_FLAGS", ""))
        common |= {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={each}".strip(),
        }
        if each > 1:
            # With fewer threads in XLA's CPU client than collectives in flight, devices deadlock.
            common.setdefault("PJRT_NPROC", str(max(os.cpu_count() or 1, 4 * each)))
    made: list[dict[str, str]] = []
    for index in range(processes):
        environment = common | {"JAXMODELS_PROCESS_ID": str(given.first + index)}
        if on_gpu:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[index * each : (index + 1) * each])
        made.append(environment)
    return made


def _gpus() -> list[str]:
    """Return the NVIDIA GPUs that a process may use, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    return [str(index) for index in range(len(glob.glob("/dev/nvidia[0-9]*")))]


def _has_tpu() -> bool:
    return bool(glob.glob("/dev/accel[0-9]*") or os.environ.get("TPU_WORKER_HOSTNAMES"))


def _start(
    command: Sequence[str], environment: Mapping[str, str], screen: Console | None
) -> tuple[subprocess.Popen[bytes], int]:
    """Start a rank; return its process and the file descriptor of its output.

    With a screen, the rank writes to a terminal of its own, so that its display redraws itself as if it ran alone.
    """
    reading, writing = os.openpty() if screen else os.pipe()
    if screen:
        columns, rows = shutil.get_terminal_size()
        size = struct.pack("HHHH", rows, columns - screen.prefix_width, 0, 0)
        fcntl.ioctl(writing, termios.TIOCSWINSZ, size)
        attributes = termios.tcgetattr(writing)
        attributes[1] &= ~termios.OPOST
        termios.tcsetattr(writing, termios.TCSANOW, attributes)
    try:
        process = subprocess.Popen(
            list(command),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=writing,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=signalled_with_parent(signal.SIGKILL),
        )
    finally:
        os.close(writing)
    return process, reading


def signalled_with_parent(number: signal.Signals) -> Callable[[], None] | None:
    """Return a hook for a child (Linux only), which gets this signal when its parent ends, even if that is killed."""
    if sys.platform != "linux":
        return None
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def hook() -> None:
        prctl(_PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:
            os._exit(1)

    return hook


def _read(rank: int, descriptor: int, console: Console) -> None:
    if os.isatty(descriptor):
        for chunk in _decoded(descriptor):
            console.redraw(rank, chunk)
        return
    rest = ""
    for chunk in _decoded(descriptor):
        *lines, rest = (rest + chunk).split("\n")
        for line in lines:
            # A line that was redrawn is shown in its last state.
            console.line(rank, line.rstrip("\r").rpartition("\r")[2])
    if rest:
        console.line(rank, rest)


def _decoded(descriptor: int) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    with open(descriptor, "rb", buffering=0) as stream:
        while True:
            try:
                data = stream.read(65536)
            except OSError:  # a terminal reports the end of its process this way
                data = b""
            if not data:
                return
            yield decoder.decode(data)
