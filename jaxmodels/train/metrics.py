"""The metrics of a run: one line for each step in metrics.jsonl, and the time that steps take."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxmodels.train.loggers import Logger
from jaxmodels.train.manifest import whole

log = logging.getLogger("jaxmodels")


class Record(Logger):
    """metrics.jsonl of a run, which a resumed run continues; a step is one line, written when the next one begins."""

    def __init__(self, run: Path, start: int, expected: int | None = None):
        """`expected`: how many lines there were when the state of step `start` was saved, where that is known."""
        self.path = run / "metrics.jsonl"
        self.row: dict[str, Any] = {}
        before = rewind(self.path, start, expected)
        self.written: dict[str, Any] = before[-1] if before else {}
        self.count = len(before)
        self.unwritten = b""
        self.file = self.path.open("ab", buffering=0)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        if self.row and self.row["step"] != step:
            self.write()
        self.row = {"step": step, **self.row, **values}

    def write(self) -> None:
        """Write the line of the current step."""
        if not self.row:
            return
        if self.row["step"] == self.written.get("step"):
            # a run told to stop saved this step's line before its evaluation, which has only been made now
            self.row = {**self.written, **self.row}
            try:
                store(self.path, [*read(self.path.parent)[:-1], self.row])
                self.file.close()
                self.file = self.path.open("ab", buffering=0)
            except OSError:
                self.append(json.dumps(self.row) + "\n")  # `read` joins lines of one step
        else:
            self.append(json.dumps(self.row) + "\n")
            self.count += 1
        self.written = self.row
        self.row = {}

    def append(self, text: str) -> None:
        """Add to the file; a full disk is said, and what did not fit goes first the next time."""
        full = bool(self.unwritten)
        self.unwritten += text.encode()
        try:
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
        except OSError as error:
            if not full:
                log.error("metrics NOT written to %s: %s; the next line tries again", self.path, error.strerror)

    def flush(self) -> None:
        self.write()
        with contextlib.suppress(OSError):
            os.fsync(self.file.fileno())

    def close(self) -> None:
        self.write()
        self.file.close()


def read(run: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl by step; what is none, such as a line that was damaged, is left out and said.

    A last line that a kill, or the run under way, has left without its end is not worth a word.
    """
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    rows: dict[int, dict[str, float]] = {}
    bad = []
    *lines, rest = path.read_bytes().split(b"\n")
    for number, line in enumerate([*lines, rest], 1):
        try:
            row = json.loads(line.decode())
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or not _whole_number(row.get("step")) or not all(map(_number, row.values())):
            if number <= len(lines):
                bad.append(number)
            continue
        rows[row["step"]] = rows.get(row["step"], {}) | row
    if bad:
        shown = ", ".join(map(str, bad[:8])) + (", …" if len(bad) > 8 else "")
        log.warning("%s has no metrics of a step in line %s; left out", path, shown)
    return [rows[step] for step in sorted(rows)]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def rewind(path: Path, step: int, expected: int | None) -> list[dict[str, float]]:
    """Drop lines beyond `step`, which a resumed run will write again, and what is no line; returns those that stay.

    `expected`: how many there were when the state of that step was saved; where some are missing it is said.
    """
    rows = [row for row in read(path.parent) if row["step"] <= step] if step else []
    check_lines(path.parent, rows, step, expected)
    if path.exists():
        store(path, rows)
    return rows


def check_lines(run: Path, rows: Sequence[Mapping[str, float]], step: int, expected: int | None) -> None:
    """Warn where a run has fewer lines up to a step than there were when that step's state was saved."""
    found = sum(row["step"] <= step for row in rows)
    if expected is not None and found < expected:
        log.warning(
            "%s lacks %d of the %d lines up to step %d; its curves have a hole",
            run / "metrics.jsonl",
            expected - found,
            expected,
            step,
        )


def store(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replace the file by these lines, at one blow, unless it is the same."""
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if text != path.read_bytes():
        with whole(path) as part:
            part.write_bytes(text)


class Clock:
    """Time a step takes on the device, between readings of finished steps; `pause` leaves out other work."""

    def __init__(self, amount: int, unit: str, flops: float | None, peak: float | None):
        """`amount`: tokens or examples a step (`unit`); `flops`: model FLOPs a step; `peak`: FLOP/s of all devices."""
        self.amount, self.unit, self.flops, self.peak = amount, unit, flops, peak
        self.seconds = self.waited = 0.0
        self.steps = 0
        self.last: float | None = None
        self.rate: float | None = None

    def tick(self, waited: float) -> None:
        """A step has finished on the device; the loop waited so many seconds for its data."""
        now = time.perf_counter()
        if self.last is not None:
            self.seconds += now - self.last
            self.waited += waited
            self.steps += 1
            fresh = (now - self.last) / self.amount
            self.rate = 1 / (0.9 / self.rate + 0.1 * fresh) if self.rate else 1 / fresh
        self.last = now

    def pause(self) -> None:
        """The next step's time does not count: something else runs before it."""
        self.last = None

    def read(self) -> dict[str, float]:
        """Means since the last reading, empty before a whole step was seen."""
        if not self.steps:
            return {}
        seconds = self.seconds / self.steps
        values = {
            "perf/step_seconds": seconds,
            "perf/data_wait_seconds": self.waited / self.steps,
            f"perf/{self.unit}_per_second": self.amount / seconds,
            "perf/memory_gib": memory(),
        }
        if self.flops and self.peak:
            values["perf/mfu"] = self.flops / seconds / self.peak
        self.seconds = self.waited = 0.0
        self.steps = 0
        return values


def memory() -> float:
    """Peak memory in GiB: of the first local device where it says, else of this process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30


def main(values: Mapping[str, float]) -> dict[str, float]:
    """The metrics that one line has room for: the first four of the whole set, none of single classes or groups."""
    return dict([(name, value) for name, value in values.items() if name.count("/") == 1][:4])
