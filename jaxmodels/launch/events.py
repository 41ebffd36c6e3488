"""The events of a run, in its `events.jsonl`, which the supervisors of all its nodes write.

Each line is a JSON object with `time` (Unix seconds), `event`, `host`, and `rank`, `phase` and `step`, null where
unknown, and the fields of its kind of event.
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
    "unsaved",  # a checkpoint could not be written, and the run continues: message
    "slow",  # a rank, or all of them, slow down the steps: kind (slow | starved), factor, since; until: it has ended
    "failed",  # of an attempt: kind, message, device, stacks; leader: the supervisor of node 0 is gone
    "restart",  # after a failure: attempt, fruitless
    "shrunk", "grown",  # the next attempt has fewer or more nodes: nodes, processes
    "preempted",  # stopped by a signal, after saving
    "mistake", "done", "cancelled",  # the end of the job
]  # fmt: skip
Kind = Literal[
    "died", "killed", "memory", "raised", "frozen", "link", "stuck", "slow", "not-finite", "starved",
]  # fmt: skip
"""Kinds of failures and of slow steps."""
NAMES = get_args(Name)
KINDS = get_args(Kind)


def append(run: Path, event: Name, **fields: Any) -> dict[str, Any]:
    """Append an event to a run in a single write, so that lines of several hosts never mix; return the event.

    `time` is now unless it is given.
    """
    row = {"time": time.time(), "event": event, "rank": None, "host": socket.gethostname(), "phase": None, "step": None}
    row |= fields
    line = (json.dumps(row) + "\n").encode()
    run.mkdir(parents=True, exist_ok=True)
    file = os.open(run / FILE, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(file).st_size
        # a last line without its end is torn: its writer was killed, or the disk was full
        if size and os.pread(file, 1, size - 1) != b"\n":
            line = b"\n" + line
        os.write(file, line)
    finally:
        os.close(file)
    return row


def read(run: Path) -> list[dict[str, Any]]:
    """Return the events of a run in the order of their lines, without torn lines and unknown events."""
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
