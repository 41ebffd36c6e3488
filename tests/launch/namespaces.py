"""Hosts in namespaces of this machine, with an sshd on each."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import hosts as namespaces

PORT = 2222


class Hosts:
    """Two hosts, h1 and h2, that ssh reaches with the options of `config` from within the first one."""

    def __init__(self, folder: Path, hosts: namespaces.Hosts) -> None:
        self.folder, self.config, self.namespaces = folder, folder / "ssh_config", hosts
        self.inside = hosts.network(0)
        """What a command begins with that runs in the network of the first host."""
        self.each = [hosts.inside(i) for i in range(len(namespaces.NAMES))]


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[Hosts]:
    """Skips the test where this machine cannot have such hosts."""
    if lacking := namespaces.missing("sshd", "ssh", "ssh-keygen"):
        pytest.skip(lacking)
    servers = []
    with namespaces.two(folder) as found:
        hosts = Hosts(folder, found)
        try:
            servers = [_server(hosts, i) for i in (1, 2)]
            yield hosts
        finally:
            for server in servers:
                server.kill()
                server.wait()


def _server(hosts: Hosts, i: int) -> subprocess.Popen[bytes]:
    folder = hosts.folder
    if i == 1:
        for key in ("host", "user"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)]
            subprocess.run(command, check=True, capture_output=True)
        (folder / "sshd_config").write_text(
            f"Port {PORT}\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\nUsePAM no\nStrictModes no\n"
            "PermitRootLogin yes\nPidFile none\n"
        )
        hosts.config.write_text(
            f"Host h?\n  Port {PORT}\n  User root\n  IdentityFile {folder}/user\n  UserKnownHostsFile /dev/null\n"
            "  StrictHostKeyChecking no\n  LogLevel ERROR\n"
            + "".join(
                f"Host {name}\n  HostName {address}\n"
                for name, address in zip(namespaces.NAMES, namespaces.ADDRESSES, strict=True)
            )
        )
        Path("/run/sshd").mkdir(exist_ok=True)
    sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    server = subprocess.Popen(
        [*hosts.each[i - 1], str(sshd), "-D", "-e", "-f", str(folder / "sshd_config")],
        stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    probe = [*hosts.inside, "ssh", "-F", str(hosts.config), "-o", "BatchMode=yes", f"h{i}", "true"]
    until = time.monotonic() + 120
    while subprocess.run(probe, capture_output=True).returncode:
        assert time.monotonic() < until and server.poll() is None, "no sshd came up"
        time.sleep(0.1)
    return server
