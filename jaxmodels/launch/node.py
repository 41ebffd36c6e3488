"""Run several processes on this machine, joined by jax.distributed, and leave none of them behind."""

from __future__ import annotations

import argparse
import codecs
import ctypes
import fcntl
import glob
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxmodels.errors import ExitCode, UserError
from jaxmodels.launch import code
from jaxmodels.launch.console import Console
from jaxmodels.launch.progress import Progress
from jaxmodels.launch.watch import Events, Rank, judge, signals_to, watch

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Node:
    """The ranks of one machine."""

    processes: int = 2
    devices: int = 1
    """Devices of each process: virtual ones of a CPU, or GPUs, assigned in order."""
    platform: Literal["auto", "cpu", "gpu"] = "auto"
    """auto uses GPUs where there are any, unless JAX_PLATFORMS says cpu."""
    grace: float = 60.0
    """Seconds that the processes have to save after this one is told to stop."""


def main(arguments: Sequence[str]) -> int:
    """Start and watch this node's ranks as the arguments say; returns the exit code."""
    parser = argparse.ArgumentParser("python -m jaxmodels.launch.node", description=__doc__, allow_abbrev=False)
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--platform", choices=("auto", "cpu", "gpu"), default="auto")
    parser.add_argument("--restarts", type=int, default=3)
    parser.add_argument("--grace", type=float, default=60.0)
    parser.add_argument("--log", type=Path, help="a file that keeps what the ranks print")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    given = parser.parse_args(arguments)
    command = given.command[1:] if given.command[:1] == ["--"] else given.command
    try:
        code.check(os.environ)
        return run(program(command), Node(given.processes, given.devices, given.platform, given.grace), log=given.log)
    except UserError as mistake:
        print(f"launch: error: {mistake}", file=sys.stderr)
        return ExitCode.MISTAKE


def program(command: Sequence[str]) -> list[str]:
    """The process that one of our commands is: `train configs/x.py`, or `benchmarks scaling`."""
    own = "benchmarks" if command[:1] == ["benchmarks"] else "jaxmodels"
    return [sys.executable, "-m", own, *(command[1:] if own == "benchmarks" else command)]


def run(command: Sequence[str], options: Node, patience: float = 30.0, log: Path | None = None) -> int:
    """Run `command` in every process and return the exit code of the whole.

    The code is 0 when all are done, 75 when all saved and stopped (run it again), 2 for a user's mistake, and 1 for
    anything else. When one process fails, all are ended, and the first failure is reported with its cause and last
    lines. When no process makes progress for `patience` seconds, or for three times the longest pause so far, a
    warning names those that the others wait for.

    Raises:
        UserError: the options cannot be met on this machine.
    """
    environments = _environments(options)
    with tempfile.TemporaryDirectory(prefix="launch-") as folder:
        environments = [{**each, "JAXMODELS_PROGRESS_DIR": folder} for each in environments]
        return _run(command, options, environments, Progress(Path(folder), patience), Console(options.processes, log))


def _run(
    command: Sequence[str],
    options: Node,
    environments: list[dict[str, str]],
    progress: Progress,
    console: Console,
) -> int:
    events: Events[Rank | int] = Events()
    ranks: list[Rank] = []
    readers: list[threading.Thread] = []
    began = time.monotonic()
    with signals_to(events):
        try:
            outputs = []
            for index, environment in enumerate(environments):
                process, output = _start(command, environment, console if console.live and index == 0 else None)
                ranks.append(Rank(index, process))
                outputs.append(output)
            # Threads start only after the last fork.
            for rank, output in zip(ranks, outputs, strict=True):
                readers.append(threading.Thread(target=_read, args=(rank.index, output, console), daemon=True))
                readers[-1].start()
                threading.Thread(target=rank.wait, args=(events,), daemon=True).start()
            late = watch(ranks, events, options.grace, progress.stall_warning)
            if any(rank.code is None for rank in ranks):
                progress.find_stuck(ranks)
            for rank, reader in zip(ranks, readers, strict=True):
                if rank.code is not None:
                    reader.join(timeout=1.0)
            code, message = judge(ranks, console.tails, late, began)
        finally:
            for rank in ranks:
                rank.kill()
    for reader in readers:
        reader.join(timeout=1.0)
    console.close()
    if message:
        console.say(message)
    return code


def _environments(options: Node) -> list[dict[str, str]]:
    """Return the environment of each rank.

    Raises:
        UserError: there are fewer than one process or device, or more GPUs than this machine has.
    """
    count, each = options.processes, options.devices
    if count < 1 or each < 1:
        raise UserError(
            f"got {count} processes with {each} devices each, expected at least one of both, "
            "try --processes 2 --devices 1"
        )
    gpus = _gpus()
    wants_cpu = os.environ.get("JAX_PLATFORMS", "").startswith("cpu")
    on_gpu = options.platform == "gpu" or (options.platform == "auto" and bool(gpus) and not wants_cpu)
    if on_gpu and count * each > len(gpus):
        raise UserError(
            f"got {count} processes with {each} GPUs each, expected at most the {len(gpus)} visible here, "
            "try --platform cpu"
        )
    address = f"127.0.0.1:{_free_port()}"
    common = {name: value for name, value in os.environ.items() if name != "JAX_LOCAL_DEVICE_IDS"}
    common |= {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_COORDINATOR_BIND_ADDRESS": address,
        "JAXMODELS_NUM_PROCESSES": str(count),
        "PYTHONUNBUFFERED": "1",
    }
    if not on_gpu:
        flags = re.sub(r"--xla_force_host_platform_device_count=\S*", "", common.get("XLA_FLAGS", ""))
        common |= {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={each}".strip(),
        }
        if each > 1:
            # With fewer threads in XLA's CPU client than collectives in flight, devices deadlock.
            common.setdefault("PJRT_NPROC", str(max(os.cpu_count() or 1, 4 * each)))
    environments = []
    for index in range(count):
        environment = common | {"JAXMODELS_PROCESS_ID": str(index)}
        if on_gpu:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[index * each : (index + 1) * each])
        environments.append(environment)
    return environments


def _gpus() -> list[str]:
    """Return the NVIDIA GPUs that a process may use, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    return [str(index) for index in range(len(glob.glob("/dev/nvidia[0-9]*")))]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _start(
    command: Sequence[str], environment: dict[str, str], screen: Console | None
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
            preexec_fn=_die_with_parent(),
        )
    finally:
        os.close(writing)
    return process, reading


def _die_with_parent() -> Callable[[], None] | None:
    """Return a hook for the child (Linux only), which ends it even when its launcher is killed."""
    if sys.platform != "linux":
        return None
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def hook() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
