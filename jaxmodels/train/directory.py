"""A run's directory: one process at a time writes there, and each of its files is replaced atomically."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from jaxmodels import config as configs
from jaxmodels.config import Config
from jaxmodels.errors import UserError, check_place, printable
from jaxmodels.train.checkpoint import Checkpointer, CheckpointError
from jaxmodels.train.display import Display
from jaxmodels.train.manifest import atomic_write

log = logging.getLogger("jaxmodels")

Resume = Literal["auto", "must", "never"]
LOCK = ".lock"
CONTINUED = (LOCK, "log.txt", "metrics.jsonl", "phases.jsonl")
"""Files that are written to, and not replaced, where a run goes on."""
NEUTRAL = (
    "metrics.",
    "profile.",
    "checkpoint.",
    "mesh.",
    "data.prefetch",
    "data.dir",
    "train.strategy",
    "train.xla",
    "init.",
    "adapter.source",
    "distill.teacher",
)
"""Fields that may differ when a run is resumed, because they do not change what is computed."""


def check_writable(run: Path, option: str = "--run-dir") -> None:
    """Refuse a directory that cannot be written to, before any work; creates nothing. `option` names it.

    Raises:
        UserError: it is not a directory, it or a file that a run continues may not be written, or another process
            writes there.
    """
    for path in (run, run / "checkpoints"):
        if os.path.lexists(path) and not path.is_dir():
            raise UserError(
                f"got {option} {path}, which is not a directory, expected one or nothing there, try another {option}"
            )
    check_place(run, option, folder=True)
    for path in (run / name for name in ("checkpoints", *CONTINUED)):
        if path.exists() and not os.access(path, os.W_OK):
            raise UserError(
                f"got {option} {run}, where {path.name} may not be written, expected the right to go on with it, "
                f"try another {option}, or chmod -R u+w {run} as its owner"
            )
    if (run / LOCK).is_file():
        with held(run, option):
            pass


@contextlib.contextmanager
def held(run: Path, option: str = "--run-dir") -> Iterator[None]:
    """Hold the lock of a directory, created if need be, as its only writer. Readers need no lock.

    The lock is the kernel's (NFS passes it on to the server), so it ends with the process, however that ends. The
    file's contents are only for the message.

    Raises:
        UserError: another process writes there.
    """
    path = run / LOCK
    while True:
        run.mkdir(parents=True, exist_ok=True)
        with path.open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    raise UserError(
                        f"got run directory {run}, to which {_holder(path)} is writing, expected one writer, "
                        f"try another {option}, or wait until it ends"
                    ) from None
                log.warning(
                    "%s cannot be locked (%s): nothing prevents a second run from writing there",
                    run,
                    os.strerror(error.errno or 0),
                )
            if not (path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())):
                continue  # the run was moved aside before we locked it
            with contextlib.suppress(OSError):  # a full disk
                file.truncate(0)
                since = time.strftime("%Y-%m-%d %H:%M:%S %z")
                file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since}) + "\n")
                file.flush()
            yield
            return


def _holder(path: Path) -> str:
    try:
        known = json.loads(path.read_text())
        return f"process {int(known['pid'])} on {str(known['host'])!r}, since {str(known['since'])[:40]},"
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return "another process"


@contextlib.contextmanager
def prepared(cfg: Config, run: Path, resume: Resume, origin: Mapping[str, Any]) -> Iterator[None]:
    """Hold the directory with the config in it; refuse one that holds another experiment.

    Raises:
        UserError: it holds another experiment and `resume` is not "must" (shown in the message), or `resume`
            is "must" and there is no checkpoint, or a config.json that cannot be read and would be replaced.
    """
    check_writable(run)
    checkpoints = Checkpointer(run / "checkpoints")
    if resume == "must" and not checkpoints.steps():
        raise UserError(f"got --resume must for {run}, expected a checkpoint there, try --resume auto")
    with contextlib.ExitStack() as stack:
        stack.enter_context(held(run))
        if resume == "never" and (run / "config.json").exists():
            aside = next(p for n in range(1, 10_000) if not os.path.lexists(p := run.with_name(f"{run.name}.old{n}")))
            run.rename(aside)
            stack.enter_context(held(run))
            print(printable(f"moved the run that was in {run} to {aside}"))
        elif resume == "auto" and checkpoints.steps():
            check_same_config(cfg, run)
        elif resume == "must" and os.path.lexists(run / "config.json"):
            check_known_config(run)
        with atomic_write(run / "config.json") as part:
            configs.save(cfg, part, origin)
        yield


def check_same_config(cfg: Config, run: Path) -> None:
    """Raise UserError if the run that is there has a config that computes something else."""
    before, _ = configs.read(run)
    differ = {name: values for name, values in configs.differences(before, cfg).items() if not name.startswith(NEUTRAL)}
    if differ:
        shown = "; ".join(f"{name} was {a!r}, now {b!r}" for name, (a, b) in differ.items())
        raise UserError(
            f"got run directory {run} of another config ({shown}), expected the same, try another "
            "--run-dir, --resume must to continue with the change, or --resume never to start anew"
        )


def check_known_config(run: Path) -> None:
    """Raise UserError if the config that is there cannot be read."""
    try:
        configs.read(run)
    except UserError as error:
        raise UserError(
            f"got --resume must for {run}, whose config cannot be read ({error}), expected one, since it may be "
            "all that says what the run was, try repairing it, or moving config.json aside"
        ) from None


class _Terminal(logging.Handler):
    def __init__(self, display: Display) -> None:
        super().__init__()
        self.display = display

    def emit(self, record: logging.LogRecord) -> None:
        loud = "" if record.levelno <= logging.INFO else record.levelname.lower() + ": "
        self.display.say(printable(loud + record.getMessage()), failed=record.levelno >= logging.ERROR)
        if self.display.shows and isinstance(record.args, tuple):
            for argument in record.args:
                if isinstance(argument, CheckpointError):
                    argument.shown = True


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class _File(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """Ignore errors: others report a full disk, and here each line would print a traceback."""


@contextlib.contextmanager
def logging_to(path: Path | None, display: Display) -> Iterator[None]:
    """Log to a file and, above the live display, to the terminal."""
    handlers: list[logging.Handler] = [_Terminal(display)]
    if path is not None:
        handlers.append(_File(path, encoding="utf-8", errors="backslashreplace"))
        handlers[-1].setFormatter(_Lines("%(asctime)s %(levelname)s %(message)s"))
    level, propagate = log.level, log.propagate
    log.setLevel(logging.INFO)
    log.propagate = False
    for handler in handlers:
        log.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            log.removeHandler(handler)
            with contextlib.suppress(OSError):  # lines that did not fit on a full disk
                handler.close()
        log.setLevel(level)
        log.propagate = propagate
