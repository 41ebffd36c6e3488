"""Start and end this node's ranks, as its own supervisor demands."""

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
    """The ranks of this node, attempt after attempt."""

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
        """Check that this machine can start its ranks.

        Raises:
            UserError: it has too few devices, or the numbers do not fit.
        """
        environments(self.processes, self.devices, self.platform, Assignment(0, 0, 1, where.coordinator))

    def start(self, given: Assignment) -> None:
        """Start this node's ranks. `--resume never` holds for the first attempt only; later ones resume the run."""
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
        """Return the current state of each rank."""
        return [] if self._ranks is None else self._ranks.seen()

    def ask(self) -> None:
        """Collect the stacks of the main threads; `stacks` returns them."""
        self._stacks = {} if self._ranks is None else self._ranks.stacks()

    def stacks(self) -> dict[int, list[Frame]]:
        """Return the stacks that `ask` collected, by rank."""
        return self._stacks

    def run(self) -> Path | None:
        """Return the run directory, once rank 0 has reported it."""
        return None if self._ranks is None else self._ranks.run()

    def unsaved(self) -> dict[str, Any] | None:
        """Return step, message and time of the newest checkpoint that rank 0 failed to write."""
        return None if self._ranks is None else self._ranks.unsaved()

    def tell(self) -> None:
        """Tell the ranks to save and stop."""
        if self._ranks is not None:
            self._ranks.tell()

    def kill(self) -> None:
        """Kill the ranks and every process that they started."""
        if self._ranks is not None:
            self._ranks.kill()
