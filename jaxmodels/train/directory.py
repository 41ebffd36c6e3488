"""A run's directory: one process at a time writes there, and each of its files is whole or the one before it."""

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
from jaxmodels.errors import UserError, printable
from jaxmodels.train.checkpoint import Checkpointer, CheckpointError
from jaxmodels.train.display import Display
from jaxmodels.train.manifest import whole

log = logging.getLogger("jaxmodels")

Resume = Literal["auto", "must", "never"]
LOCK = ".lock"
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
)
"""Fields that may differ when a run is resumed: they do not change what is computed."""


def check(run: Path) -> None:
    """Refuse a directory that cannot be written in, before any work; makes nothing.

    Raises:
        UserError: it is no directory, or another process writes there.
    """
    for path in (run, run / "checkpoints"):
        if os.path.lexists(path) and not path.is_dir():
            raise UserError(f"got {path}, which is no directory, expected one or nothing there, try another --run-dir")
    if (run / LOCK).is_file():
        with held(run):
            pass


@contextlib.contextmanager
def held(run: Path) -> Iterator[None]:
    """Be the one process that writes in a directory, which is made if need be; who only reads need not ask.

    The lock is the kernel's (NFS carries it to the server), so it ends with the process, however that ends. What the
    file says is for the message alone.

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
                        f"got run directory {run}, in which {_holder(path)} writes, expected one writer at a time, "
                        "try another --run-dir, or wait for its end"
                    ) from None
                log.warning(
                    "%s cannot be locked (%s): nothing keeps a second run out of it", run, os.strerror(error.errno or 0)
                )
            if not (path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())):
                continue  # the run was moved aside before it was locked
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
    """Hold the directory, with the config in it; refuse one that holds another experiment.

    Raises:
        UserError: it does, and `resume` is not "must"; shows the difference. It is "must" and there is no checkpoint.
    """
    check(run)
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
            refuse_another(cfg, run)
        with whole(run / "config.json") as part:
            configs.save(cfg, part, origin)
        yield


def refuse_another(cfg: Config, run: Path) -> None:
    """Raises UserError where the run that is there was made by a config that computes something else."""
    before, _ = configs.read(run)
    differ = {name: values for name, values in configs.differences(before, cfg).items() if not name.startswith(NEUTRAL)}
    if differ:
        shown = "; ".join(f"{name} was {a!r}, now {b!r}" for name, (a, b) in differ.items())
        raise UserError(
            f"got run directory {run} of another config ({shown}), expected the same, try another "
            "--run-dir, --resume must to go on with the change, or --resume never to start anew"
        )


class _Terminal(logging.Handler):
    def __init__(self, display: Display) -> None:
        super().__init__()
        self.display = display

    def emit(self, record: logging.LogRecord) -> None:
        loud = "" if record.levelno <= logging.INFO else record.levelname.lower() + ": "
        self.display.say(printable(loud + record.getMessage()), failed=record.levelno >= logging.ERROR)
        if self.display.shows and isinstance(record.args, tuple):
            for said in record.args:
                if isinstance(said, CheckpointError):
                    said.shown = True


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class _File(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """A full disk is said by what cannot do without it; here a traceback would come for every line."""


@contextlib.contextmanager
def logging_to(path: Path | None, display: Display) -> Iterator[None]:
    """The project's log goes to a file and, above the live display, to the terminal."""
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
            with contextlib.suppress(OSError):  # what a full disk did not take
                handler.close()
        log.setLevel(level)
        log.propagate = propagate
