"""Find the ranks that the others wait for, from how far each has come and from where its main thread is."""

from __future__ import annotations

import contextlib
import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from jaxmodels.launch.watch import Rank

# A rank writes its stack within this time, even while it spins in Python.
_ANSWER_SECONDS = 0.5
_FRAME = re.compile(r'File "(.+)", line (\d+) in (\S+)')
# A main thread in one of these packages waits for devices, and therefore for other ranks.
_JAX = re.compile(r"-packages/(jax|jaxlib)/")

Frame = tuple[str, str, str]
"""File, line and function."""


class Progress:
    """Reads what ranks leave in a folder (`jaxmodels.parallel.distributed`): poll counts, and stacks upon SIGUSR1.

    A rank polls once each step, and once each batch of an evaluation, so the ranks of one run poll equally often.
    """

    def __init__(self, folder: Path, patience: float = 30.0) -> None:
        self.folder, self.patience = folder, patience
        self._counts: list[int] = []
        self._since = self._asked = time.monotonic()
        self._longest_pause = 0.0
        self._warned = False

    def stall_warning(self, ranks: Sequence[Rank]) -> str:
        """Return a warning, once per stall, when no rank has polled for a long time; otherwise the empty string.

        A long time is more than `patience` seconds and more than three times the longest pause so far.
        """
        now, counts = time.monotonic(), [self._count(rank) for rank in ranks]
        if counts != self._counts:
            if any(self._counts):  # the time before the first poll is compilation
                self._longest_pause = max(self._longest_pause, now - self._since)
            self._counts, self._since, self._asked, self._warned = counts, now, now, False
            for rank in ranks:
                rank.stuck = ""
        if self._warned or now - self._asked <= max(self.patience, 3 * self._longest_pause):
            return ""
        self._asked = now
        stuck = self.find_stuck(ranks)
        self._warned = bool(stuck)
        if not stuck:
            return ""
        named = "; ".join(f"rank {rank.index} is {rank.stuck}" for rank in stuck)
        waiting = len(stuck) < sum(rank.code is None for rank in ranks)
        others = f", and the others wait for {'it' if len(stuck) == 1 else 'them'}" if waiting else ""
        return f"no rank has made progress for {now - self._since:.0f} s: {named}{others}"

    def find_stuck(self, ranks: Sequence[Rank]) -> list[Rank]:
        """Return the ranks that the others wait for, each with `stuck` set.

        Of the ranks whose main thread does not wait for a device, these are the ones with the fewest polls. The list
        is empty where nothing sets them apart: all ranks wait for devices, or none has polled yet.
        """
        running = [rank for rank in ranks if rank.code is None]
        stacks = self._stacks(running)
        in_python = [rank for rank in running if not _waits_for_device(stacks[rank.index])]
        candidates = in_python or running
        least = min((self._count(rank) for rank in candidates), default=0)
        stuck = [rank for rank in candidates if self._count(rank) == least]
        if len(stuck) == len(ranks) and (not in_python or least == 0):
            return []
        for rank in stuck:
            where = " at {}:{} in {}".format(*stacks[rank.index][0]) if stacks[rank.index] else ""
            rank.stuck = f"stuck{where}, {least} polls after its start"
        return stuck

    def _count(self, rank: Rank) -> int:
        with contextlib.suppress(OSError, ValueError, IndexError):
            return int((self.folder / f"{rank.index}.report").read_text().split()[0])
        return 0

    def _stacks(self, ranks: Sequence[Rank]) -> dict[int, list[Frame]]:
        """Return the frames of each rank's main thread, innermost first; none for a rank that does not answer."""
        sizes: dict[int, int] = {}
        for rank in ranks:
            path = self.folder / f"{rank.index}.stack"
            with contextlib.suppress(OSError):  # a rank without this file has no handler, and the signal would end it
                sizes[rank.index] = path.stat().st_size
                rank.process.send_signal(signal.SIGUSR1)
        time.sleep(_ANSWER_SECONDS if sizes else 0.0)
        found: dict[int, list[Frame]] = {rank.index: [] for rank in ranks}
        for index, size in sizes.items():
            text = (self.folder / f"{index}.stack").read_text(errors="replace")
            main, _, _ = text.partition("\n")
            for thread in re.split(r"\n(?=(?:Current thread|Thread) 0x)", "\n" + text[size:]):
                if re.match(rf"(Current thread|Thread) {main}\b", thread):
                    found[index] = _FRAME.findall(thread)
        return found


def _waits_for_device(stack: Sequence[Frame]) -> bool:
    """Say whether a main thread waits for a device or in a barrier."""
    if not stack:
        return False
    file, _, function = stack[0]
    return bool(_JAX.search(file)) or (function == "barrier" and file.endswith("distributed.py"))
