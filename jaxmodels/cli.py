"""The command line: it finds the command and always ends with one line and an exit code.

Exit codes are those of `errors.ExitCode`.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import logging
import os
import re
import select
import signal
import sys
import sysconfig
import tempfile
import time
import traceback
import types
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from jaxmodels import commands
from jaxmodels.errors import ExitCode, UserError, printable

HELP = ("-h", "--help")


def process() -> NoReturn:
    """Run `main` as a process of its own, which ends silently, whatever ends it."""
    with contextlib.suppress(AttributeError):  # a closed or replaced stream
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    commands.began = _began()
    try:
        code = main()
    except BaseException:  # with several processes, or with --traceback
        traceback.print_exc()
        code = 1
        if (distributed := sys.modules.get("jaxmodels.parallel.distributed")) is not None:
            distributed.finalize(code)  # at once, before the others end of it
    # more Ctrl-Cs would only interrupt the exit
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        sys.stdout.flush()
    except (BrokenPipeError, AttributeError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except OSError as error:  # stdout goes to a full disk
        print(f"error: {explain(error)[0]}", file=sys.stderr)
        code = code or 1
    if code in (ExitCode.DONE, ExitCode.SAVED):
        sys.exit(code)
    # threads still computing would abort an interpreter that does not wait for them
    atexit._run_exitfuncs()
    logging.shutdown()
    os._exit(code)


def _began() -> float:
    """When this process began, in Unix seconds: before Python did, where the system tells."""
    with contextlib.suppress(OSError, ValueError, IndexError, AttributeError):
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    return time.time()


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    traced = "--traceback" in argv
    argv = [arg for arg in argv if arg != "--traceback"]
    try:
        code = dispatch(argv)
    except SystemExit as stop:  # --help
        code = stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_left():
            return 141  # like a process ended by SIGPIPE
        message, code = explain(error)
        if (progress := sys.modules.get("jaxmodels.parallel.progress")) is not None:
            progress.failed(error, message)
        if traced or (message is None and _several()):
            raise
        if not getattr(error, "shown", False):  # already in the log of the run
            print(f"error: {printable(message or unexpected(error))}", file=sys.stderr)
    if (distributed := sys.modules.get("jaxmodels.parallel.distributed")) is not None:
        code = distributed.finalize(code)
    return code


def explain(error: BaseException) -> tuple[str | None, int]:
    """Return the message and exit code for an error that is foreseen; (None, …) for any other."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text, ExitCode.MISTAKE
    if type(error).__name__ in ("NotFinite", "CheckpointError"):
        return text, 1
    if isinstance(error, OSError) and (of_files := _of_files(error)) is not None:
        return of_files
    # errors of libraries written in C or C++
    if re.search(r"No space left on device|Disk quota exceeded|database or disk is full", text):
        return f"the disk is full: {text[:200]}; try again when there is room, nothing that was saved is lost", 1
    if re.search(r"readonly database|unable to open database file", text):
        return (
            f"got a place for a database that cannot be written ({text[:160]}), expected one that can, try another",
            2,
        )
    if unknown := re.search(r"No such compile option: '(\w+)'", text):
        return f"got train.xla {unknown.group(1)}, which this compiler does not know, try without it", 2
    if absent := re.search(r"[Uu]nable to initialize backend '(\w+)'|Unknown backend:? '?(\w+)", text):
        name = absent[1] or absent[2]
        return f"got JAX_PLATFORMS {name}, of which there is none here ({text[:160]}), try JAX_PLATFORMS=cpu", 2
    if isinstance(error, AssertionError) and _raised_in(error).endswith("xla_bridge.py"):  # found no platform at all
        name = os.environ.get("JAX_PLATFORMS", "")
        return f"got JAX_PLATFORMS {name!r}, of which there is none here, try JAX_PLATFORMS=cpu", 2
    if "RESOURCE_EXHAUSTED" in text:
        return (
            f"the device is out of memory: {text[:200]}; try half the --data.batch-size, or the same batch with "
            "--train.accumulate 2, --model.remat full, or a larger --mesh.fsdp"
        ), 1
    if isinstance(error, MemoryError):
        return f"the machine is out of memory ({text[:160] or 'MemoryError'}); try smaller sizes", 1
    if isinstance(error, RecursionError):
        return "something that was read is nested too deep; try again with --traceback to see what", 1
    if re.fullmatch(r"(Concretization|Tracer)\w*Error|NonConcreteBooleanIndexError", type(error).__name__):
        return _of_tracing(error)
    return None, 1


