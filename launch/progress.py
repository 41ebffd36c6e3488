"""Which rank the others wait for: how far each has come, and where its main thread is."""

from __future__ import annotations

import contextlib
import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from launch.watch import Rank

# How long a rank may take to write its stack; one that spins in Python writes it too.
_ANSWER_SECONDS = 0.5
_FRAME = re.compile(r'File "(.+)", line (\d+) in (\S+)')
# Where a main thread is that waits for devices, and so for other ranks.
_JAX = re.compile(r"-packages/(jax|jaxlib)/")


class Progress:
    """What the ranks leave in a folder (`jaxmodels.parallel.distributed`): a count of polls each, stacks on SIGUSR1."""

    def __init__(self, folder: Path, patience: float = 30.0) -> None:
        self.folder, self.patience = folder, patience
        self._counts: list[int] = []
        self._since = self._asked = time.monotonic()
        self._longest = 0.0
        self._told = False

    def stall(self, ranks: Sequence[Rank]) -> str:
        """What to warn of, once a stall: nobody went on for longer than `patience` and three times the longest gap."""
        now, counts = time.monotonic(), [self._count(rank) for rank in ranks]
        if counts != self._counts:
            if any(self._counts):  # compiling takes its time
                self._longest = max(self._longest, now - self._since)
            self._counts, self._since, self._asked, self._told = counts, now, now, False
            for rank in ranks:
                rank.stuck = ""
        if self._told or now - self._asked <= max(self.patience, 3 * self._longest):
            return ""
        self._asked = now
        named = self.find(ranks)
        self._told = named is not None
        return (
            f"no rank has gone on for {now - self._since:.0f} s: rank {named.index} is {named.stuck}" if named else ""
        )

    def find(self, ranks: Sequence[Rank]) -> Rank | None:
        """The rank that the others wait for, with `stuck` set: the least far of those that wait for no device."""
        running = [rank for rank in ranks if rank.code is None]
        stacks = self._stacks(running)
        busy = [rank for rank in running if not _waits(stacks[rank.index])] or running
        least = min((self._count(rank) for rank in busy), default=0)
        named = [rank for rank in busy if self._count(rank) == least]
        if not named or len(named) == len(ranks):
            return None
        stack = stacks[named[0].index]
        where = " at {}:{} in {}".format(*stack[0]) if stack else ""
        named[0].stuck = f"stuck{where}, {least} polls after its start, and the others wait for it"
        return named[0]

    def _count(self, rank: Rank) -> int:
        with contextlib.suppress(OSError, ValueError):
            return int((self.folder / f"{rank.index}.count").read_text())
        return 0

    def _stacks(self, ranks: Sequence[Rank]) -> dict[int, list[tuple[str, str, str]]]:
        """Frames of each main thread, the innermost first; none of a rank that does not answer."""
        sizes: dict[int, int] = {}
        for rank in ranks:
            path = self.folder / f"{rank.index}.stack"
            with contextlib.suppress(OSError):  # without the file it has no handler, and the signal would end it
                sizes[rank.index] = path.stat().st_size
                rank.process.send_signal(signal.SIGUSR1)
        time.sleep(_ANSWER_SECONDS if sizes else 0.0)
        found: dict[int, list[tuple[str, str, str]]] = {rank.index: [] for rank in ranks}
        for index, size in sizes.items():
            text = (self.folder / f"{index}.stack").read_text(errors="replace")
            main, _, _ = text.partition("\n")
            for thread in re.split(r"\n(?=(?:Current thread|Thread) 0x)", "\n" + text[size:]):
                if re.match(rf"(Current thread|Thread) {main}\b", thread):
                    found[index] = _FRAME.findall(thread)
        return found


def _waits(stack: Sequence[tuple[str, str, str]]) -> bool:
    """Whether a main thread waits for a device or in a barrier."""
    if not stack:
        return False
    file, _, function = stack[0]
    return bool(_JAX.search(file)) or (function == "barrier" and file.endswith("distributed.py"))
