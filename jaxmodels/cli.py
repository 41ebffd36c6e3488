"""The command line: `jaxmodels train|eval|tune|plan|predict|sample|models|report|import|export|data|config`.

Exit codes: 0 done, 2 the user's mistake, 75 stopped but saved (the same command continues), 1 anything else.
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
import tempfile
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from jaxmodels.errors import UserError, nearest, printable
from jaxmodels.options import InspectOptions, PlanOptions, PrepareOptions, RunOptions, TuneOptions, configured, parse

COMMANDS = {
    "train": "train CONFIG.py [--run-dir DIR] [--resume auto|must|never] [--section.field value ...]",
    "eval": "eval RUN [--split SPLIT] [--json FILE]          metrics of a run on held-out data",
    "tune": "tune CONFIG.py --space FIELD=LOW:HIGH ... [--trials N] [--workers N]          search for good fields",
    "plan": "plan CONFIG.py --on h100:4x8,v5e:16x16,… [--search|--scaling]          a job on hardware not here",
    "predict": "predict RUN FILE...|- [--best]          labels, texts or translations of new records, as JSON lines",
    "sample": "sample RUN [--prompt TEXT] [--tokens N] [--seed N]          text from a run",
    "models": "models [NAME]          families and presets, or one model's tree of parameters",
    "report": "report RUN [RUN ...] [--out DIR] [--best]          a page of curves and pictures of runs",
    "import": "import DIR --out RUN          a run from weights in Hugging Face's format",
    "export": "export RUN DIR [--best]          a run's weights in Hugging Face's format",
    "data": "data inspect|prepare|clean|train-tokenizer          what the model will see; texts made fit to train on",
    "config": "config explain|diff          where a field's value comes from; how two runs differ",
}


def process() -> NoReturn:
    """`main` as a process of its own, which ends without a word more, whatever ends it."""
    with contextlib.suppress(AttributeError):  # a stream that is closed, or another's object
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        code = main()
    except BaseException:  # in several processes, or asked for
        traceback.print_exc()
        code = 1
    # more Ctrl-Cs would only interrupt what ends here
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        sys.stdout.flush()
    except (BrokenPipeError, AttributeError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except OSError as error:  # a full disk that stdout goes to
        print(f"error: {explain(error)[0]}", file=sys.stderr)
        code = code or 1
    if code in (0, 75):
        sys.exit(code)
    # threads that still compute would abort an interpreter that waits for none of them
    atexit._run_exitfuncs()
    logging.shutdown()
    os._exit(code)


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
            return 141  # as what ends by SIGPIPE
        message, code = explain(error)
        if traced or (message is None and _several()):
            raise
        if not getattr(error, "shown", False):  # the log of a run has said it already
            print(f"error: {printable(message or unexpected(error))}", file=sys.stderr)
    if (distributed := sys.modules.get("jaxmodels.parallel.distributed")) is not None:
        code = distributed.finalize(code)
    return code


def explain(error: BaseException) -> tuple[str | None, int]:
    """What to print of an error that has a message of its own, and the exit code; None: nobody foresaw it."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text, 2
    if type(error).__name__ in ("NotFinite", "CheckpointError"):
        return text, 1
    if isinstance(error, OSError) and (said := _of_files(error)) is not None:
        return said
    if re.search(r"No space left on device|Disk quota exceeded", text):  # of a library that writes in C++
        return f"the disk is full: {text[:200]}; try again when there is room, nothing that was saved is lost", 1
    if unknown := re.search(r"No such compile option: '(\w+)'", text):
        return f"got train.xla {unknown.group(1)}, which this compiler does not know, try without it", 2
    if absent := re.search(r"[Uu]nable to initialize backend '(\w+)'|Unknown backend:? '?(\w+)", text):
        name = absent[1] or absent[2]
        return f"got JAX_PLATFORMS {name}, of which there is none here ({text[:160]}), try JAX_PLATFORMS=cpu", 2
    if isinstance(error, AssertionError) and _raised_in(error).endswith("xla_bridge.py"):  # it found no platform at all
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
    return None, 1


def _raised_in(error: BaseException) -> str:
    """The file whose code raised the error."""
    frames = traceback.extract_tb(error.__traceback__)
    return frames[-1].filename if frames else ""


