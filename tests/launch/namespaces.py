"""Hosts on this machine: network namespaces with names, addresses and an sshd of their own, and a link between them."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

PORT = 2222


class Hosts:
    """Two hosts, h1 and h2, that ssh reaches with the options of `config` from within the first one."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.config = folder, folder / "ssh_config"
        self.names = [f"jm{os.getpid()}h{i}" for i in (1, 2)]
        self.inside = ["nsenter", f"--net=/run/netns/{self.names[0]}"]
        """What a command begins with that runs on the first host."""


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[Hosts]:
    """Skips the test where this machine cannot have such hosts."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    if missing := [name for name in ("ip", "nsenter", "unshare", "sshd", "ssh", "ssh-keygen") if not _found(name)]:
        pytest.skip(f"no {missing[0]} here (apt-get install iproute2 util-linux openssh-server)")
    hosts, servers = Hosts(folder), []
    try:
        try:
            for name in hosts.names:
                run("ip", "netns", "add", name)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        _link(hosts)
        servers = [_server(hosts, i) for i in (1, 2)]
        yield hosts
    finally:
        for server in servers:
            server.kill()
            server.wait()
        for name in hosts.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def _found(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def _link(hosts: Hosts) -> None:
    first, second = hosts.names
    run("ip", "-n", first, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", second)
    for i, name in enumerate(hosts.names, 1):
        run("ip", "-n", name, "address", "add", f"10.83.7.{i}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            run("ip", "-n", name, "link", "set", device, "up")


def _server(hosts: Hosts, i: int) -> subprocess.Popen[bytes]:
    folder, name = hosts.folder, hosts.names[i - 1]
    if i == 1:
        for key in ("host", "user"):
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key))
        (folder / "hosts").write_text("127.0.0.1 localhost\n10.83.7.1 h1\n10.83.7.2 h2\n")
        (folder / "sshd_config").write_text(
            f"Port {PORT}\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\nUsePAM no\nStrictModes no\n"
            "PermitRootLogin yes\nPidFile none\n"
        )
        hosts.config.write_text(
            f"Host h?\n  Port {PORT}\n  User root\n  IdentityFile {folder}/user\n  UserKnownHostsFile /dev/null\n"
            "  StrictHostKeyChecking no\n  LogLevel ERROR\n"
            "Host h1\n  HostName 10.83.7.1\nHost h2\n  HostName 10.83.7.2\n"
        )
        Path("/run/sshd").mkdir(exist_ok=True)
    script = f"hostname h{i} && mount --bind {folder}/hosts /etc/hosts"
    script += f" && exec {_found('sshd')} -D -e -f {folder}/sshd_config"
    server = subprocess.Popen(
        ["nsenter", f"--net=/run/netns/{name}", "unshare", "--mount", "--uts", "sh", "-c", script],
        stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    probe = [*hosts.inside, "ssh", "-F", str(hosts.config), "-o", "BatchMode=yes", f"h{i}", "true"]
    until = time.monotonic() + 20
    while subprocess.run(probe, capture_output=True).returncode:
        assert time.monotonic() < until and server.poll() is None, "no sshd came up"
        time.sleep(0.1)
    return server
