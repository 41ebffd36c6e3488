"""The code blocks of a page, and how they are run in a folder of their own.

A block of ```python is run, those of a page in one scope, one after the other; with title="my_gpt.py" it is written to
that file instead. The lines of ```sh are run as commands. `<!-- run with: … -->` before a block adds options to each of
its `jaxmodels` commands that train, so that they are short here: fewer steps, or another model if the page is not about
one. `<!-- not run: reason -->` leaves the block out. A command that ends in & goes on beside the blocks that follow:
`beside` starts it, waits until it says that it is ready, and ends it. The port 8765 stands for one that is free.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BLOCK = re.compile(
    r"(?:^<!-- (?P<how>not run|run with): (?P<what>[^\n]*) -->\n+)?"
    r"^```(?P<kind>\w*)(?P<options>[^\n]*)\n(?P<code>.*?)^```$",
    re.M | re.S,
)
KINDS = ("python", "sh")
SHORTENED = ("train", "tune")
PORT = "8765"


@dataclass(frozen=True)
class Block:
    """A block of code, and what its page says of it."""

    kind: str
    code: str
    line: int
    title: str | None
    extra: tuple[str, ...]
    skipped: str | None


def blocks(page: Path) -> list[Block]:
    """All blocks of a page that are code."""
    text, found = page.read_text(), []
    if PORT in text:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            text = text.replace(PORT, str(free.getsockname()[1]))
    assert text.count("```") % 2 == 0, f"{page}: a block without an end"
    for match in BLOCK.finditer(text):
        if match["kind"] not in KINDS:
            assert match["how"] is None, f"{page}: {match['how']} before a block that is no code"
            continue
        title = re.search(r'title="([^"]+)"', match["options"])
        found.append(
            Block(
                match["kind"],
                match["code"],
                text[: match.start("code")].count("\n") + 1,
                title and title[1],
                tuple(shlex.split(match["what"])) if match["how"] == "run with" else (),
                match["what"] if match["how"] == "not run" else None,
            )
        )
    return found


def run(block: Block, scope: dict[str, Any], folder: Path, beside: contextlib.ExitStack | None = None) -> None:
    """Run one block, with the folder as the working directory."""
    if block.skipped is not None:
        return
    if block.title is not None:
        (folder / block.title).write_text(block.code)
    elif block.kind == "python":
        exec(compile("\n" * (block.line - 1) + block.code, "page", "exec"), scope)
    else:
        for line in block.code.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and words[-1] == "&":
                assert beside is not None, f"nothing ends {line}"
                beside.enter_context(background(words[:-1]))
            elif words:
                command(words, block.extra)


def command(words: list[str], extra: tuple[str, ...]) -> None:
    """Run one command: those of jaxmodels in this process, which has jax already."""
    from jaxmodels.cli import main

    if words[0] == "jaxmodels":
        words = words[1:] + (list(extra) if words[1] in SHORTENED else [])
        assert main(words) == 0, shlex.join(words)
    else:
        assert words[0] == "python", f"cannot run {shlex.join(words)}: is it to be marked as not run?"
        subprocess.run([sys.executable, *words[1:]], check=True)


@contextlib.contextmanager
def background(words: list[str]) -> Iterator[None]:
    """A command of jaxmodels in a process of its own, from when it says `ready` until the context ends."""
    assert words[0] == "jaxmodels", f"cannot run {shlex.join(words)} beside others"
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    begun = [sys.executable, "-m", "jaxmodels", *words[1:]]
    process = subprocess.Popen(begun, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path})
    assert process.stderr is not None
    try:
        said: list[str] = []
        for line in process.stderr:
            said.append(line)
            if line.startswith("ready"):
                break
        else:
            raise AssertionError(f"{shlex.join(words)} has ended: {''.join(said[-20:])}")
        rest = threading.Thread(target=process.stderr.read, daemon=True)
        rest.start()
        yield
        process.terminate()
        assert process.wait(120) == 0, f"{shlex.join(words)} ended with {process.returncode}"
    finally:
        process.kill()
        process.wait()
