"""Where a run's wall time goes: the clock of the trainer, and `phases.jsonl`, in which the run records it.

An attempt is one process (rank 0) that works on a run. It adds lines to the file: one at each save, which stays, and a
last one that is rewritten each second, so that after a kill the file is right to about a second.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, get_args

import jax

FILE = "phases.jsonl"
Phase = Literal["start", "restore", "compile", "step", "data", "evaluation", "save", "idle"]
"""The phases of a trainer. In `data` the devices had nothing to do for want of a batch."""
PHASES: tuple[Phase, ...] = get_args(Phase)

_WIDTH = 1024  # bytes of a line, padded with blanks, so that the last one can be rewritten in place
_EVERY = 1.0  # seconds
_NOTICED = 1e-3  # seconds of a wait for data from which on the next one is looked at closely


class Phases:
    """The clock of one attempt: each second of the main thread belongs to one phase."""

    def __init__(self, began: float | None = None, tell: Callable[[Phase, int], Any] = lambda phase, step: None):
        """`began`: Unix seconds when the process started, by default now; `tell` is called at each change of phase."""
        now = time.time()
        self.began = now if began is None else min(began, now)
        self.step = 0
        """Steps done."""
        self.first: int | None = None
        """Steps that were done when this attempt's loop began; None if it has not begun."""
        self.saved: int | None = None
        """Step of the newest complete checkpoint that this attempt has written or started from."""
        self.ended: str | None = None
        """How the attempt ended; None if it has not, or had no time to record it."""
        self.phase: Phase = "start"
        self._tell = tell
        self._origin = time.perf_counter() - (now - self.began)
        self._since = self._origin
        self._seconds: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)
        self._read = 0.0  # of `step`, when the newest step was known to be done
        self._lock = threading.Lock()
        self._compiled: list[tuple[float, float]] = []
        self._record: _Record | None = None

    # ---- marking

    def enter(self, phase: Phase) -> None:
        """Count the time from now on to this phase."""
        with self._lock:
            now = time.perf_counter()
            self._seconds[self.phase] += now - self._since
            self.phase, self._since = phase, now
            self._compiled.clear()
        self._tell(phase, self.step)

    @contextlib.contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Count the time within the context to this phase, and afterwards to the phase before it."""
        before = self.phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def begin(self, step: int) -> None:
        """Record that the loop begins, and how many steps are done."""
        self.first = self.step = step
        self.enter("step")

    def done(self, step: int) -> None:
        """Record how many steps the devices have done by now."""
        with self._lock:
            self.step = step
            self._read = self._shown()["step"]

    def move(self, seconds: float, source: Phase, target: Phase) -> None:
        """Move seconds from one phase to another."""
        with self._lock:
            self._seconds[source] -= seconds
            self._seconds[target] += seconds

    def compiled(self, seconds: float) -> None:
        """Note that the main thread has traced or compiled for so long until now, in another phase than `compile`."""
        end = time.perf_counter()
        begin, known = max(end - seconds, self._since), 0.0
        while self._compiled and self._compiled[-1][0] >= begin:  # traced within what has been traced
            earlier = self._compiled.pop()
            known += earlier[1] - earlier[0]
        self._compiled.append((begin, end))
        if self.phase != "compile":
            self.move(end - begin - known, self.phase, "compile")

    # ---- reading

    def seconds(self) -> dict[Phase, float]:
        """Return the seconds of each phase until now; they add up to the attempt's time."""
        with self._lock:
            return self._shown()

    def _shown(self) -> dict[Phase, float]:
        shown = dict(self._seconds)
        shown[self.phase] += time.perf_counter() - self._since
        return shown

    def line(self) -> dict[str, Any]:
        """Return what is recorded: times, steps and the current phase.

        `open` seconds at the end of `step` are of a step that is not known to be done.
        """
        with self._lock:
            shown = self._shown()
            return {
                "began": round(self.began, 3),
                "time": round(self.began + sum(shown.values()), 3),
                "first": self.first,
                "step": self.step,
                "saved": self.saved,
                "phase": self.phase,
                "open": round(shown["step"] - self._read, 3),
                "ended": self.ended,
                "seconds": {name: round(value, 3) for name, value in shown.items()},
            }

    # ---- keeping

    @contextlib.contextmanager
    def watched(self) -> Iterator[Phases]:
        """Count JAX's compilations in this thread, and at the end of the context record how the attempt ended."""
        main = threading.get_ident()

        def heard(event: str, duration_secs: float, **kwargs: Any) -> None:
            if event.startswith("/jax/core/compile/") and threading.get_ident() == main:
                self.compiled(duration_secs)

        jax.monitoring.register_event_duration_secs_listener(heard)
        try:
            yield self
        except BaseException as error:
            self.ended = self.ended or f"failed: {type(error).__name__}"
            raise
        finally:
            jax.monitoring.unregister_event_duration_listener(heard)
            if self._record is not None:
                self._record.close()

    def record(self, run: Path, **facts: Any) -> None:
        """Record this attempt in the run's file from now on, with facts such as where it runs."""
        self._record = _Record(run, self.line, {"host": socket.gethostname()[:64], **facts})

    def keep(self) -> None:
        """Keep a line for the state of a step, which is about to be saved."""
        if self._record is not None:
            self._record.keep()


