"""`python -m benchmarks compare BASE [HEAD]`: whether a training step has become slower between two commits.

Each commit lies in a work tree of its own. Processes of both, and a second one of the base, take turns of a few steps;
`benchmarks.paired` says how a verdict follows, and that the threshold is the machine's own noise.
"""

from __future__ import annotations

import contextlib
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional

from benchmarks import paired, record
from benchmarks.paired import Turn, Verdict
from benchmarks.step import Contestant, enter
from jaxmodels.commands.options import NoOptions, configured
from jaxmodels.errors import UserError, check_place
from jaxmodels.fields import Count, Range, Section
from jaxmodels.launch.signals import handled

FEWEST, MOST = 6, 16
"""Blocks of a comparison: so many before a verdict, and after so many there is one whatever the noise."""
COLUMNS = {
    "block": "block", "base": "base, ms a step", "again": "the base in another process", "head": "head",
    "slowdown": "head ÷ base - 1, %", "noise": "base ÷ base - 1, %",
}  # fmt: skip


@dataclass(frozen=True)
class Options(Section):
    """What is compared. It needs a machine that does little else, and at most so many minutes."""

    commits: Positional[tuple[str, ...]]
    """BASE and HEAD, as git names commits; without HEAD the tree as it is, with what is not committed."""
    config: str = "configs/gpt_peers.py"
    """Config file whose training step is timed, as each commit has it."""
    override: str = "--model.layers 2"
    """Fields of the config, as on the command line."""
    rounds: Annotated[int, Range(3, 1000)] = 8
    """Turns of each process in a block."""
    steps: Count = 3
    """Steps a turn."""
    minutes: Annotated[float, Range(0.1, 1e4)] = 9.0
    """No block is begun after so many minutes of a comparison."""
    bisect: bool = False
    """If HEAD is slower, name the commit after BASE from which on it is."""
    out: Path | None = None
    """Folder for a record of the turns; by default there is none."""


def run(options: Options) -> int:
    """Compare, and print the verdict; return 1 if HEAD is slower.

    Raises:
        UserError: an option is wrong, or a process of one of the commits does not start.
    """
    if not 1 <= len(options.commits) <= 2:
        raise UserError(f"got {len(options.commits)} commits, expected BASE and perhaps HEAD, try HEAD~1 HEAD")
    if options.bisect and len(options.commits) == 1:
        raise UserError("got --bisect without HEAD, expected two commits, try HEAD~8 HEAD")
    if options.out is not None:
        check_place(options.out, "--out", folder=True)
    arguments = [options.config, *shlex.split(options.override)]
    configured(arguments, "python -m benchmarks compare", NoOptions)
    base, *rest = (commit(each) for each in options.commits)
    between = commits(base, rest[0]) if options.bisect else []
    with handled(leave), tempfile.TemporaryDirectory(prefix="compare-") as folder:
        where = Path(folder)
        with tree(where, base) as before:

            def against(other: str) -> tuple[Verdict, list[list[Turn]]]:
                with tree(where, other) if other else contextlib.nullcontext(record.ROOT) as after:
                    return compared(options, arguments, before, after, where)

            found, blocks = against(rest[0] if rest else "")
            summary = f"{base[:12]} against {rest[0][:12] if rest else 'the tree as it is'}: {found.line()}"
            if options.out is not None:
                write(options, blocks, found, summary)
            print(summary)
            if found.slower and options.bisect:
                first = bisected(between, lambda each: against(each)[0])
                print(f"slower since {first[:12]} {git('log', '-1', '--format=%s', first)}")
    return 1 if found.slower else 0


def git(*arguments: str) -> str:
    """Return what git prints.

    Raises:
        UserError: it fails.
    """
    done = subprocess.run(["git", *arguments], cwd=record.ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        message = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"got {message!r} of git {arguments[0]}, expected two commits of this repository")
    return done.stdout.strip()


def commit(name: str) -> str:
    """Return the full name of a commit.

    Raises:
        UserError: there is none of that name.
    """
    try:
        return git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
    except UserError:
        raise UserError(f"got commit {name!r}, expected one of this repository, try HEAD~1") from None


def commits(base: str, head: str) -> list[str]:
    """Return the commits after BASE up to HEAD, the oldest first.

    Raises:
        UserError: BASE is not before HEAD.
    """
    found = git("rev-list", "--first-parent", "--reverse", f"{base}..{head}").split()
    if git("merge-base", base, head) != base or not found:
        raise UserError(f"got BASE {base[:12]} and HEAD {head[:12]}, expected a BASE before HEAD for --bisect")
    return found


