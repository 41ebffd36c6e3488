"""Two hosts on this machine: namespaces with a name, an address and files of their own, and a link that can be cut."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

NAMES = ("h1", "h2")
ADDRESSES = ("10.83.7.1", "10.83.7.2")
_NOBODY = "02:00:00:00:00:09"


class Hosts:
    """The hosts h1 and h2; they end with this process, and leave nothing."""

    def __init__(self, folder: Path) -> None:
        (folder / "hosts").write_text(
            "127.0.0.1 localhost\n" + "".join(f"{a} {n}\n" for a, n in zip(ADDRESSES, NAMES, strict=True))
        )
        self._holders = [
            subprocess.Popen(
                ["unshare", "--net", "--mount", "--uts", "sh", "-c",
                 f"hostname {name} && mount --bind {folder}/hosts /etc/hosts && exec sleep infinity"],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )
            for name in NAMES
        ]  # fmt: skip
        try:
            self._link()
        except BaseException:
            self.close()
            raise

    def inside(self, host: int, directory: Path | str = ".") -> list[str]:
        """What a command begins with that runs on a host; by default in the directory that is the present one then."""
        return [*self.network(host), "--mount", "--uts", f"--wd={directory}"]

    def network(self, host: int) -> list[str]:
        """What a command begins with that has a host's network, and this machine's name and files."""
        return ["nsenter", f"--target={self._holders[host].pid}", "--net"]

    def cut(self) -> None:
        """Let what one host sends reach the other no more, without a word to either."""
        for host, other in ((0, 1), (1, 0)):
            self._ip(host, "neigh", "replace", ADDRESSES[other], "lladdr", _NOBODY, "dev", "eth0", "nud", "permanent")

    def mend(self) -> None:
        """Undo `cut`."""
        for host, other in ((0, 1), (1, 0)):
            self._ip(host, "neigh", "del", ADDRESSES[other], "dev", "eth0")

    def close(self) -> None:
        """End the hosts."""
        for holder in self._holders:
            holder.kill()
            holder.wait()

    def _link(self) -> None:
        end = time.monotonic() + 20
        while any(os.readlink(f"/proc/{one.pid}/ns/uts") == os.readlink("/proc/self/ns/uts") for one in self._holders):
            if time.monotonic() > end:
                raise RuntimeError("no namespace came up")
            time.sleep(0.02)
        first, second = (str(one.pid) for one in self._holders)
        _run("ip", "link", "add", "eth0", "netns", first, "type", "veth", "peer", "name", "eth0", "netns", second)
        for host, address in enumerate(ADDRESSES):
            self._ip(host, "address", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                self._ip(host, "link", "set", device, "up")

    def _ip(self, host: int, *arguments: str) -> None:
        _run(*self.network(host), "ip", *arguments)


def missing(*programs: str) -> str:
    """Why this machine cannot have such hosts; empty where it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    lacking = [name for name in ("ip", "nsenter", "unshare", *programs) if shutil.which(name, path=path) is None]
    if lacking:
        return f"no {lacking[0]} here (apt-get install iproute2 util-linux openssh-server)"
    probe = subprocess.run(["unshare", "--net", "--mount", "--uts", "true"], capture_output=True, text=True)
    return f"no namespaces here: {probe.stderr.strip()}" if probe.returncode else ""


@contextlib.contextmanager
def two(folder: Path) -> Iterator[Hosts]:
    """Two hosts, as long as they are needed."""
    hosts = Hosts(folder)
    try:
        yield hosts
    finally:
        hosts.close()


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
