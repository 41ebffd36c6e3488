"""How far this process is, for the supervisor that started it: a report in a file, and its stacks upon SIGUSR1.

A supervisor gives a folder by JAXMODELS_PROGRESS_DIR. Without one all of this does nothing. A report is written into
memory that the supervisor's file shows, without a call of the system.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import mmap
import os
import signal
import struct
import threading
import time
import traceback
from pathlib import Path
from typing import Any, Literal

Phase = Literal["start", "restore", "compile", "step", "data", "evaluation", "save", "idle"]
"""What a process can be doing."""


LAYOUT = struct.Struct("@qqdddqd16s")
"""A report: polls, steps done, Unix time of the report, seconds waited for devices and for data, pauses in this phase
so far and the longest of them, the phase. Numbers have eight bytes each, so that none is read half-written."""


class _Report:
    """The file of this process, and what stands in it."""

    def __init__(self, folder: Path, rank: str) -> None:
        self.folder, self.rank = folder, rank
        self.polls = 0
        self.step, self.phase = -1, "start"
        self.at = time.time()
        self.device = self.data = 0.0
        self.pauses: dict[str, tuple[int, float]] = {}
        # Open to the end of the process; the supervisor takes the file for a sign that the handler is there.
        stacks = os.open(folder / f"{rank}.part", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        os.write(stacks, f"0x{threading.main_thread().ident:016x}\n".encode())
        faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
        os.rename(folder / f"{rank}.part", folder / f"{rank}.stack")
        file = os.open(folder / f"{rank}.report", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.write(file, bytes(LAYOUT.size))  # a full disk is noticed here, and not by a signal later
        self.map = mmap.mmap(file, LAYOUT.size)
        os.close(file)
        self.write()

    def turn(self, phase: str) -> None:
        """Count the time since the last report as the present phase's, and go on in `phase`."""
        now = time.time()
        count, longest = self.pauses.get(self.phase, (0, 0.0))
        # The first time is no measure of the others: programs are loaded and compiled, caches filled.
        self.pauses[self.phase] = count + 1, max(longest, now - self.at) if count else 0.0
        self.at, self.phase = now, phase
        self.write()

    def write(self) -> None:
        count, longest = self.pauses.get(self.phase, (0, 0.0))
        LAYOUT.pack_into(
            self.map, 0, self.polls, self.step, self.at, self.device, self.data, count, longest, self.phase.encode()
        )


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
        _report.step = _report.step if step is None else step
        _report.turn(name)


def poll() -> None:
    """The loop has come round once more: a step, or a batch of an evaluation; equally often in all processes."""
    if _report is not None:
        _report.polls += 1
        _report.turn(_report.phase)


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
    said = message or " ".join("".join(traceback.format_exception_only(error)).split())
    _note("error", {"kind": type(error).__name__, "message": said[:500]})


def _note(name: str, value: Any) -> None:
    if _report is not None:
        path = _report.folder / f"{_report.rank}.{name}"
        with contextlib.suppress(OSError):
            path.with_suffix(".part").write_text(json.dumps(value))
            path.with_suffix(".part").rename(path)
