"""Foreground jobs: the command runs until the job has ended, and its process is the job's handle."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import ClassVar, Protocol

from jaxmodels.errors import ExitCode, UserError
from jaxmodels.launch.output import growing
from jaxmodels.launch.place import Job, Place, State, Status, write
from jaxmodels.launch.ranks import signalled_with_parent
from jaxmodels.launch.signals import handled


def log(job: Job) -> Path:
    """Return the file with the output of a job."""
    return job.directory / "log.txt"


class Supervised(Protocol):
    """A process that the command waits for, or several that act as one."""

    def send_signal(self, number: int, /) -> object:
        """Pass on a signal."""
        ...

    def wait(self) -> int:
        """Wait until it has ended; return the exit code."""
        ...


def start(command: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start a process that gets no signals from the terminal, only those passed on, and that ends with this one."""
    return subprocess.Popen(
        list(command),
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=signalled_with_parent(signal.SIGTERM),
    )


def stay(job: Job, begin: Callable[[], Supervised]) -> str:
    """Start a job, pass signals on to it, wait until it has ended, and record its exit code; return its handle."""
    handle = f"{socket.gethostname()} {os.getpid()} {_born(os.getpid())}"
    early: list[int] = []
    supervised: Supervised | None = None

    def pass_on(number: int, frame: FrameType | None) -> None:
        if supervised is None:
            early.append(number)
        else:
            with contextlib.suppress(ProcessLookupError):
                supervised.send_signal(number)

    with handled(pass_on):
        job.started(handle)
        supervised = begin()
        for number in early:
            supervised.send_signal(number)
        code = supervised.wait()
    write(job.directory / "code", str(code if code >= 0 else ExitCode.FAILED.value))
    return handle


class Foreground(Place):
    """A place whose jobs run in the foreground: the handle of a job is the process of the command."""

    stays: ClassVar[bool] = True

    def status(self, job: Job, handle: str) -> Status:
        if (code := job.ended()) is not None:
            return Status.ended(code)
        if _alive(handle):
            return Status(State.RUNNING)
        return Status(State.GONE, "its command ended without a word: killed, or the machine was started again")

    def logs(self, job: Job, handle: str, follow: bool = False) -> Iterator[str]:
        return growing(log(job), lambda: follow and _alive(handle))

    def cancel(self, job: Job, handle: str) -> None:
        """Tell the job to save and stop, as Ctrl-C does."""
        if _alive(handle):
            os.kill(int(handle.split()[1]), signal.SIGTERM)


def _alive(handle: str) -> bool:
    """Whether the command still runs.

    Raises:
        UserError: it was started on another machine, or the handle is damaged.
    """
    if not re.fullmatch(r"\S+ \d+ \d*", handle):
        raise UserError(f"got the handle {handle!r} of a job, expected its host, process and start")
    host, pid, born = handle.split(" ")
    if host != socket.gethostname():
        raise UserError(f"got a job that was started on {host}, expected one of this machine, try the same there")
    return _born(int(pid)) == born


def _born(pid: int) -> str:
    """Return when a process started, in kernel ticks, so that a later process with its id is not taken for it."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        if sys.platform == "linux":
            return ""
        with contextlib.suppress(OSError):
            os.kill(pid, 0)
            return "0"
        return ""
    return "" if fields[0] == "Z" else fields[19]
