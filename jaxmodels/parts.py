"""Write files and folders under other names, one process at a time, before they appear whole under their own."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from jaxmodels.errors import UserError

MARK = ".jaxmodels-part"
"""A file that marks a folder as still being written, and whose lock its writer holds."""
_TRIES = 100
"""How often a holder may remove a file that is about to be locked."""


@contextlib.contextmanager
def filled(part: Path, whole: Path) -> Iterator[None]:
    """Hold a folder as its only writer, made if need be, with nothing in it but its mark; it becomes or fills `whole`.

    What a process left that was killed is removed. The holder may rename or remove the folder.

    Raises:
        UserError: another process is writing there, or it cannot be made.
    """
    with locked(part / MARK, whole):
        for path in part.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != MARK:
                path.unlink()
        yield


@contextlib.contextmanager
def locked(path: Path, whole: Path) -> Iterator[None]:
    """Hold the lock of a file, made if need be, while `whole` is written.

    The lock is the kernel's, so it ends with the process. The holder may rename or remove the file.

    Raises:
        UserError: another process holds it, or it cannot be made.
    """
    with contextlib.ExitStack() as stack:
        for _ in range(_TRIES):
            if _hold(path, whole, stack):
                break
            stack.close()
        else:  # as in /proc, which says that a new file is "not found"
            raise UserError(f"got {whole}, where no file can be made, expected a place to write to, try another")
        yield


def _hold(path: Path, whole: Path, stack: contextlib.ExitStack) -> bool:
    """Lock a file; False if its holder has just renamed or removed it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = stack.enter_context(path.open("a+"))
    except FileNotFoundError:
        return False
    except OSError as error:
        raise UserError(
            f"got {whole}, which cannot be written ({error.strerror}), expected a place to write to, try another"
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # other errors mean that this file system has no locks
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise UserError(
                f"got {whole}, into which another process is writing, expected one writer, try another place, or wait "
                "until it ends"
            ) from None
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
