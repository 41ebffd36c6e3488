"""Programs on several hosts, which act as one: they are started by ssh, share a screen, and are stopped together."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TextIO

from jaxmodels.errors import ExitCode, printable

NO_CONNECTION = 255
"""Exit code of ssh itself when it cannot connect."""
# within this time node 0 notices that a node is lost, or that nothing is left to do
_SETTLE_SECONDS = 30.0
_SAVE_SECONDS, _FOLLOW_SECONDS, _LEAVE_SECONDS = 60.0, 10.0, 15.0
_RETURN_SECONDS = 10.0


class Hosts:
    """One supervisor per host; the exit code of the first host's is that of all."""

    def __init__(self, commands: Mapping[str, Sequence[str]], least: int, log: TextIO) -> None:
        """Start them.

        Args:
            commands: for each host the command that reaches it; a line on its standard input names a signal, and the
                input ends with this process.
            least: how many hosts the job needs to continue; lost ones are tried again.
            log: file for their output.
        """
        self._screen = _Screen(log)
        self._ended: queue.SimpleQueue[_Host] = queue.SimpleQueue()
        self._least, self._stopping = least, False
        self._hosts: list[_Host] = []
        try:
            for name, command in commands.items():
                self._hosts.append(_Host(name, command, self._screen, self._ended))
        except BaseException:
            self._leave(0.0)
            raise

    def send_signal(self, number: int) -> None:
        """Pass a signal on to all hosts: it tells them to save and stop; a second SIGINT stops them at once."""
        self._stopping = True
        for host in self._hosts:
            host.tell(signal.Signals(number).name.removeprefix("SIG"))

    def wait(self) -> int:
        """Wait until all have ended; return the exit code of the first host, or 2 if any host reported a mistake."""
        first, mistake, deadline = self._hosts[0], False, 0.0
        again: dict[_Host, float] = {}
        while first.code is None:
            for host in [host for host, due in again.items() if time.monotonic() >= due and not self._stopping]:
                del again[host]
                host.start()
            try:
                host = self._ended.get(timeout=1.0)
            except queue.Empty:
                if deadline and time.monotonic() > deadline:
                    break
                continue
            if host is first or host.code in (ExitCode.DONE, ExitCode.SAVED):
                continue
            self._screen.say(f"{host.name} {_ending(host)}")
            if host.code == ExitCode.MISTAKE and host.starts > 1:
                continue  # a restarted host's mistake must not end the others, and trying again would repeat it
            mistake = mistake or host.code == ExitCode.MISTAKE
            running = sum(each.code is None for each in self._hosts)
            if mistake or running < self._least:
                deadline = deadline or time.monotonic() + (1.0 if mistake else _SETTLE_SECONDS)
            else:
                again[host] = time.monotonic() + _RETURN_SECONDS
        if first.code is None:
            self.send_signal(signal.SIGTERM)
            first.reader.join(timeout=_SAVE_SECONDS)
        elif first.code not in tuple(ExitCode):
            self._screen.say(f"{first.name} {_ending(first)}")
        self._leave(0.0 if mistake else _FOLLOW_SECONDS)
        if mistake:
            return ExitCode.MISTAKE
        return ExitCode.FAILED if first.code is None or first.code not in tuple(ExitCode) else first.code

    def _leave(self, seconds: float) -> None:
        """Wait this many seconds for all hosts to end, then make sure that no process of the job remains."""
        until = time.monotonic() + seconds
        for host in self._hosts:
            host.reader.join(timeout=max(0.0, until - time.monotonic()))
        until = time.monotonic() + _LEAVE_SECONDS
        for host in self._hosts:
            host.leave(until)


class _Host:
    def __init__(self, name: str, command: Sequence[str], screen: _Screen, ended: queue.SimpleQueue[_Host]) -> None:
        self.name, self.command, self.screen, self.ended = name, list(command), screen, ended
        self.last, self.starts = "", 0
        self.start()

    def start(self) -> None:
        self.code: int | None = None
        self.starts += 1
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0,
            start_new_session=True,
        )  # fmt: skip
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def tell(self, name: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            if self.process.stdin is not None:
                os.write(self.process.stdin.fileno(), f"{name}\n".encode())

    def leave(self, until: float) -> None:
        """Wait until it ends, at most until the deadline, and then close its connection."""
        with contextlib.suppress(OSError, ValueError):
            if self.process.stdin is not None:
                self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=max(0.0, until - time.monotonic()))
        self.process.kill()
        self.reader.join(timeout=1.0)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            text = line.decode(errors="replace").rstrip("\r\n")
            self.last = text or self.last
            self.screen.line(self.name, text)
        self.code = self.process.wait()
        self.ended.put(self)


class _Screen:
    """Standard output and a file, with lines of several hosts."""

    def __init__(self, log: TextIO) -> None:
        self._log = log
        self._lock = threading.Lock()

    def line(self, host: str, text: str) -> None:
        """Write a line; one that no rank has written says its host."""
        self._write(printable(text) if text.startswith("[") else f"{host}: {printable(text)}", sys.stdout)

    def say(self, message: str) -> None:
        """Write a message of the launcher's own."""
        self._write(f"launch: {printable(message)}", sys.stderr)

    def _write(self, text: str, stream: TextIO) -> None:
        with self._lock:
            with contextlib.suppress(OSError, ValueError):
                print(text, file=self._log, flush=True)
            # standard output is closed; the line is in the file
            with contextlib.suppress(OSError, ValueError):
                print(text, file=stream, flush=True)


def _ending(host: _Host) -> str:
    broken = host.code == NO_CONNECTION
    how = "could not be reached, or the connection broke" if broken else f"ended with exit code {host.code}"
    return f"{how}: {host.last}" if host.last else how