def _of_files(error: OSError) -> tuple[str, int] | None:
    """The same of a file or a disk; None: it is of something else."""
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
    """What to print of an error that nobody foresaw; the traceback is kept in a file."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    try:
        with tempfile.NamedTemporaryFile("w", prefix="jaxmodels-", suffix=".traceback", delete=False) as file:
            traceback.print_exception(error, file=file)
    except OSError:
        return f"{text} (a fault of jaxmodels: run it again with --traceback to see where)"
    return f"{text} (a fault of jaxmodels: the traceback is in {file.name}, and printed with --traceback)"


def _several() -> bool:
    """Whether this is one of several processes, whose logs are read afterwards."""
    distributed = sys.modules.get("jax._src.distributed")
    return distributed is not None and distributed.global_state.client is not None


def _reader_left() -> bool:
    """Whether nobody reads our output any more (`jaxmodels models | head`)."""
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), 0)
    except (AttributeError, OSError, ValueError):
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


def dispatch(argv: list[str]) -> int:
    """Find the command and run it."""
    if not argv or argv[0] in ("-h", "--help"):
        print(
            "usage: jaxmodels COMMAND [--help] [--traceback]; jaxmodels --version\n\n  "
            + "\n  ".join(COMMANDS.values())
            + "\n\n"
            "exit codes: 0 done, 2 a mistake in what was asked, 75 stopped but saved (run it again), 1 anything else"
        )
        return 0
    name, rest = argv[0], argv[1:]
    if name in ("--version", "-V"):
        from jaxmodels import __version__

        print(f"jaxmodels {__version__}")
        return 0
    if name not in COMMANDS:
        raise UserError(f"got command {name!r}, expected one of {', '.join(COMMANDS)}{nearest(name, COMMANDS)}")
    if name in ("train", "tune", "plan"):
        return {"train": train, "tune": tune, "plan": plan}[name](rest)
    from jaxmodels import commands

    groups: dict[str, dict[str, Callable[..., Any]]] = {
        "data": {"inspect": inspect, "prepare": prepare, "clean": clean, "train-tokenizer": commands.train_tokenizer},
        "config": {"explain": commands.config_explain, "diff": commands.config_diff},
    }
    if name not in groups:
        if name in ("import", "export"):
            from jaxmodels.hf import commands as weights

            function = weights.import_run if name == "import" else weights.export_run
        elif name == "predict":
            from jaxmodels import predict

            function = predict.predict
        elif name == "report":
            from jaxmodels.report import command

            function = command.report
        else:
            function = {"eval": commands.evaluate, "sample": commands.sample, "models": commands.models}[name]
        return parse(function, rest, f"jaxmodels {name}") or 0
    known = groups[name]
    if not rest or rest[0] in ("-h", "--help"):
        print(f"usage: jaxmodels {name} {'|'.join(known)} [--help]")
        return 0
    if rest[0] not in known:
        raise UserError(f"got jaxmodels {name} {rest[0]}, expected one of {', '.join(known)}{nearest(rest[0], known)}")
    function = known[rest[0]]
    if function in (inspect, prepare, clean):
        return function(rest[1:])
    return parse(function, rest[1:], f"jaxmodels {name} {rest[0]}") or 0


def train(argv: list[str]) -> int:
    """`jaxmodels train CONFIG.py`."""
    cfg, where = configured(argv, "jaxmodels train", RunOptions)
    from jaxmodels import commands

    return commands.train(cfg, where, argv[0], argv[1:])


def tune(argv: list[str]) -> int:
    """`jaxmodels tune CONFIG.py --space …`."""
    cfg, options = configured(argv, "jaxmodels tune", TuneOptions)
    from jaxmodels import commands

    commands.tune(cfg, options, argv[0], argv)
    return 0


def plan(argv: list[str]) -> int:
    """`jaxmodels plan CONFIG.py --on …`."""
    cfg, options = configured(argv, "jaxmodels plan", PlanOptions)
    import jax

    from jaxmodels.plan import command

    jax.config.update("jax_platforms", "cpu")  # shapes are all there is: an accelerator that is here is not taken
    command.command(cfg, options, argv[0])
    return 0


def inspect(argv: list[str]) -> int:
    """`jaxmodels data inspect CONFIG.py [--out FILE]`."""
    cfg, where = configured(argv, "jaxmodels data inspect", InspectOptions)
    from jaxmodels.data import commands

    commands.inspect(cfg, out=where.out)
    return 0


def prepare(argv: list[str]) -> int:
    """`jaxmodels data prepare CONFIG.py --out DIR`."""
    cfg, where = configured(argv, "jaxmodels data prepare", PrepareOptions)
    from jaxmodels.data import commands

    commands.prepare(cfg.data, where.out)
    return 0


def clean(argv: list[str]) -> int:
    """`jaxmodels data clean FILE... --out FILE.jsonl`."""
    from jaxmodels.data.clean import command

    return parse(command, argv, "jaxmodels data clean") or 0