class _Record:
    """The last line of the file, which a thread rewrites each second until the line is kept and the next one begins."""

    def __init__(self, run: Path, line: Callable[[], Mapping[str, Any]], facts: Mapping[str, Any]) -> None:
        self.line, self.facts = line, facts
        self.lock, self.closed = threading.Lock(), threading.Event()
        self.file = -1
        with contextlib.suppress(OSError):  # a record that cannot be written ends no run
            self.file = os.open(run / FILE, os.O_RDWR | os.O_CREAT, 0o666)
        self.at = self._end()
        self.write()
        self.thread = threading.Thread(target=self._go_on, name="jaxmodels-phases", daemon=True)
        self.thread.start()

    def _end(self) -> int:
        """Return where the next line goes: after everything in the file, even a torn line."""
        size = os.fstat(self.file).st_size if self.file >= 0 else 0
        end = -(-size // _WIDTH) * _WIDTH
        if end > size:
            with contextlib.suppress(OSError):
                os.pwrite(self.file, b"\n".rjust(end - size), size)
        return end

    def write(self) -> None:
        with self.lock, contextlib.suppress(OSError):
            text = json.dumps({**self.line(), **self.facts})
            if self.file >= 0 and len(text) < _WIDTH:
                os.pwrite(self.file, f"{text:{_WIDTH - 1}}\n".encode(), self.at)

    def keep(self) -> None:
        self.write()
        self.at += _WIDTH

    def close(self) -> None:
        self.closed.set()
        self.thread.join()
        self.write()
        if self.file >= 0:
            os.close(self.file)
            self.file = -1

    def _go_on(self) -> None:
        while not self.closed.wait(_EVERY):
            self.write()


def read(run: Path) -> list[dict[str, Any]]:
    """Read the lines of a run's `phases.jsonl` in order, without torn ones."""
    path = run / FILE
    if not path.is_file():
        return []
    rows = []
    for line in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and _whole(row):
            rows.append(row)
    return rows


def _whole(row: Mapping[str, Any]) -> bool:
    def number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool)

    seconds = row.get("seconds")
    return (
        isinstance(seconds, dict)
        and all(number(seconds.get(name)) for name in PHASES)
        and all(number(row.get(name)) for name in ("began", "time", "step", "open"))
    )


class Starved:
    """Measures how long devices had nothing to do while the loop waited for a batch.

    A wait during which they still worked on the step before costs nothing. When that step ended is known only by
    waiting for it, which a thread does if the last wait was noticeable. So the first of several waits counts in full,
    unless the step was still running after it.
    """

    def __init__(self) -> None:
        self.pool: ThreadPoolExecutor | None = None
        self.noticed = False
        self.ended: Future[float] | None = None

    def dispatched(self, metrics: Any) -> None:
        """Note that a step was dispatched, which will give these metrics."""
        self.ended = None
        if self.noticed:
            self.pool = self.pool or ThreadPoolExecutor(1, thread_name_prefix="jaxmodels-device")
            self.ended = self.pool.submit(_end_of, metrics)

    def wait(self, since: float, metrics: Any | None) -> float:
        """Return the seconds without work for the devices since the batch that has come now was asked for.

        `metrics`: those of the step before; None if they had been waited for.
        """
        now = time.perf_counter()
        self.noticed = now - since > _NOTICED
        if metrics is None or not self.noticed:
            return now - since
        arrays: list[Any] = [leaf for leaf in jax.tree.leaves(metrics) if isinstance(leaf, jax.Array)]
        if not all(array.is_ready() for array in arrays):
            return 0.0
        if self.ended is None:
            return now - since
        return max(0.0, now - max(since, self.ended.result()))

    def close(self) -> None:
        """End the thread."""
        if self.pool is not None:
            self.pool.shutdown()


def _end_of(metrics: Any) -> float:
    with contextlib.suppress(Exception):  # the loop meets the error when it reads them
        jax.block_until_ready(metrics)
    return time.perf_counter()
