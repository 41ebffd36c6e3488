"""The supervisor of node 0: it starts attempts of a job on all nodes until the job is done or given up."""

from __future__ import annotations

import math
import queue
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxmodels.errors import ExitCode
from jaxmodels.launch.cluster import Cluster
from jaxmodels.launch.follow import JOIN_SECONDS, Events
from jaxmodels.launch.here import Here
from jaxmodels.launch.limits import Limits, Overdue
from jaxmodels.launch.ranks import Assignment
from jaxmodels.launch.seen import Frame, Seen, grouped
from jaxmodels.launch.signals import handled
from jaxmodels.launch.story import Story
from jaxmodels.launch.watch import FROZEN_SECONDS, GOOD, Failure, first_failure
from jaxmodels.launch.wire import LOST_SECONDS, Door, Link, Message, Remote

# The other ranks fail moments after the first; a short wait shows which one that was.
_SETTLE_SECONDS = 1.0
# Ranks end together: one that still runs this long after another has ended is taken to be stuck.
_LEAVE_SECONDS = 60.0
_TICK_SECONDS = 1.0
# A job that its scheduler keeps restarting is given up after this many attempts without a newer checkpoint.
_ATTEMPTS = 3


@dataclass
class _Outcome:
    """How an attempt ended."""

    code: int | None
    """Exit code of the job; None: another attempt follows."""
    failure: Failure | None = None


