"""The supervisor of a node starts its ranks and watches them. Node 0's supervisor leads; the others report to it.

When a rank fails, all ranks are ended, the first failure is named, and all ranks restart from the last good checkpoint:
on the same nodes, or on those that remain. Every event goes to the run's events.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from jaxmodels.errors import ExitCode, UserError, check_place
from jaxmodels.launch import cluster, code
from jaxmodels.launch.cluster import Cluster
from jaxmodels.launch.console import Console
from jaxmodels.launch.follow import follow
from jaxmodels.launch.here import Here
from jaxmodels.launch.lead import Leader
from jaxmodels.launch.ranks import Platform

_ALONE = {"TPU_SKIP_MDS_QUERY": "1"}
"""An environment that names no other node."""


@dataclass(frozen=True)
class Node:
    """What this node starts, and how often the job is restarted."""

    processes: int = 2
    devices: int | None = None
    """Devices per process: virtual CPU devices, or GPUs in order. None: one, or an equal share of all GPUs."""
    platform: Platform = "auto"
    """auto uses GPUs or TPUs where there are any, unless JAX_PLATFORMS says cpu."""
    restarts: int = 3
    """How many restarts in a row may make no progress before the job is given up."""
    min_nodes: int | None = None
    """Continue on as few nodes as this if others are lost. None: only on all of them."""
    grace: float = 60.0
    """Seconds that the processes have to save after this one was told to stop."""


def _count(text: str) -> int:
    return _at_least(1, text)


def _natural(text: str) -> int:
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a number of at least {least}")
    return int(text)


def _positive(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r}, expected a number above 0")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"got {message}, expected other options, try python -m jaxmodels.launch.node --help")


def main(arguments: Sequence[str]) -> int:
    """Start and watch this node's ranks as the arguments say; return the exit code."""
    parser = _Parser("python -m jaxmodels.launch.node", description=__doc__, allow_abbrev=False)
    parser.add_argument("--processes", type=_count, required=True, help="ranks of this node")
    parser.add_argument("--devices", type=_count, help="devices of each rank")
    parser.add_argument("--platform", choices=("auto", "cpu", "gpu", "tpu"), default="auto")
    parser.add_argument("--nodes", type=int, help="default: as the environment says, like the next two")
    parser.add_argument("--node", type=int, help="number of this node, from 0")
    parser.add_argument("--coordinator", help="HOST:PORT of node 0, where ranks meet; supervisors meet at PORT + 1")
    parser.add_argument(
        "--restarts", type=_natural, default=3, help="restarts in a row that may make no progress (default: 3)"
    )
    parser.add_argument("--min-nodes", type=int, help="continue on as few as this if others are lost")
    parser.add_argument("--grace", type=_positive, default=60.0, help="seconds to save when told to stop (default: 60)")
    parser.add_argument("--log", type=Path, help="file for the output of the ranks")
    parser.add_argument("--ended", type=Path, help="file to which this supervisor's exit code is added when it ends")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- train configs/x.py …")
    given, ended = None, int(ExitCode.FAILED)
    try:
        given = parser.parse_args(arguments)
        ended = _start(given)
    except UserError as mistake:
        print(f"launch: error: {mistake}", file=sys.stderr)
        ended = ExitCode.MISTAKE
    finally:
        if given is not None and given.ended is not None:
            with contextlib.suppress(OSError), given.ended.open("a") as file:
                file.write(f"{int(ended)}\n")
    return ended


def _start(given: argparse.Namespace) -> int:
    """Start and watch the ranks; return the job's exit code."""
    command = given.command[1:] if given.command[:1] == ["--"] else given.command
    if not command:
        raise UserError("got no command, expected one of ours after --, try -- train configs/gpt_stdlib.py")
    if given.log is not None:
        check_place(given.log, "--log")
    code.check(os.environ)
    where = _cluster(given.nodes, given.node, given.coordinator)
    options = Node(given.processes, given.devices, given.platform, given.restarts, given.min_nodes, given.grace)
    return run(program(command), options, where, given.log)


def program(command: Sequence[str]) -> list[str]:
    """Return the program that runs a command: `train configs/x.py`, or `benchmarks scaling`."""
    own = "benchmarks" if command[:1] == ["benchmarks"] else "jaxmodels"
    return [sys.executable, "-m", own, *(command[1:] if own == "benchmarks" else command)]


def run(command: Sequence[str], options: Node, where: Cluster | None = None, log: Path | None = None) -> int:
    """Run `command` in every process of every node until it is done; return the exit code of the job.

    The code is 0 if all are done, 75 if all saved and stopped (run it again), 2 for a user's mistake, and 1 for
    anything else, such as a job that failed repeatedly without progress.

    Raises:
        UserError: the options cannot be met on this machine.
    """
    where = where or cluster.found(_ALONE)
    if options.min_nodes is not None and not 1 <= options.min_nodes <= where.nodes:
        raise UserError(f"got --min-nodes {options.min_nodes}, expected 1 to {where.nodes}, try --min-nodes 1")
    console = Console(options.processes * where.nodes, log)
    here = Here(command, options.processes, options.devices, options.platform, console)
    here.check(where)
    try:
        if where.node == 0:
            return Leader(here, where, options.restarts, options.min_nodes or where.nodes, options.grace).lead()
        return follow(here, where)
    finally:
        here.kill()
        console.close()


def _cluster(nodes: int | None, node: int | None, coordinator: str | None) -> Cluster:
    """Return the nodes as given, or else as the environment says."""
    if nodes is None and node is None and coordinator is None:
        return cluster.found(os.environ)
    nodes, node = nodes or 1, node or 0
    if nodes == 1:
        return cluster.found(_ALONE) if coordinator is None else _at(1, 0, coordinator)
    if coordinator is None:
        raise UserError("got --nodes without --coordinator, expected both, try --coordinator HOST:PORT of node 0")
    if not 0 <= node < nodes:
        raise UserError(f"got --node {node} of --nodes {nodes}, expected 0 to {nodes - 1}, try --node 0")
    return _at(nodes, node, coordinator)


def _at(nodes: int, node: int, coordinator: str) -> Cluster:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65535:
        raise UserError(f"got --coordinator {coordinator}, expected HOST:PORT, try --coordinator node0:20000")
    return Cluster(nodes, node, host.strip("[]"), int(port))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
