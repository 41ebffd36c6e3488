"""The output of a job, line by line: from a file that grows, or from a command that follows it."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from jaxmodels.errors import UserError

_POLL_SECONDS = 1.0


def growing(path: Path, going: Callable[[], bool]) -> Iterator[str]:
    """Yield the lines of a file, as long as `going()` is true; none if there is no file."""
    position, rest = 0, b""
    while True:
        more = going()  # asked before the file is read, so that its last lines are not missed
        if path.exists():
            with open(path, "rb") as file:
                file.seek(position)
                *lines, rest = (rest + file.read()).split(b"\n")
                position = file.tell()
            for line in lines:
                yield line.decode(errors="replace")
        if not more:
            break
        time.sleep(_POLL_SECONDS)
    if rest:
        yield rest.decode(errors="replace")


def stream(command: Sequence[str]) -> Iterator[str]:
    """Yield the lines that a command prints; the command is killed when the iterator is closed.

    Raises:
        UserError: it is not installed, or it fails.
    """
    try:
        process = subprocess.Popen(
            list(command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            errors="replace",
        )  # fmt: skip
    except FileNotFoundError:
        raise UserError(f"got no program {command[0]!r} here, expected it on PATH") from None
    assert process.stdout is not None and process.stderr is not None
    try:
        for line in process.stdout:
            yield line.rstrip("\n")
        message = " ".join(process.stderr.read().split())
        if process.wait():
            raise UserError(f"got a refusal from {' '.join(command[:2])}: {message[-500:] or process.returncode}")
    finally:
        process.kill()
        process.wait()
