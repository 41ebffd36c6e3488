"""Watch what a served classifier sees and says: windows of sampled records, each compared with a reference."""

from __future__ import annotations

import dataclasses
import json
import logging
import queue
import random
import sys
import threading
import time
from collections.abc import Sequence

import numpy as np

from jaxmodels.errors import UserError
from jaxmodels.serve import monitor, window
from jaxmodels.serve.classes import Row
from jaxmodels.serve.drift import Test
from jaxmodels.serve.opened import Opened
from jaxmodels.serve.window import Window

log = logging.getLogger("jaxmodels")
AHEAD = 8
"""Batches that may wait to be looked at; more are left out, so that nobody waits for this."""
Batch = tuple[Sequence[Row], np.ndarray]
"""Records as the model takes them, and their probabilities, (B, K)."""


class Watch:
    """Compares one window of records after the other with a reference, in a thread of its own."""

    def __init__(self, name: str, reference: Window, classes: int, rows: int = 500, share: float = 1.0) -> None:
        """Windows have `rows` records; `share` is the probability with which a record is taken."""
        # labels come later, and what cannot be read is refused before it is seen here
        self.reference = dataclasses.replace(reference, labels=None, groups=None, unreadable=0)
        self.name, self.classes, self.rows, self.share = name, classes, rows, share
        self.tests: Sequence[Test] = ()
        """Those of the last whole window."""
        self.windows = self.alarms = 0
        """Windows that were compared, and those with an alarm."""
        self._random = random.Random(0)
        self._seen: queue.Queue[Batch | None] = queue.Queue(AHEAD)
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread after what it has been shown."""
        self._seen.put(None)
        self._thread.join(timeout=60)

    def see(self, rows: Sequence[Row], shares: np.ndarray) -> None:
        """Take note of some of these records."""
        taken = [i for i, row in enumerate(shares) if np.isfinite(row).all() and self._random.random() < self.share]
        if not taken:
            return
        try:
            self._seen.put_nowait(([rows[i] for i in taken], shares[taken]))
        except queue.Full:
            log.debug("records came too fast to be watched")

    def _run(self) -> None:
        held: list[Window] = []
        while (batch := self._seen.get()) is not None:
            try:
                rows, shares = batch
                held.append(Window(window.describe(rows), shares, 0))
                while sum(map(len, held)) >= self.rows:
                    whole = _joined(held)
                    self._compare(_cut(whole, 0, self.rows))
                    held = [_cut(whole, self.rows, len(whole))]
            except Exception:  # answers go on whatever becomes of this
                log.exception("a window could not be compared")
                held = []

    def _compare(self, current: Window) -> None:
        tests = monitor.compare(self.reference, current, self.classes)
        alarms = [test.name for test in tests if test.alarm]
        self.tests, self.windows, self.alarms = tests, self.windows + 1, self.alarms + bool(alarms)
        if alarms:
            line = {"time": round(time.time(), 3), "event": "drift", "model": self.name, "alarms": alarms}
            print(json.dumps(line, ensure_ascii=False), file=sys.stderr, flush=True)


def _joined(windows: Sequence[Window]) -> Window:
    features = {name: np.concatenate([each.features[name] for each in windows]) for name in windows[0].features}
    return Window(features, np.concatenate([each.probabilities for each in windows]), 0)


def _cut(whole: Window, first: int, last: int) -> Window:
    return Window({name: x[first:last] for name, x in whole.features.items()}, whole.probabilities[first:last], 0)


def open_watches(given: Sequence[str], opened: Sequence[Opened], rows: int, share: float) -> dict[str, Watch]:
    """Read the references in NAME=FILE, each as `jaxmodels monitor` reads it; return watches by the models' names.

    Raises:
        UserError: one is not of this form, or for no run that predicts one class, or its file cannot be read.
    """
    found: dict[str, Watch] = {}
    for each in given:
        name, _, place = each.partition("=")
        classes = next((one.classes for one in opened if one.name == name), None)
        if not place or name in found:
            raise UserError(
                f"got --monitor {each}, expected NAME=FILE, once a model, try {opened[0].name}=reference.csv"
            )
        if classes is None or classes.run is None or classes.several:
            raise UserError(
                f"got --monitor {each}, expected the name of a run that predicts one class of a record, "
                "try jaxmodels monitor for others"
            )
        found[name] = Watch(name, window.read(classes.run, place, "", ""), len(classes.names), rows, share)
    return found
