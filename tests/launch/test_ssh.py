"""Hosts by ssh: real ones, in network namespaces, with a supervisor that only does what a test says."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.launch.namespaces import Hosts, two_hosts

# the interpreter of a place: it does what the file acts-NODE says instead of `-m jaxmodels.launch.node … --node NODE`
SUPERVISOR = """#!/bin/sh
while [ $# -gt 0 ]; do [ "$1" = --node ] && node=$2; shift; done
trap 'kill $! ; echo told > {folder}/told-$node; exit 75' TERM
echo "[$node] on $(hostname)"
. {folder}/acts-$node
"""
WAITS = "sleep 60 & wait\n"


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with two_hosts(tmp_path_factory.mktemp("hosts")) as found:
        yield found


class Launched:
    """`jaxmodels launch ssh`, started on the first host."""

    def __init__(self, hosts: Hosts, folder: Path, acts: list[str], *options: str, names: str = "h1 h2") -> None:
        self.folder = folder
        supervisor = folder / "supervisor"
        supervisor.write_text(SUPERVISOR.format(folder=folder))
        supervisor.chmod(0o755)
        for node, act in enumerate(acts):
            (folder / f"acts-{node}").write_text(act)
        place = ["ssh", "--config", str(hosts.config), "--python", str(supervisor), "--name", "job", *options]
        place += ["--hosts", *names.split()]
        self.process = subprocess.Popen(
            [*hosts.inside, sys.executable, "-m", "jaxmodels", "launch", *place, "--", "train"],
            cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def started(self) -> None:
        """Wait until both hosts have."""
        log = self.folder / "runs/launch/job/log.txt"
        wait_for(lambda: log.exists() and log.read_text().count("] on ") == 2)

    def end(self) -> tuple[int, str]:
        out, _ = self.process.communicate(timeout=60)
        return self.process.returncode, out


def wait_for(what) -> None:
    until = time.monotonic() + 120
    while not what():
        assert time.monotonic() < until
        time.sleep(0.1)


def ours(argv: list[str], folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "jaxmodels", *argv], cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
        capture_output=True,
    )  # fmt: skip
    return done.stdout + done.stderr


def test_each_host_has_a_supervisor_and_the_first_one_speaks_for_all(hosts: Hosts, tmp_path: Path) -> None:
    code, said = Launched(hosts, tmp_path, ["exit 0", "exit 0"]).end()
    assert code == 0 and {"[0] on h1", "[1] on h2"} <= set(said.splitlines()), said
    assert sorted(path.name for path in (tmp_path / "runs/launch/job").glob("host-*")) == ["host-0.sh", "host-1.sh"]


def test_a_mistake_on_any_host_ends_all_with_2(hosts: Hosts, tmp_path: Path) -> None:
    code, said = Launched(hosts, tmp_path, [WAITS, "echo error: got x; exit 2"]).end()
    assert code == 2 and "launch: h2 ended with exit code 2: error: got x" in said, said
    assert (tmp_path / "told-0").exists()


def test_a_host_that_cannot_be_reached_is_named(hosts: Hosts, tmp_path: Path) -> None:
    code, said = Launched(hosts, tmp_path, ["exit 0"], names="nowhere").end()
    assert code == 1 and "launch: nowhere could not be reached, or the connection broke: ssh: " in said, said


def test_cancel_reaches_all_hosts_and_they_save(hosts: Hosts, tmp_path: Path) -> None:
    job = Launched(hosts, tmp_path, [WAITS, WAITS])
    job.started()
    assert "running" in ours(["launch", "status", "job"], tmp_path)
    ours(["launch", "cancel", "job"], tmp_path)
    assert job.end()[0] == 75
    assert (tmp_path / "told-0").exists() and (tmp_path / "told-1").exists()
    assert "saved, exit code 75" in ours(["launch", "status", "job"], tmp_path)


def test_when_the_command_is_killed_the_hosts_are_told(hosts: Hosts, tmp_path: Path) -> None:
    job = Launched(hosts, tmp_path, [WAITS, WAITS])
    job.started()
    job.process.send_signal(signal.SIGKILL)
    wait_for(lambda: (tmp_path / "told-0").exists() and (tmp_path / "told-1").exists())
    job.end()
    assert "gone" in ours(["launch", "status", "job"], tmp_path)


def test_a_host_that_is_lost_is_tried_again_where_the_job_goes_on_without_it(hosts: Hosts, tmp_path: Path) -> None:
    back = f"test -e {tmp_path}/lost || {{ touch {tmp_path}/lost; exit 1; }}\ntouch {tmp_path}/back\nexit 2"
    # a mistake on a host that comes back ends nothing
    waits = f"while ! test -e {tmp_path}/back; do sleep 0.1; done; sleep 3; exit 0"
    job = Launched(hosts, tmp_path, [waits, back], "--min-hosts", "1")
    code, said = job.end()
    assert code == 0 and "launch: h2 ended with exit code 1" in said, said
