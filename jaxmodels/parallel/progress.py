"""Report this process's progress to the supervisor that started it, in a file, and its stacks on SIGUSR1.

A supervisor names a folder by JAXMODELS_PROGRESS_DIR; without it, nothing here has an effect. A report is written into
a memory-mapped file, without a system call.
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
from typing import Any, Literal, get_args

Phase = Literal["start", "restore", "compile", "step", "data", "evaluation", "save", "idle"]
"""Phases of a process."""
PHASES: tuple[Phase, ...] = get_args(Phase)

LAYOUT = struct.Struct("@qqdddq16s")
"""A report: polls, steps done, Unix time of the report, seconds waited for devices and for data, pauses so far, the
phase. Each number has eight bytes, so that none is read half-written."""
PAUSE = struct.Struct("@dq")
"""A pause, in seconds, and the index of its phase in PHASES. A report is followed by the newest KEPT pauses, of which
pause n is at n % KEPT."""
KEPT = 64
# a loop comes round in these by polls, and leaves them in between for its data, or to save
_LOOP = ("step", "evaluation")


class _Report:
    """The file of this process, and what stands in it."""

    def __init__(self, folder: Path, rank: str) -> None:
        self.folder, self.rank = folder, rank
        self.polls = 0
        self.step = -1
        self.phase: Phase = "start"
        self.at = time.time()
        self.device = self.data = 0.0
        self.pauses = 0
        self.spent: dict[str, float] = {}
        # Open to the end of the process; the supervisor takes the file for a sign that the handler is there.
        stacks = os.open(folder / f"{rank}.part", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        os.write(stacks, f"0x{threading.main_thread().ident:016x}\n".encode())
        faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
        os.rename(folder / f"{rank}.part", folder / f"{rank}.stack")
        file = os.open(folder / f"{rank}.report", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        size = LAYOUT.size + KEPT * PAUSE.size
        os.write(file, bytes(size))  # a full disk is noticed here, and not by a signal later
        self.map = mmap.mmap(file, size)
        os.close(file)
        self.write()

    def turn(self, phase: Phase, polled: bool = False) -> None:
        """Add the time since the last report to the current phase, and enter `phase`.

        A pause is the time from one poll to the next in a phase of the loop, and the whole length of any other phase.
        """
        now = time.time()
        spent = self.spent.get(self.phase, 0.0) + now - self.at
        if polled or self.phase not in _LOOP:
            place = LAYOUT.size + self.pauses % KEPT * PAUSE.size
            PAUSE.pack_into(self.map, place, spent, PHASES.index(self.phase))
            self.pauses, spent = self.pauses + 1, 0.0
        self.spent[self.phase] = spent
        self.at, self.phase = now, phase
        self.write()

    def write(self) -> None:
        LAYOUT.pack_into(
            self.map, 0, self.polls, self.step, self.at, self.device, self.data, self.pauses, self.phase.encode()
        )


_report: _Report | None = None


def begin() -> None:
    """Begin to report, if this process has a supervisor."""
    global _report
    folder = os.environ.pop("JAXMODELS_PROGRESS_DIR", None)  # so that a child process does not write to this report
    if folder and _report is None:
        with contextlib.suppress(OSError):
            _report = _Report(Path(folder), os.environ.get("JAXMODELS_PROCESS_ID", "0"))


def phase(name: Phase, step: int | None = None) -> None:
    """Report that this process enters a phase, and how many steps are done."""
    if _report is not None:
        _report.step = _report.step if step is None else step
        _report.turn(name)


def poll() -> None:
    """Report that the loop has finished a step, or a batch of an evaluation; all processes poll equally often."""
    if _report is not None:
        _report.polls += 1
        _report.turn(_report.phase, polled=True)


def waited(device: float = 0.0, data: float = 0.0) -> None:
    """Add seconds that the loop has waited for its devices or its data; the next report writes them."""
    if _report is not None:
        _report.device += device
        _report.data += data


def run(directory: Path) -> None:
    """Report the run directory."""
    _note("run", str(directory.absolute()))


def unsaved(step: int, message: str) -> None:
    """Report that the checkpoint of a step could not be written; the run continues."""
    _note("unsaved", {"step": step, "message": message[:500], "time": time.time()})


def failed(error: BaseException, message: str | None = None) -> None:
    """Report the exception that this process ends with."""
    message = message or " ".join("".join(traceback.format_exception_only(error)).split())
    _note("error", {"kind": type(error).__name__, "message": message[:500]})


def _note(name: str, value: Any) -> None:
    if _report is not None:
        path = _report.folder / f"{_report.rank}.{name}"
        with contextlib.suppress(OSError):
            path.with_suffix(".part").write_text(json.dumps(value))
            path.with_suffix(".part").rename(path)