class Leader:
    """Runs the attempts of a job on its nodes."""

    def __init__(self, here: Here, where: Cluster, restarts: int, min_nodes: int, grace: float) -> None:
        self.here, self.where, self.restarts, self.min_nodes, self.grace = here, where, restarts, min_nodes, grace
        self.events: Events[Any] = Events()
        self.limits, self.story = Limits(), Story()
        self.remotes: dict[int, Remote] = {}
        self.planned = 0
        """Number of ranks when no node is missing."""
        self.stopping = False
        self.growing = False
        """Whether the current attempt was told to stop because a node has come back."""
        self.cancelled = False
        """A second Ctrl-C ended the ranks before they had saved."""
        here.ended = lambda: self.events.put(None)

    def lead(self) -> int:
        """Run the job; return its exit code."""
        door, code = None, int(ExitCode.FAILED)
        with handled(lambda number, _: self.events.put(number)):
            try:
                if self.where.nodes > 1:
                    door = Door(self.where.port + 1, lambda link, message: self.events.put((link, message)))
                code = self._attempts()
            finally:
                if door is not None:
                    door.close()
                for remote in self.remotes.values():
                    remote.link.send({"do": "end", "code": code})
        return code

    def _attempts(self) -> int:
        attempt = fruitless = 0
        best, nodes, least = -1, self.where.nodes, self.where.nodes
        while True:
            crew = self._gather(JOIN_SECONDS, least)
            self.growing = False
            if crew is None:
                if self.stopping:  # the last checkpoint has all progress
                    self.story.tell("preempted")
                    return ExitCode.SAVED
                self.story.tell("failed", kind="link", message="nodes are missing")
                return ExitCode.FAILED
            processes = sum(one.processes for one in crew)
            self.planned = max(self.planned, processes)
            if attempt and len(crew) != nodes:
                self.story.tell("shrunk" if len(crew) < nodes else "grown", nodes=len(crew), processes=processes)
            smaller, nodes = len(crew) < self.where.nodes, len(crew)
            outcome = self._attempt(attempt, crew, processes)
            if (newest := self.story.newest()) > max(best, self.story.found):
                best, fruitless, self.story.earlier = newest, 0, 0
            if outcome.code == ExitCode.SAVED and self._hopeless(fruitless + 1):
                return ExitCode.FAILED
            if outcome.code is not None and not (outcome.code == ExitCode.MISTAKE and smaller):
                return outcome.code
            # a mesh, batch or state that the remaining nodes cannot hold is not a mistake: wait for all nodes
            full = outcome.failure is not None and outcome.failure.kind == "memory"
            least = self.where.nodes if smaller and (full or outcome.code == ExitCode.MISTAKE) else self.min_nodes
            if outcome.failure is not None:
                fruitless += 1
                if fruitless + self.story.earlier > self.restarts:
                    if self.restarts:
                        self.here.console.say(f"given up after {self.restarts} restarts without progress")
                    return ExitCode.FAILED
                self.here.console.say(
                    f"restart {fruitless} of {self.restarts} without progress so far, from the last good checkpoint"
                )
                self.story.tell("restart", attempt=attempt + 1, fruitless=fruitless)
            attempt += 1

    def _hopeless(self, fruitless: int) -> bool:
        """Whether to end the job because too many attempts, here or under earlier supervisors, saved nothing newer."""
        count = fruitless + self.story.earlier
        if count <= max(self.restarts, _ATTEMPTS) or not self.story.job:
            return False
        self.here.console.say(f"given up: {count} attempts of job {self.story.job} came to no newer checkpoint")
        return True

    def _gather(self, patience: float, least: int) -> list[Here | Remote] | None:
        """Wait for nodes; return those connected, node 0 first, or None if there are too few or on a signal to stop."""
        deadline, warned = time.monotonic() + patience, False
        while True:
            self.remotes = {node: one for node, one in self.remotes.items() if not one.lost}
            crew: list[Here | Remote] = [self.here, *(self.remotes[node] for node in sorted(self.remotes))]
            if len(crew) >= least or self.stopping:
                return None if self.stopping else crew
            left = deadline - time.monotonic()
            if left <= 0:
                missing = sorted({*range(1, self.where.nodes)} - set(self.remotes))
                self.here.console.say(f"got {len(crew)} of {self.where.nodes} nodes, without {missing}; given up")
                return None
            if not warned and left < patience - 10:
                warned = True
                self.here.console.say(f"waiting for nodes: {len(crew)} of {least} are here")
            self._take(min(left, _TICK_SECONDS))

    def _take(self, seconds: float) -> int | None:
        """Wait for one event and handle it; return a signal's number, or 0 if ranks must save for another reason."""
        try:
            event = self.events.get(timeout=max(0.0, seconds))
        except queue.Empty:
            self._ping()
            return None
        if isinstance(event, int):
            self.stopping = self.stopping or event > 0
            return event
        if event is not None:
            self._hear(*event)
        return None

    def _ping(self) -> None:
        """Tell the other nodes that this one is alive, and which of them records its loss in which run if it is not."""
        for node, remote in self.remotes.items():
            heir = node == min(self.remotes)
            remote.link.send({"do": "ping", "run": str(self.story.run or ""), "heir": heir})

    def _hear(self, link: Link, message: Message | None) -> None:
        """Handle a message of another node, which may be its first."""
        known = next((one for one in self.remotes.values() if one.link is link), None)
        if known is not None:
            known.take(message)
        elif message is None:
            link.close()
        elif message.get("command") == self.here.command[1:] and message.get("node") in range(1, self.where.nodes):
            # a node with this number that is already known has ended or lost its link, or it would not connect again
            self.remotes[message["node"]] = Remote(link, message, lambda: self.events.put(None))
        else:  # a node of another job, or not a node at all
            link.close()

    def _attempt(self, attempt: int, crew: Sequence[Here | Remote], processes: int) -> _Outcome:
        """Start all ranks and watch them until they have ended."""
        coordinator = self._coordinator()
        self.limits.begin()
        self.story.begin(attempt)
        first = 0
        began = time.monotonic()
        try:
            for one in crew:
                one.start(Assignment(attempt, first, processes, coordinator, self.planned))
                first += one.processes
            seen = [rank for one in crew for rank in one.seen()]
            newest = self.story.newest()
            self.story.tell(
                "start", step=newest if newest >= 0 else None, attempt=attempt, processes=processes, nodes=len(crew),
                devices=_devices(seen), job=self.story.job or None,
            )  # fmt: skip
            late, failure = self._watch(crew)
            seen, found = _stacks(crew)
            failure = failure or first_failure(seen, found, late)
            self.story.look(seen, self.here.run(), last=True)
        finally:
            for one in crew:
                one.kill()
        return self._judge(seen, found, failure, time.monotonic() - began)

    def _judge(
        self, seen: Sequence[Seen], found: dict[int, list[Frame]], failure: Failure | None, moment: float
    ) -> _Outcome:
        """Decide what the end of an attempt means; report and record it."""
        if self.cancelled:
            self.story.tell("cancelled", step=_step(seen))
            self.here.console.say(
                "ended by the second signal before all was saved; the same command continues from the last checkpoint"
            )
            return _Outcome(ExitCode.FAILED)
        if failure is None:
            if all(one.code == ExitCode.DONE for one in seen):
                self.story.tell("done", step=_step(seen))
                return _Outcome(ExitCode.DONE)
            self.story.tell("preempted", step=_step(seen))
            if self.growing and not self.stopping:
                return _Outcome(None)
            self.here.console.say("saved and stopped; the same command goes on from there")
            return _Outcome(ExitCode.SAVED)
        rank = failure.rank
        stopped = rank is None or rank.code in (None, -signal.SIGTERM)
        if self.stopping and stopped and not any(one.polls for one in seen):  # nothing to save yet
            self.story.tell("preempted", rank)
            self.here.console.say("stopped before the first step; the same command goes on from the last checkpoint")
            return _Outcome(ExitCode.SAVED)
        if rank is not None and rank.code == ExitCode.MISTAKE:
            self.here.console.say(
                f"rank {rank.rank} ended with exit code 2, a mistake in what was asked (see its message)"
            )
            self.story.tell("mistake", rank, message=failure.why)
            return _Outcome(ExitCode.MISTAKE, failure)
        self.here.console.say(failure.message(moment))
        self.story.tell("failed", rank, kind=failure.kind, message=failure.why, stacks=grouped(found))
        return _Outcome(ExitCode.FAILED if self.stopping else None, failure)

    def _watch(self, crew: Sequence[Here | Remote]) -> tuple[str, Failure | None]:
        """Wait until all ranks have ended, or one has failed or is stuck; return why it is stuck, and what failed."""
        deadline, late, stopping = math.inf, "", False
        noted: set[int] = set()
        leaving: set[str] = set()
        size = len(crew)
        checked, warned = 0.0, False
        while True:
            number = self._take(min(_TICK_SECONDS, deadline - time.monotonic()))
            now = time.monotonic()
            if number is not None:
                # schedulers send SIGTERM twice: the second one must not interrupt the save that the first one started
                if stopping and number == signal.SIGINT:
                    self.cancelled = True
                    return "", None
                stopping = True
                for one in crew:
                    one.tell()
                deadline, late = _sooner(
                    deadline, late, now + self.grace, f"still running {self.grace:.0f} s after it was told to stop"
                )
            for one in crew:
                if isinstance(one, Remote):
                    if not one.lost and one.link.silent() > LOST_SECONDS:
                        one.lost = "link"
                    if one.lost:
                        return "", _lost(one)
                if one.refused:
                    return "", Failure("raised", one.refused)
            seen = [rank for one in crew for rank in one.seen()]
            if all(rank.code is not None for rank in seen):
                return "", None
            for rank in seen:
                if rank.code is not None and rank.rank not in noted:
                    noted.add(rank.rank)
                    good = rank.code in GOOD
                    until = now + (_LEAVE_SECONDS if good else _SETTLE_SECONDS)
                    reason = f"still running {_LEAVE_SECONDS:.0f} s after rank {rank.rank} ended" if good else ""
                    leaving |= {reason} if good else set()
                    deadline, late = _sooner(deadline, late, until, reason)
            if now >= deadline and late in leaving and any(_goes_on(rank) for rank in seen):
                deadline = now + _LEAVE_SECONDS  # the workers of a search do not end together
            if now >= deadline:
                return late, None
            if any(rank.frozen > FROZEN_SECONDS for rank in seen):
                return "", None
            if now - checked < _TICK_SECONDS:
                continue
            checked = now
            self._ping()
            self.story.look(seen, self.here.run())
            self.story.unsaved(self.here.unsaved(), seen)
            if self._hopeless(0):
                return "", Failure("died", "attempts before this one ended without a newer checkpoint")
            if noted or stopping:
                continue
            overdue = self.limits.overdue(seen)
            if overdue is None:
                warned = False
            elif overdue.hopeless:
                return _pause(seen, overdue), None
            elif not warned:
                warned = True
                self._warn(crew, overdue)
            if (slow := self.limits.slow(seen)) is not None:
                self.here.console.say(self.story.slow(slow, seen))
            # only once all ranks take steps, since they cannot save before
            if size < self.where.nodes and len(self.remotes) + 1 > size and all(_begun(rank) for rank in seen):
                self.growing = True
                self.here.console.say("a node has come back: all save, and go on with it")
                self.events.put(0)

    def _warn(self, crew: Sequence[Here | Remote], overdue: Overdue) -> None:
        """Warn which rank the run waits for, before the attempt is ended because of it."""
        seen, found = _stacks(crew)
        failure = first_failure(seen, found, _pause(seen, overdue))
        if failure is not None:
            who = "" if failure.rank is None else f"rank {failure.rank.rank} on {failure.rank.host}: "
            self.here.console.say(f"warning: {who}{failure.why}")
            since = time.time() - overdue.age
            self.story.tell(
                "slow", failure.rank, kind=failure.kind, since=since, message=failure.why, stacks=grouped(found)
            )

    def _coordinator(self) -> str:
        """Return the address at which the ranks of the next attempt connect: the job's port, unless it is in use."""
        local = self.where.nodes == 1
        port = self.where.port
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((self.where.host if local else "", port))
            except OSError:
                probe.bind((self.where.host if local else "", 0))
                port = probe.getsockname()[1]
        return Cluster(self.where.nodes, 0, self.where.host, port).coordinator


