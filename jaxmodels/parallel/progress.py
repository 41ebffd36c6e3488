"""How far this process is, for the supervisor that started it: a line in a file, and its stacks upon SIGUSR1.

A supervisor gives a folder by JAXMODELS_PROGRESS_DIR. Without one all of this does nothing. A report costs a write of
one line, about two microseconds.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any, Literal

Phase = Literal["start", "restore", "compile", "step", "data", "evaluation", "save", "idle"]
"""What a process can be doing."""


class _Report:
    """The file of this process, and what stands in it."""

    def __init__(self, folder: Path, rank: str) -> None:
        self.folder, self.rank = folder, rank
        self.polls = 0
        self.step, self.phase = -1, "start"
        self.since = self.polled = time.time()
        self.device = self.data = 0.0
        # Open to the end of the process; the supervisor takes the file for a sign that the handler is there.
        stacks = os.open(folder / f"{rank}.part", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        os.write(stacks, f"0x{threading.main_thread().ident:016x}\n".encode())
        faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
        os.rename(folder / f"{rank}.part", folder / f"{rank}.stack")
        self.file = os.open(folder / f"{rank}.report", os.O_WRONLY | os.O_CREAT)
        self.write()

    def write(self) -> None:
        line = (
            f"{self.polls:12d} {self.step:12d} {self.since:18.6f} {self.polled:18.6f} "
            f"{self.device:16.6f} {self.data:16.6f} {self.phase:12}\n"
        )
        with contextlib.suppress(OSError):  # the supervisor's disk is full
            os.pwrite(self.file, line.encode(), 0)


_report: _Report | None = None


def begin() -> None:
    """Begin to report, where a supervisor wants it."""
    global _report
    folder = os.environ.get("JAXMODELS_PROGRESS_DIR")
    if folder and _report is None:
        with contextlib.suppress(OSError):
            _report = _Report(Path(folder), os.environ.get("JAXMODELS_PROCESS_ID", "0"))


def phase(name: Phase, step: int | None = None) -> None:
    """This process enters a phase; `step`: so many steps are done."""
    if _report is not None:
        _report.phase, _report.since = name, time.time()
        _report.step = _report.step if step is None else step
        _report.write()


def poll() -> None:
    """The loop has come round once more: a step, or a batch of an evaluation; equally often in all processes."""
    if _report is not None:
        _report.polls += 1
        _report.polled = time.time()
        _report.write()


def waited(device: float = 0.0, data: float = 0.0) -> None:
    """The loop has waited so many seconds more for its devices, or for its data; written by the next report."""
    if _report is not None:
        _report.device += device
        _report.data += data


def run(directory: Path) -> None:
    """Say in which directory the run is."""
    _note("run", str(directory.absolute()))


def failed(error: BaseException, message: str | None = None) -> None:
    """Say what this process ends with."""
    _note("error", {"kind": type(error).__name__, "message": message or " ".join(str(error).split())[:500]})


def _note(name: str, value: Any) -> None:
    if _report is not None:
        path = _report.folder / f"{_report.rank}.{name}"
        with contextlib.suppress(OSError):
            path.with_suffix(".part").write_text(json.dumps(value))
            path.with_suffix(".part").rename(path)
