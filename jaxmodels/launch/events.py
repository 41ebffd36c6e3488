"""What happened to a run: one JSON line an event in its `events.jsonl`, whoever writes it.

Every line has `time` (Unix seconds), `event`, `host`, and `rank`, `phase` and `step`, null where the event has none;
further fields are the event's own.
"""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any, Literal, get_args

FILE = "events.jsonl"
Name = Literal[
    "start",  # of an attempt: attempt, processes, nodes, devices, job
    "phase",  # the run as a whole has entered another phase: attempt
    "saved",  # a checkpoint is complete
    "unsaved",  # one could not be written, and the run goes on: message
    "slow",  # a rank, or the whole, holds up the steps: kind (slow | starved), factor, since; until: not any more
    "failed",  # kind, and why; device, stacks; leader: it is the supervisor of node 0
    "restart",  # after a failure: attempt, fruitless
    "shrunk", "grown",  # the next attempt has fewer or more nodes: nodes, processes
    "preempted",  # told to stop by a signal; what was done is saved
    "mistake", "done", "cancelled",  # the end
]  # fmt: skip
Kind = Literal[
    "died", "killed", "memory", "raised", "frozen", "link", "stuck", "slow", "not-finite", "starved",
]  # fmt: skip
"""What a failure was."""
NAMES = get_args(Name)
KINDS = get_args(Kind)


def append(run: Path, event: Name, **fields: Any) -> dict[str, Any]:
    """Add an event to a run, at one blow, so that writers on several hosts never mix; returns it.

    `time` is now unless it is given.
    """
    row = {"time": time.time(), "event": event, "rank": None, "host": socket.gethostname(), "phase": None, "step": None}
    row |= fields
    line = (json.dumps(row) + "\n").encode()
    run.mkdir(parents=True, exist_ok=True)
    file = os.open(run / FILE, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":  # a writer was killed, or the disk was full, within its line
            line = b"\n" + line
        os.write(file, line)
    finally:
        os.close(file)
    return row


def read(run: Path) -> list[dict[str, Any]]:
    """The events of a run in the order of their lines; what is torn or no event is passed over."""
    path = run / FILE
    if not path.is_file():
        return []
    rows = []
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and row.get("event") in NAMES and isinstance(row.get("time"), int | float):
            rows.append(row)
    return rows
