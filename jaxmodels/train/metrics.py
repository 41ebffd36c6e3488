"""What a run reports: one line a step in metrics.jsonl, TensorBoard events, and the progress display."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxmodels.config import MetricsConfig
from jaxmodels.train.manifest import whole

log = logging.getLogger("jaxmodels")

_EVENTS_SECONDS = 30  # how old a running TensorBoard may be


class Writer:
    """metrics.jsonl and TensorBoard events of a run; each step is one line, written when the next one begins."""

    def __init__(self, run: Path, cfg: MetricsConfig, start: int, expected: int | None = None):
        """`expected`: how many lines there were when the state of step `start` was saved, where that is known."""
        self.path = run / "metrics.jsonl"
        self.row: dict[str, Any] = {}
        before = rewind(self.path, start, expected)
        self.written: dict[str, Any] = before[-1] if before else {}
        self.count = len(before)
        self.unwritten = b""
        self.file = self.path.open("ab", buffering=0)
        self.events = Events(run / "tensorboard", start) if cfg.tensorboard else None

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Values of a step; steps must not go back."""
        if self.row and self.row["step"] != step:
            self.flush()
        self.row = {"step": step, **self.row, **values}

    def flush(self) -> None:
        """Write the step's line out."""
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
        if self.events is not None:
            self.events.add(self.row)
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

    def sync(self) -> None:
        """Have everything on the disk, so that a checkpoint of this step never lacks its line."""
        self.flush()
        with contextlib.suppress(OSError):
            os.fsync(self.file.fileno())
        if self.events is not None:
            self.events.flush()

    def close(self) -> None:
        self.flush()
        self.file.close()
        if self.events is not None:
            self.events.flush()


class Events:
    """TensorBoard events, written at once: tensorboardX's own thread dies of a full disk and then hangs the run."""

    def __init__(self, folder: Path, start: int):
        self.folder, self.start = folder, start
        self.file: Any = None
        self.flushed = 0.0
        self.failed = False

    def add(self, row: Mapping[str, float]) -> None:
        """The values of a step."""
        if not self.failed:
            with self.reported():
                self.write(row)

    def write(self, row: Mapping[str, float]) -> None:
        # tensorboardX imports torch where it is installed: a second and 200 MB, for nothing that is used here
        blocked = "torch" not in sys.modules
        if blocked:
            sys.modules["torch"] = None  # type: ignore[assignment]
        try:
            self.append(row)
        finally:
            if blocked:
                del sys.modules["torch"]

    def append(self, row: Mapping[str, float]) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboardX.summary import scalar

        if self.file is None:
            self.folder.mkdir(exist_ok=True)
            self.file = EventsWriter(str(self.folder / "events"))
            if self.start:
                # TensorBoard forgets what a killed run wrote beyond the checkpoint
                again = SessionLog(status=SessionLog.START)
                self.file.write_event(Event(wall_time=time.time(), step=self.start + 1, session_log=again))
        for name, value in row.items():
            if name != "step":
                summary = scalar(name, value)
                self.file.write_event(Event(wall_time=time.time(), step=int(row["step"]), summary=summary))
        if time.monotonic() - self.flushed > _EVENTS_SECONDS:
            self.flush()

    def flush(self) -> None:
        """To the disk."""
        if self.file is not None and not self.failed:
            with self.reported():
                self.file.flush()
            self.flushed = time.monotonic()

    @contextlib.contextmanager
    def reported(self) -> Iterator[None]:
        """A failure ends the events (half a record may be in the file), not the run."""
        try:
            yield
        except OSError as error:
            self.failed = True
            log.error("TensorBoard events in %s end here: %s; metrics.jsonl goes on", self.folder, error.strerror)


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
    if expected is not None and len(rows) < expected:
        log.warning(
            "%s lacks %d of the %d lines up to step %d; the run goes on, its curves have a hole",
            path,
            expected - len(rows),
            expected,
            step,
        )
    if path.exists():
        store(path, rows)
    return rows


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


class Display:
    """Progress for a person: live on a terminal, else a line each time metrics are written."""

    def __init__(self, kind: str, steps: int, unit: str):
        self.unit = unit
        if kind == "auto":
            kind = "live" if sys.stdout.isatty() else "plain"
        self.plain = kind == "plain"
        self.live: Any = None
        self.status = "compiling"
        if kind == "live":
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self.live = Progress(
                TextColumn("[bold]step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[shown]}"),
                TextColumn("left"),
                TimeRemainingColumn(),
                refresh_per_second=2,
            )
            self.task = self.live.add_task("train", total=steps, shown=self.status)
        self.steps = steps
        self.began: tuple[int, float] | None = None
        self.held = ""

    def __enter__(self) -> Display:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    @property
    def shows(self) -> bool:
        """Whether what is said is seen."""
        return self.plain or self.live is not None

    def say(self, text: str, failed: bool = False) -> None:
        """A line of its own, above the live display; of what failed, where errors go."""
        if self.live:
            self.live.console.print(text, highlight=False, markup=False)
        elif self.plain:
            print(text, file=sys.stderr if failed else sys.stdout, flush=True)

    def update(self, step: int, loss: float, rate: float | None) -> None:
        """The live display after a step."""
        if self.live:
            speed = f"{rate:,.0f} {self.unit}/s" if rate else ""
            self.live.update(self.task, completed=step, shown=f"loss {loss:.4f}  {speed}{self.held}")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """The values of a step as a plain line, and what was evaluated beside the live bar."""
        if held := values.get("eval/loss"):
            self.held = f"  eval {held:.4f}"
        if not self.plain:
            return
        now = time.perf_counter()
        self.began = self.began or (step, now)
        done, spent = step - self.began[0], now - self.began[1]
        parts = [f"step {step}/{self.steps}"]
        losses = [name for name in values if name.startswith("train/") and name.endswith("loss")]
        parts += [f"{name.removeprefix('train/').replace('/', ' ')} {values[name]:.4f}" for name in losses]
        parts += [f"{name} {value:.4f}" for name, value in main(values).items() if name.startswith("eval/")]
        if rate := values.get(f"perf/{self.unit}_per_second"):
            parts.append(f"{rate:,.0f} {self.unit}/s")
        if done and step < self.steps:
            left = int(spent / done * (self.steps - step))
            parts.append(f"left {left // 60}:{left % 60:02d}")
        print("  ".join(parts), flush=True)