def _stacks(crew: Sequence[Here | Remote]) -> tuple[list[Seen], dict[int, list[Frame]]]:
    """Return the states of all ranks, and the stacks of the main threads of those that run."""
    for one in crew:
        one.ask()
    found = {rank: stack for one in crew for rank, stack in one.stacks().items()}
    return [rank for one in crew for rank in one.seen()], found


def _pause(seen: Sequence[Seen], overdue: Overdue) -> str:
    phase = min(seen, key=lambda rank: rank.age).phase
    return (
        f"no progress for {overdue.age:.0f} s in {phase}, where up to {overdue.learned:.1f} s are normal for this run"
    )


def _sooner(deadline: float, late: str, until: float, reason: str) -> tuple[float, str]:
    return (until, reason) if until < deadline else (deadline, late)


def _lost(remote: Remote) -> Failure:
    seen = remote.seen()
    why = (
        f"node {remote.node} ({remote.host}) has not been heard of for {LOST_SECONDS:.0f} s: its link is down"
        if remote.lost == "link"
        else f"the supervisor of node {remote.node} ({remote.host}) is gone"
    )
    return Failure("link" if remote.lost == "link" else "died", why, seen[0] if seen else None)


def _devices(seen: Sequence[Seen]) -> str:
    return ", ".join(sorted({one.device for one in seen if one.device}))


def _begun(rank: Seen) -> bool:
    """Whether a rank takes steps or has polled; before that it may not handle signals yet."""
    return rank.step >= 0 or rank.polls > 0


def _goes_on(rank: Seen) -> bool:
    return rank.code is None and rank.polls > 0 and rank.age < _LEAVE_SECONDS


def _step(seen: Sequence[Seen]) -> int | None:
    step = max((one.step for one in seen), default=-1)
    return step if step >= 0 else None
