"""What a supervisor sees of a rank: how far it is, how it ended, and where it stands."""

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

# A process writes its stacks within this time, even while it spins in Python.
_ANSWER_SECONDS = 0.5
_FRAME = re.compile(r'File "(.+)", line (\d+) in (\S+)')
# A main thread in one of these packages waits for devices, and therefore for other ranks.
_JAX = re.compile(r"-packages/(jax|jaxlib)/")

Frame = tuple[str, str, str]
"""File, line and function."""


@dataclass
class Seen:
    """One rank, as it was at a moment; ages are in seconds before it, since clocks of hosts differ."""

    rank: int
    host: str
    device: str
    """What it computes on: cpu, or the GPUs it was given."""
    code: int | None = None
    """Exit code, negative for a signal; None while it runs."""
    ended: float = 0.0
    """Seconds since it ended."""
    frozen: float = 0.0
    """Seconds for which a signal has kept it from running."""
    polls: int = 0
    """How often it has been at the end of a step, or of a batch of an evaluation."""
    step: int = -1
    """Steps done; -1: it has not said."""
    phase: str = "start"
    age: float = 0.0
    """Seconds since it last reported."""
    device_wait: float = 0.0
    """Seconds in which its loop waited for devices, so far."""
    data_wait: float = 0.0
    pauses: int = 0
    """Times between two turns of its loop in this phase that are known."""
    normal: float = 0.0
    """Seconds up to which the next one is normal (`jaxmodels.launch.pauses`)."""
    regular: bool = False
    """Whether that bounds it also where anything is computed."""
    cpu: float = 0.0
    """Seconds of computing by its process so far."""
    error: dict[str, str] = field(default_factory=dict)
    """Kind and message of what it ended with, where it could say so."""
    memory_killed: bool = False
    """The kernel has killed a process for lack of memory while it ran."""
    tail: list[str] = field(default_factory=list)
    """Its last lines, once it has ended."""

    def read(self, folder: Path, past: Pauses) -> None:
        """Take what the rank has left in its supervisor's folder (`jaxmodels.parallel.progress`)."""
        with contextlib.suppress(OSError, struct.error):
            report = (folder / f"{self.rank}.report").read_bytes()
            past.take(report)
            self.polls, self.step, at, self.device_wait, self.data_wait, _, phase = LAYOUT.unpack_from(report)
            self.phase = phase.rstrip(b"\0").decode(errors="replace")
            self.pauses, self.normal = past.of(self.phase)
            self.regular = past.regular(self.phase)
            self.age = max(0.0, time.time() - at) if at else 0.0


def stacks(folder: Path, processes: dict[int, int]) -> dict[int, list[Frame]]:
    """The frames of each rank's main thread, innermost first; none for a rank that does not answer.

    Args:
        folder: where ranks leave their stacks upon SIGUSR1.
        processes: the id of each rank's process.
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
            for thread in re.split(r"\n(?=(?:Current thread|Thread) 0x)", "\n" + text[size:]):
                if re.match(rf"(Current thread|Thread) {main}\b", thread):
                    found[rank] = _FRAME.findall(thread)
    return found


def waits_for_device(stack: Sequence[Frame]) -> bool:
    """Whether a main thread waits for a device or in a barrier."""
    if not stack:
        return False
    file, _, function = stack[0]
    return bool(_JAX.search(file)) or (function == "barrier" and file.endswith("distributed.py"))


def grouped(found: dict[int, list[Frame]]) -> list[dict[str, object]]:
    """Ranks whose main threads stand at the same place, as one group; the smallest, which are the odd ones, first."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for rank, stack in sorted(found.items()):
        groups.setdefault(tuple("{}:{} in {}".format(*frame) for frame in stack[:12]), []).append(rank)
    ordered = sorted(groups.items(), key=lambda group: (len(group[1]), group[1]))
    return [{"ranks": ranks, "stack": list(stack)} for stack, ranks in ordered]


def held_up_by(seen: Sequence[Seen], found: dict[int, list[Frame]]) -> list[Seen]:
    """The ranks that the others wait for.

    Of those whose main thread does not wait for a device, these are the ones with the fewest polls. The list is empty
    where nothing sets them apart: all wait for devices, or none has polled yet.
    """
    running = [one for one in seen if one.code is None]
    in_python = [one for one in running if not waits_for_device(found.get(one.rank, []))]
    candidates = in_python or running
    least = min((one.polls for one in candidates), default=0)
    stuck = [one for one in candidates if one.polls == least]
    if len(stuck) == len(seen) and len(seen) > 1 and (not in_python or least == 0):
        return []
    return stuck
