"""Messages between supervisors: lines of JSON over TCP, from every node to node 0 and back."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from jaxmodels.launch.ranks import Assignment
from jaxmodels.launch.seen import Frame, Seen

LOST_SECONDS = 10.0
"""Seconds without a message after which a node's link counts as down; JAX's own heartbeat gives up after 15 s."""
_ANSWER_SECONDS = 5.0
_KILL_SECONDS = 15.0
_LONGEST_LINE = 2**24

Message = dict[str, Any]


class Link:
    """A connection: `send` sends messages, and `heard` is called with those that come, or with None at the end."""

    def __init__(self, connection: socket.socket, heard: Callable[[Link, Message | None], object]) -> None:
        self.connection, self.heard = connection, heard
        self.last = time.monotonic()
        connection.settimeout(None)
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._lock = threading.Lock()
        threading.Thread(target=self._listen, daemon=True).start()

    def send(self, message: Message) -> None:
        """Send a message, or drop it if the link is down, which the receiving side notices."""
        with self._lock, contextlib.suppress(OSError):
            self.connection.settimeout(_ANSWER_SECONDS)
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def close(self) -> None:
        """End the connection."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()

    def silent(self) -> float:
        """Seconds since the last message came."""
        return time.monotonic() - self.last

    def _listen(self) -> None:
        rest = b""
        while True:
            try:
                data = self.connection.recv(65536)
            except TimeoutError:
                continue
            except (OSError, ValueError):
                data = b""
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                try:
                    message = json.loads(line)
                except ValueError:
                    message = None
                if not isinstance(message, dict):  # the sender is no supervisor
                    data = b""
                    break
                self.last = time.monotonic()
                self.heard(self, message)
            if not data or len(rest) > _LONGEST_LINE:
                self.heard(self, None)
                return


class Remote:
    """Another node, as node 0 sees it; it does for that node what `Here` does for its own."""

    def __init__(self, link: Link, hello: Message, changed: Callable[[], object]) -> None:
        """`changed` is called, in another thread, when one of its ranks or the link has ended."""
        self.link, self._changed = link, changed
        self.node, self.host, self.processes = int(hello["node"]), str(hello["host"]), int(hello["processes"])
        self.lost = ""
        """Why the node counts as lost; empty if it does not."""
        self.refused = ""
        """The user's mistake that keeps the node from starting its ranks."""
        self._seen: list[Seen] = []
        self._received = time.monotonic()
        self._attempt = -1
        self._stacks: dict[int, list[Frame]] | None = None
        self._killed = threading.Event()
        self._answered = threading.Event()
        link.heard = lambda _, message: self.take(message)

    def take(self, message: Message | None) -> None:
        """Handle a message from the node."""
        if message is None:
            self.lost = self.lost or "died"
            self._answered.set()
            self._killed.set()
            self._changed()
            return
        if message.get("attempt") != self._attempt:  # about ranks of an earlier attempt
            return
        if "seen" in message:
            before = {one.rank for one in self._seen if one.code is not None}
            self._seen, self._received = [Seen(**one) for one in message["seen"]], time.monotonic()
            if any(one.code is not None and one.rank not in before for one in self._seen):
                self._changed()
        if "stacks" in message:
            self._stacks = {int(rank): [tuple(f) for f in stack] for rank, stack in message["stacks"].items()}
            self._answered.set()
        if "killed" in message:
            self._killed.set()
        if "mistake" in message:
            self.refused = str(message["mistake"])
            self._changed()

    def start(self, given: Assignment) -> None:
        """Tell the node to start its ranks."""
        self._attempt, self._seen, self.refused = given.attempt, [], ""
        self._killed.clear()
        self._seen = [Seen(given.first + i, self.host, "") for i in range(self.processes)]
        self._received = time.monotonic()
        self.link.send({"do": "start", **dataclasses.asdict(given)})

    def seen(self) -> list[Seen]:
        """Return the state of each of its ranks, as last reported."""
        later = time.monotonic() - self._received
        return [
            dataclasses.replace(one, age=one.age + later, ended=one.ended + later * (one.code is not None))
            for one in self._seen
        ]

    def ask(self) -> None:
        """Ask for the stacks of its ranks' main threads."""
        self._answered.clear()
        self._stacks = None
        self.link.send({"do": "stacks"})

    def stacks(self) -> dict[int, list[Frame]]:
        """Wait for the answer."""
        if not self.lost:
            self._answered.wait(_ANSWER_SECONDS)
        return self._stacks or {}

    def tell(self) -> None:
        """Tell its ranks to save and stop."""
        self.link.send({"do": "tell"})

    def kill(self) -> None:
        """Kill its ranks, and wait until they have ended."""
        if not self.lost:
            self.link.send({"do": "kill"})
            self._killed.wait(_KILL_SECONDS)


class Door:
    """The port on which node 0 accepts other nodes."""

    def __init__(self, port: int, heard: Callable[[Link, Message | None], object]) -> None:
        self._heard = heard
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        self._socket = socket.create_server(
            ("", port), family=family, dualstack_ipv6=family == socket.AF_INET6, backlog=1024
        )
        threading.Thread(target=self._open, daemon=True).start()

    def _open(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            Link(connection, self._heard)

    def close(self) -> None:
        """Stop accepting connections."""
        self._socket.close()
