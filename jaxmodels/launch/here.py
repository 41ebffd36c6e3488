"""This node, as its own supervisor commands it: its part of an attempt, started and ended."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxmodels.launch.cluster import Cluster
from jaxmodels.launch.console import Console
from jaxmodels.launch.ranks import Assignment, Platform, Ranks, environments
from jaxmodels.launch.seen import Frame, Seen


class Here:
    """The processes of this node in one attempt after another."""

    lost = refused = ""

    def __init__(
        self, command: Sequence[str], processes: int, devices: int | None, platform: Platform, console: Console
    ) -> None:
        self.command, self.console = list(command), console
        self.processes, self.devices = processes, devices
        self.platform: Platform = platform
        self.node, self.host = 0, socket.gethostname()
        self.ended: Callable[[], object] = lambda: None
        """Called, in another thread, when a rank has ended."""
        self._ranks: Ranks | None = None
        self._stacks: dict[int, list[Frame]] = {}

    def check(self, where: Cluster) -> None:
        """Raises UserError where this machine cannot start what it shall."""
        environments(self.processes, self.devices, self.platform, Assignment(0, 0, 1, where.coordinator))

    def start(self, given: Assignment) -> None:
        """Start this node's ranks; where a run was started anew, another attempt goes on with it."""
        self.kill()
        command = self.command
        if given.attempt and "--resume" in command:
            at = command.index("--resume")
            command = [*command[:at], *command[at + 2 :]] if command[at + 1 : at + 2] == ["never"] else command
        if given.attempt:
            command = [word for word in command if word != "--resume=never"]
        self.console.begin(given.count)
        each = environments(self.processes, self.devices, self.platform, given)
        self._ranks = Ranks(command, each, given.first, self.console, self.ended)

    def seen(self) -> list[Seen]:
        """How each of them is now."""
        return [] if self._ranks is None else self._ranks.seen()

    def ask(self) -> None:
        """Ask where their main threads stand."""
        self._stacks = {} if self._ranks is None else self._ranks.stacks()

    def stacks(self) -> dict[int, list[Frame]]:
        """The answer."""
        return self._stacks

    def run(self) -> Path | None:
        """The directory of the run, once rank 0 has said it."""
        return None if self._ranks is None else self._ranks.run()

    def unsaved(self) -> dict[str, Any] | None:
        """The newest checkpoint that rank 0 could not write."""
        return None if self._ranks is None else self._ranks.unsaved()

    def tell(self) -> None:
        """Tell them to save and stop."""
        if self._ranks is not None:
            self._ranks.tell()

    def kill(self) -> None:
        """Kill them and every process they started."""
        if self._ranks is not None:
            self._ranks.kill()
