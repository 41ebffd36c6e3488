"""The metrics of a run: one line per step in metrics.jsonl, and how long steps take."""

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
from jaxmodels.train.manifest import atomic_write

log = logging.getLogger("jaxmodels")


class Record(Logger):
    """A run's metrics.jsonl, which a resumed run continues. A step is one line, written when the next one begins."""

    def __init__(self, run: Path, start: int, expected: int | None = None):
        """`expected`: how many lines there were when the state of step `start` was saved, if that is known."""
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
            # a run told to stop saved this step's line before the step was evaluated, which is only done now
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
        """Append to the file. A full disk is logged, and what did not fit goes first the next time."""
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
    """Read a run's metrics.jsonl, by step. Lines that are not metrics, such as damaged ones, are skipped and logged.

    An unfinished last line, left by a kill or by the run in progress, is skipped without one.
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
        log.warning("%s has no metrics of a step in line %s; skipped", path, shown)
    return [rows[step] for step in sorted(rows)]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def rewind(path: Path, step: int, expected: int | None) -> list[dict[str, float]]:
    """Drop lines beyond `step`, which a resumed run writes again, and damaged lines; return the others.

    `expected`: how many lines there were when that step's state was saved; a warning says if some are missing.
    """
    rows = [row for row in read(path.parent) if row["step"] <= step] if step else []
    check_lines(path.parent, rows, step, expected)
    if path.exists():
        store(path, rows)
    return rows


def check_lines(run: Path, rows: Sequence[Mapping[str, float]], step: int, expected: int | None) -> None:
    """Warn if a run has fewer lines up to a step than there were when that step's state was saved."""
    found = sum(row["step"] <= step for row in rows)
    if expected is not None and found < expected:
        log.warning(
            "%s lacks %d of the %d lines up to step %d; its curves have a gap",
            run / "metrics.jsonl",
            expected - found,
            expected,
            step,
        )


def store(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replace the file by these lines atomically, unless it has them already."""
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if text != path.read_bytes():
        with atomic_write(path) as part:
            part.write_bytes(text)


class Clock:
    """Measures the time a step takes on the device, between readings of finished steps; `pause` excludes other work."""

    def __init__(self, amount: int, unit: str, flops: float | None, peak: float | None):
        """`amount`: tokens or examples (`unit`) per step; `flops`: model FLOPs per step; `peak`: total FLOP/s."""
        self.amount, self.unit, self.flops, self.peak = amount, unit, flops, peak
        self.seconds = self.waited = 0.0
        self.steps = 0
        self.last: float | None = None
        self.rate: float | None = None

    def tick(self, waited: float) -> None:
        """Record that a step has finished on the device; the loop waited this many seconds for its data."""
        now = time.perf_counter()
        if self.last is not None:
            self.seconds += now - self.last
            self.waited += waited
            self.steps += 1
            fresh = (now - self.last) / self.amount
            self.rate = 1 / (0.9 / self.rate + 0.1 * fresh) if self.rate else 1 / fresh
        self.last = now

    def pause(self) -> None:
        """Exclude the next step's time, because something else runs before it."""
        self.last = None

    def read(self) -> dict[str, float]:
        """Return means since the last reading; empty before the first whole step."""
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
    """Peak memory in GiB: of the first local device if it reports it, else of this process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30


def main_metrics(values: Mapping[str, float]) -> dict[str, float]:
    """The metrics that fit on one line: the first four of the whole set, none of single classes or groups.

    The parts of a loss come behind all others.
    """
    whole = [(name, value) for name, value in values.items() if name.count("/") == 1]
    return dict(sorted(whole, key=lambda each: each[0].endswith("_loss"))[:4])