@contextlib.contextmanager
def tree(where: Path, name: str) -> Iterator[Path]:
    """A work tree of a commit, which is removed at the end."""
    place = Path(tempfile.mkdtemp(prefix=f"{name[:12]}-", dir=where))
    try:
        git("worktree", "add", "--detach", "--force", str(place), name)
        yield place
    finally:
        with contextlib.suppress(UserError):
            # the second --force removes one that is locked, as it is until git has written all of it
            git("worktree", "remove", "--force", "--force", str(place))


def leave(number: int, _: Any) -> None:
    """Leave through every `finally`, as Ctrl-C does; a second signal of the kind is ignored."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


def compared(
    options: Options, arguments: Sequence[str], before: Path, after: Path, folder: Path
) -> tuple[Verdict, list[list[Turn]]]:
    """Measure blocks until a slowdown of 5 % would be seen, and return the verdict and the turns."""
    begun, blocks = time.monotonic(), []
    while True:
        blocks.append(block(options, arguments, before, after, folder))
        late = (time.monotonic() - begun) / 60 > options.minutes
        if len(blocks) >= 2 and (late or len(blocks) >= FEWEST):
            found = paired.verdict(blocks)
            if late or found.fine or len(blocks) >= MOST:
                return found, blocks
        print(f"block {len(blocks)}: {in_words(blocks[-1])}", flush=True)


def block(options: Options, arguments: Sequence[str], before: Path, after: Path, folder: Path) -> list[Turn]:
    """Start a process of each, and let them take turns, in an order that is another one each round."""
    everyone: list[Contestant] = []
    try:
        for place in (before, before, after):
            everyone.append(enter("engine", list(arguments), folder, place))
        for each in everyone:
            each.ask(str(options.steps))  # warm
        turns = []
        for number in range(options.rounds):
            order = [(number + place) % 3 for place in range(3)][:: -1 if number // 3 % 2 else 1]
            seconds = {who: everyone[who].ask(str(options.steps))["seconds"] for who in order}
            turns.append(Turn(*(seconds[who] for who in range(3))))
        return turns
    except (RuntimeError, OSError) as error:
        raise UserError(f"got {error}, expected a commit whose {options.config} trains, try another") from None
    finally:
        for each in everyone:
            each.end()


def in_words(turns: Sequence[Turn]) -> str:
    """A block in one line."""
    row = rows([turns], 1)[0]
    return f"head {row['slowdown']:+.1f} %, the base against itself {row['noise']:+.1f} %"


def rows(blocks: Sequence[Sequence[Turn]], steps: int) -> list[dict[str, Any]]:
    """Return blocks as rows of a record, with medians over their rounds."""
    import numpy as np

    found = []
    for number, turns in enumerate(blocks, 1):
        base, again, head = (np.array(each) for each in zip(*turns, strict=True))
        found.append({
            "block": number,
            **{name: float(np.median(each)) / steps * 1e3 for name, each in
               (("base", base), ("again", again), ("head", head))},
            "slowdown": float((np.median(head / base) + np.median(head / again)) / 2 - 1) * 100,
            "noise": float(np.median(again / base) - 1) * 100,
            "seconds": [list(turn) for turn in turns],
        })  # fmt: skip
    return found


def write(options: Options, blocks: Sequence[Sequence[Turn]], found: Verdict, summary: str) -> None:
    """Write the record, in which `verdict` has the numbers."""
    notes = [summary, f"{options.config} with {options.override}; medians over {options.rounds} rounds of a block"]
    table = rows(blocks, options.steps)
    for each in table:
        each["verdict"] = {**found._asdict(), "slower": found.slower}
    record.write("compare", "Two commits", table, out=options.out, notes=notes, columns=COLUMNS)


def bisected(between: Sequence[str], judge: Any) -> str:
    """Return the first commit that is slower than BASE, given that the last is; `judge(commit)` gives a verdict."""
    low, high = 0, len(between) - 1
    while low < high:
        middle = (low + high) // 2
        found = judge(between[middle])
        print(f"{between[middle][:12]}: {found.line()}", flush=True)
        low, high = (low, middle) if found.slower else (middle + 1, high)
    return between[high]
