"""What a supervisor observes of a rank: its progress, how it ended, and the stack of its main thread."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jaxmodels.launch.pauses import Pauses
from jaxmodels.parallel.progress import LAYOUT

# A process writes its stacks within this time, even in a busy loop in Python.
_ANSWER_SECONDS = 0.5
_FRAME = re.compile(r'File "(.+)", line (\d+) in (\S+)')
# A main thread in one of these packages waits for devices, and therefore for other ranks.
_JAX = re.compile(r"-packages/(jax|jaxlib)/")

Frame = tuple[str, str, str]
"""File, line and function."""


@dataclass
class Seen:
    """The state of one rank at one moment. Times are seconds before that moment, because the clocks of hosts differ."""

    rank: int
    host: str
    device: str
    """Its devices: cpu, or the GPUs that it was given."""
    code: int | None = None
    """Exit code, negative for a signal; None while it runs."""
    ended: float = 0.0
    """Seconds since it ended."""
    frozen: float = 0.0
    """Seconds since a signal stopped it (SIGSTOP)."""
    polls: int = 0
    """Number of times that it has finished a step, or a batch of an evaluation."""
    step: int = -1
    """Steps done; -1: not reported yet."""
    phase: str = "start"
    age: float = 0.0
    """Seconds since it last reported."""
    device_wait: float = 0.0
    """Seconds that its loop has waited for devices."""
    data_wait: float = 0.0
    pauses: int = 0
    """Number of known pauses in this phase (`jaxmodels.launch.pauses`)."""
    normal: float = 0.0
    """Seconds that the next pause may normally last."""
    regular: bool = False
    """Whether `normal` is a limit even while the rank computes."""
    cpu: float = 0.0
    """CPU seconds of its process."""
    error: dict[str, str] = field(default_factory=dict)
    """Kind and message of the exception that it ended with, if it could report one."""
    memory_killed: bool = False
    """Whether it was killed while the kernel was killing processes for lack of memory."""
    tail: list[str] = field(default_factory=list)
    """Its last lines, once it has ended."""

    def read(self, folder: Path, past: Pauses) -> None:
        """Read the rank's report from its supervisor's folder (`jaxmodels.parallel.progress`)."""
        with contextlib.suppress(OSError, struct.error):
            report = (folder / f"{self.rank}.report").read_bytes()
            past.take(report)
            self.polls, self.step, at, self.device_wait, self.data_wait, _, phase = LAYOUT.unpack_from(report)
            self.phase = phase.rstrip(b"\0").decode(errors="replace")
            self.pauses, self.normal = past.of(self.phase)
            self.regular = past.regular(self.phase)
            self.age = max(0.0, time.time() - at) if at else 0.0


def stacks(folder: Path, processes: dict[int, int]) -> dict[int, list[Frame]]:
    """Return the frames of each rank's main thread, innermost first; none for a rank that does not answer.

    A main thread that waits for what a thread of a pool makes, as for a batch, has the frames of that thread.

    Args:
        folder: where ranks write their stacks on SIGUSR1.
        processes: the process id of each rank.
    """
    sizes: dict[int, int] = {}
    for rank, pid in processes.items():
        # a rank without this file has no handler yet, and the signal would end it
        with contextlib.suppress(OSError):
            sizes[rank] = (folder / f"{rank}.stack").stat().st_size
            os.kill(pid, signal.SIGUSR1)
    time.sleep(_ANSWER_SECONDS if sizes else 0.0)
    found: dict[int, list[Frame]] = {rank: [] for rank in processes}
    for rank, size in sizes.items():
        with contextlib.suppress(OSError):
            text = (folder / f"{rank}.stack").read_text(errors="replace")
            main, _, _ = text.partition("\n")
            others: list[list[Frame]] = []
            for thread in re.split(r"\n(?=(?:Current thread|Thread) 0x)", "\n" + text[size:]):
                frames = _FRAME.findall(thread)
                if re.match(rf"(Current thread|Thread) {main}\b", thread):
                    found[rank] = frames
                else:
                    others.append(frames)
            if _waits_for_thread(found[rank]):
                found[rank] = next((each for each in others if _works(each)), found[rank])
    return found


def _waits_for_thread(stack: Sequence[Frame]) -> bool:
    """Whether a thread waits for the result of another one, of a pool."""
    return any(file.endswith("concurrent/futures/_base.py") and name == "result" for file, _, name in stack[:4])


def _works(stack: Sequence[Frame]) -> bool:
    """Whether a thread of a pool makes data, and does not wait for another thread in turn."""
    runs = any(file.endswith("concurrent/futures/thread.py") and name == "run" for file, _, name in stack)
    makes = any("/jaxmodels/data/" in file for file, _, _ in stack)
    return runs and makes and not _waits_for_thread(stack)


def waits_for_device(stack: Sequence[Frame]) -> bool:
    """Whether a main thread is waiting for a device or in a barrier."""
    if not stack:
        return False
    file, _, function = stack[0]
    return bool(_JAX.search(file)) or (function == "barrier" and file.endswith("distributed.py"))


def grouped(found: dict[int, list[Frame]]) -> list[dict[str, object]]:
    """Group the ranks whose main threads have the same stack; the smallest groups, which stand out, come first."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for rank, stack in sorted(found.items()):
        groups.setdefault(tuple("{}:{} in {}".format(*frame) for frame in stack[:12]), []).append(rank)
    ordered = sorted(groups.items(), key=lambda group: (len(group[1]), group[1]))
    return [{"ranks": ranks, "stack": list(stack)} for stack, ranks in ordered]


def held_up_by(seen: Sequence[Seen], found: dict[int, list[Frame]]) -> list[Seen]:
    """Return the ranks that the others wait for.

    These are the ranks with the fewest polls among those whose main thread does not wait for a device. The list is
    empty if nothing distinguishes them: all wait for devices, or none has polled yet.
    """
    running = [one for one in seen if one.code is None]
    in_python = [one for one in running if not waits_for_device(found.get(one.rank, []))]
    candidates = in_python or running
    least = min((one.polls for one in candidates), default=0)
    stuck = [one for one in candidates if one.polls == least]
    if len(stuck) == len(seen) and len(seen) > 1 and (not in_python or least == 0):
        return []
    return stuck
