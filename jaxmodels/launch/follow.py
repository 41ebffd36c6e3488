"""The supervisor of a node other than node 0: it follows node 0's supervisor and reports the state of its ranks."""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import socket
import time
from pathlib import Path
from typing import Any

from jaxmodels.errors import ExitCode, UserError
from jaxmodels.launch.cluster import Cluster
from jaxmodels.launch.events import append
from jaxmodels.launch.here import Here
from jaxmodels.launch.ranks import Assignment
from jaxmodels.launch.signals import handled
from jaxmodels.launch.wire import LOST_SECONDS, Link, Message

JOIN_SECONDS = 300.0
"""How long to wait for node 0 at the start: pods and containers of one job start minutes apart."""
RETURN_SECONDS = 60.0
"""How long to wait for a lost node 0: Kubernetes replaces a pod in less, and nothing else restarts node 0 alone."""
_TICK_SECONDS = 1.0

Events = queue.SimpleQueue  # its put() may be called in a signal handler


def follow(here: Here, where: Cluster) -> int:
    """Follow node 0 until the job ends; return the job's exit code.

    If node 0 falls silent, end this node's ranks and try to connect again. If node 0 does not come back, the code is
    75: the job has to be started again, and resumes from its last checkpoint.
    """
    here.node = where.node
    events: Events[Any] = Events()
    here.ended = lambda: events.put(None)
    last_ping: Message | None = None
    with handled(lambda number, _: events.put(number)):
        while (link := _join(here, where, events, JOIN_SECONDS if last_ping is None else RETURN_SECONDS)) is not None:
            last_ping = {}
            code = _serve(here, link, events, last_ping)
            kind = "link" if link.silent() > LOST_SECONDS else "died"
            here.kill()
            link.close()
            if code is not None:
                return code
            here.console.say(f"node 0 ({where.host}) is gone: the ranks here were ended, and it is looked for anew")
            if last_ping.get("heir") and last_ping.get("run"):
                what = "has not been heard of: its link is down" if kind == "link" else "is gone"
                message = f"the supervisor of node 0 ({where.host}) {what}, seen from node {where.node}"
                with contextlib.suppress(OSError):
                    append(Path(last_ping["run"]), "failed", kind=kind, leader=True, message=message)
    here.console.say(f"no supervisor of node 0 at {where.host}:{where.port + 1}")
    if last_ping is None:
        return ExitCode.FAILED
    here.console.say("the job has to be started again, and goes on from its last checkpoint")
    return ExitCode.SAVED


def _join(here: Here, where: Cluster, events: Events[Any], patience: float) -> Link | None:
    """Connect to node 0; return None if it does not answer, or if this node was told to stop meanwhile."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        with contextlib.suppress(queue.Empty):
            while True:
                if isinstance(events.get_nowait(), int):
                    return None
        try:
            connection = socket.create_connection((where.host, where.port + 1), timeout=5.0)
        except OSError:
            time.sleep(0.5)
            continue
        link = Link(connection, lambda link, message: events.put((link, message)))
        link.send({"node": here.node, "host": here.host, "processes": here.processes, "command": here.command[1:]})
        return link
    return None


def _serve(here: Here, link: Link, events: Events[Any], last_ping: Message) -> int | None:
    """Follow node 0's messages until the end; return None if it is gone, with its last ping in `said`."""
    attempt = -1
    due = 0.0
    while True:
        with contextlib.suppress(queue.Empty):
            event = events.get(timeout=max(0.0, due - time.monotonic()))
            if isinstance(event, int):
                here.tell()
            elif event is None:
                due = 0.0  # a rank has ended: report it at once
            elif event[0] is link:
                if event[1] is None:
                    return None
                if event[1].get("do") == "ping":
                    last_ping.update(event[1])
                attempt, code = _obey(here, link, event[1], attempt)
                if code is not None:
                    return code
            if time.monotonic() < due:
                continue
        if link.silent() > LOST_SECONDS:
            return None
        link.send({"attempt": attempt, "seen": [dataclasses.asdict(one) for one in here.seen()]})
        due = time.monotonic() + _TICK_SECONDS


def _obey(here: Here, link: Link, message: Message, attempt: int) -> tuple[int, int | None]:
    """Carry out one message; return the current attempt, and the exit code if the message ended the job."""
    do = message.get("do")
    if do == "start":
        given = Assignment(**{field.name: message[field.name] for field in dataclasses.fields(Assignment)})
        attempt = given.attempt
        try:
            here.start(given)
        except (UserError, OSError) as error:
            link.send({"attempt": attempt, "mistake": str(error)})
    elif do == "stacks":
        here.ask()
        link.send({"attempt": attempt, "seen": [dataclasses.asdict(one) for one in here.seen()]})
        link.send({"attempt": attempt, "stacks": here.stacks()})
    elif do == "tell":
        here.tell()
    elif do == "kill":
        here.kill()
        link.send({"attempt": attempt, "killed": True})
    elif do == "end":
        return attempt, int(message["code"])
    return attempt, None