def _of_tracing(error: BaseException) -> tuple[str | None, int]:
    """Explain code from outside that asks for the value of an array while a step is traced; None if it is not that."""
    if (frame := _in_own_code(error)) is None:
        return None, 1
    return (
        f"got {frame.code.co_qualname} in {frame.code.co_filename}, whose line {frame.line} asks for the value of an "
        "array while the step is traced, expected operations on arrays, try jnp.where(condition, a, b) in place of if"
    ), ExitCode.MISTAKE


def _raised_in(error: BaseException) -> str:
    """Return the file whose code raised the error."""
    frames = traceback.extract_tb(error.__traceback__)
    return frames[-1].filename if frames else ""


def _of_files(error: OSError) -> tuple[str, int] | None:
    """Explain an error of a file or a disk; None if it is something else."""
    name = " and ".join(repr(os.fsdecode(n)) for n in (error.filename, error.filename2) if isinstance(n, str | bytes))
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" at {name}" if name else ""
        return f"the disk is full{where}; try again when there is room, nothing that was saved is lost", 1
    if not name:
        return None
    got = f"got {name}: {(error.strerror or type(error).__name__).lower()}"
    if error.errno == errno.EROFS:
        return f"{got}, expected a place that can be written to, try another directory", 2
    if isinstance(error, PermissionError):
        return f"{got}, expected a path that this user may read and write, try ls -ld on it", 2
    if isinstance(error, FileNotFoundError):
        return f"{got}, expected a path that is there", 2
    if isinstance(error, NotADirectoryError | IsADirectoryError | FileExistsError):
        return f"{got}, expected {'a file' if isinstance(error, IsADirectoryError) else 'a directory'} there", 2
    return got, 2 if error.errno in (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.ENOTEMPTY) else 1


def unexpected(error: Exception) -> str:
    """Return the message for an unforeseen error, with the line of the user's own code that it arose in, if there is
    one; the traceback is kept in a file."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    frame = _in_own_code(error)
    whose = "a fault of jaxmodels"
    if frame:
        whose = f"in {frame.code.co_filename}, line {frame.line}, in {frame.code.co_qualname}"
    try:
        with tempfile.NamedTemporaryFile("w", prefix="jaxmodels-", suffix=".traceback", delete=False) as file:
            traceback.print_exception(error, file=file)
    except OSError:
        return f"{text} ({whose}: run it again with --traceback to see where)"
    return f"{text} ({whose}: the traceback is in {file.name}, and printed with --traceback)"


class _Frame(NamedTuple):
    code: types.CodeType
    line: int


def _in_own_code(error: BaseException) -> _Frame | None:
    """Return the last frame of an error that is neither in a package nor Python's own; None if there is none."""
    paths = sysconfig.get_paths()
    known = tuple(
        os.path.realpath(path) + os.sep for path in (Path(__file__).parent, paths["stdlib"], paths["purelib"])
    )
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        path = os.path.realpath(frame.f_code.co_filename)
        installed = {"site-packages", "dist-packages"} & set(Path(path).parts)
        if os.path.isfile(path) and not path.startswith(known) and not installed:
            return _Frame(frame.f_code, line)
    return None


def _several() -> bool:
    """Whether this is one of several processes, whose logs are read later."""
    distributed = sys.modules.get("jax._src.distributed")
    return distributed is not None and distributed.global_state.client is not None


def _reader_left() -> bool:
    """Whether standard output is closed (`jaxmodels models | head`)."""
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), 0)
    except (AttributeError, OSError, ValueError):
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


def dispatch(argv: list[str]) -> int:
    """Find the command and run it."""
    if not argv or argv[0] in HELP:
        print(
            "usage: jaxmodels COMMAND [--help] [--traceback]; jaxmodels --version\n\n"
            f"{commands.listed()}\n\n"
            "exit codes: 0 done, 2 a mistake in what was asked, 3 an alarm of monitor, 75 stopped but saved (run it\n"
            "again), 1 anything else"
        )
        return 0
    name, rest = argv[0], argv[1:]
    if name in ("--version", "-V"):
        from jaxmodels import __version__

        print(f"jaxmodels {__version__}")
        return 0
    if (not rest or rest[0] in HELP) and name not in commands.COMMANDS.builtin and commands.members(name):
        print(f"usage: jaxmodels {name} COMMAND [--help]\n\n{commands.listed(f'{name} ')}")
        return 0
    return commands.run(*commands.split(argv))
