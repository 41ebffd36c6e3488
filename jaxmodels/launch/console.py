"""Show the output of several processes on one screen, each line prefixed with its rank."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
from collections import defaultdict, deque
from pathlib import Path

_COLORS = (36, 33, 35, 32, 34, 31)
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07|[\r\n]")
# The command line's one-line message about a mistake, which every rank prints.
_MISTAKE = re.compile(r"(\w+: )?error: ")
# A message of Gloo, printed once for each device of each group that communicates.
_GREETING = re.compile(r"\[Gloo\] Rank \d+ is connected to")


class Console:
    """Writes the ranks' output to standard output and to a file, and keeps the last lines of each."""

    def __init__(self, ranks: int, log: Path | None = None) -> None:
        self._log = None if log is None else log.open("a")
        self.live = sys.stdout.isatty()
        self._lock = threading.Lock()
        self.begin(ranks)
        self._at_line_start = True
        self._closed = False

    def begin(self, ranks: int) -> None:
        """Forget the output of earlier ranks; `ranks` new ones start, on all nodes together."""
        self.tails: defaultdict[int, deque[str]] = defaultdict(lambda: deque(maxlen=200))
        self._digits = len(str(ranks - 1))
        self._mistakes: dict[str, int] = {}

    @property
    def prefix_width(self) -> int:
        return self._digits + 3

    def line(self, rank: int, text: str) -> None:
        """Write one line of a rank, unless it is a mistake that another rank has already reported."""
        if _GREETING.match(text):
            return
        self.tails[rank].append(text)
        with self._lock:
            if _MISTAKE.match(text) and self._mistakes.setdefault(text, rank) != rank:
                return
            # Rank 0's display may be on this line: clear it, and let rank 0 redraw it on the next one.
            wipe = "" if self._at_line_start else "\r\x1b[2K"
            self._at_line_start = True
            self._write(f"{wipe}{self._prefix(rank)}{text}\n")
            self._note(f"[{rank:>{self._digits}}] {text}")

    def say(self, message: str) -> None:
        """Write a message of the launcher to standard error."""
        with contextlib.suppress(OSError):  # standard error is closed
            print(f"launch: {message}", file=sys.stderr, flush=True)
        self._note(f"launch: {message}")

    def redraw(self, rank: int, chunk: str) -> None:
        """Write a chunk of a display that redraws itself, with the prefix at the start of each line."""
        tail = self.tails[rank]
        out: list[str] = []
        with self._lock:
            for piece in re.split(f"({_CONTROL.pattern})", chunk):
                if piece in ("\r", "\n"):
                    if piece == "\n":
                        self._note(f"[{rank:>{self._digits}}] {tail[-1] if tail else ''}")
                        tail.append("")
                    elif tail:
                        tail[-1] = ""
                    self._at_line_start = True
                elif piece and not _CONTROL.fullmatch(piece):
                    if self._at_line_start:
                        out.append(self._prefix(rank))
                    self._at_line_start = False
                    tail.append((tail.pop() if tail else "") + piece)
                out.append(piece)
            self._write("".join(out))

    def close(self) -> None:
        """Restore the terminal: a display that was cut off leaves the cursor hidden, on the display's line."""
        with self._lock:
            if self.live:
                self._write("\x1b[?25h" if self._at_line_start else "\x1b[?25h\n")

    def _prefix(self, rank: int) -> str:
        prefix = f"[{rank:>{self._digits}}]"
        return f"\x1b[{_COLORS[rank % len(_COLORS)]}m{prefix}\x1b[0m " if self.live else f"{prefix} "

    def _note(self, line: str) -> None:
        if self._log is not None:
            with contextlib.suppress(OSError):  # a full disk must not end a run
                self._log.write(f"{line}\n")
                self._log.flush()

    def _write(self, text: str) -> None:
        if self._closed:
            return
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except OSError:
            # Standard output is closed (`| head`, a closed terminal): stop as on SIGTERM, and keep draining the
            # ranks' pipes.
            self._closed = True
            os.kill(os.getpid(), signal.SIGTERM)
