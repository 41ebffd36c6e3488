"""The supervisor of a node with real processes: all cases run beside each other, each test reads one."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxmodels.launch import node

ROOT = Path(__file__).resolve().parents[2]

# A training run in small: a psum each step, and what happens at step 20 by the case's name.
RANK = textwrap.dedent("""
    import os, signal, subprocess, sys, time

    from jaxmodels.parallel import distributed

    case, rank = sys.argv[1], int(os.environ["JAXMODELS_PROCESS_ID"])
    print("pid", os.getpid(), flush=True)
    if case == "mistake":
        print("error: got x, expected y, try z", flush=True)
        sys.exit(2)
    if case == "frozen_early" and rank == 1:
        print("at", time.time(), flush=True)
        os.kill(os.getpid(), signal.SIGSTOP)
    distributed.initialize()

    import jax
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = jax.make_mesh((jax.device_count(),), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("x")
    ones = jax.make_array_from_callback(
        (jax.device_count(),), NamedSharding(mesh, spec), lambda index: np.ones(jax.device_count(), np.float32)[index]
    )
    psum = jax.jit(jax.shard_map(lambda x: jax.lax.psum(x, "x"), mesh=mesh, in_specs=spec, out_specs=PartitionSpec()))
    print("sum", float(psum(ones)[0]), "main", distributed.is_main(), flush=True)
    if rank == 0 and case == "exception":
        print("pid", subprocess.Popen(["sleep", "600"]).pid, flush=True)

    def hang():
        while case.startswith("spins"):
            pass
        time.sleep(600)

    with distributed.Preemption() as preemption:
        for step in range(3000):
            psum(ones).block_until_ready()
            if step == 20:
                print("at", time.time(), flush=True)
                if case == "done":
                    time.sleep(rank)
                    sys.exit(distributed.finalize(0))
                if case in ("sleeps_1", "spins_0", "cancelled_1") and rank == int(case[-1]):
                    hang()
                if rank == 1 and case == "exception":
                    raise KeyError("no such thing")
                if rank == 1 and case == "late_mistake":
                    print("error: late", flush=True)
                    sys.exit(distributed.finalize(2))
                if rank == 1 and case == "interrupt":
                    os.kill(os.getpid(), signal.SIGINT)
                if case in (f"killed_{rank}", f"frozen_{rank}"):
                    os.kill(os.getpid(), signal.SIGKILL if case.startswith("killed") else signal.SIGSTOP)
            # After step 20 the interrupted case evaluates: it polls on and on within one step.
            if preemption.requested(min(step, 20) if case == "interrupt" else step):
                print("stopped at", step, "of", preemption.step, flush=True)
                sys.exit(distributed.finalize(75))
            time.sleep(0.02)
""")
DRIVER = (
    "import sys; from jaxmodels.launch import limits; from jaxmodels.launch.node import Node, run; "
    "spins = sys.argv[-1].startswith('spins'); "
    "limits.MARGIN_SECONDS, limits.PATIENCE_SECONDS = (2.0, 4.0) if spins else (60.0, 90.0); "
    "grace = 3.0 if sys.argv[-1].startswith('sleeps') else 60.0; "
    "options = Node(processes=2, devices=2, platform='cpu', restarts=0, grace=grace); "
    "sys.exit(run(sys.argv[1:], options))"
)
CASES = ("done", "mistake", "late_mistake", "exception", "killed_0", "killed_1", "frozen_0", "frozen_1", "frozen_early",
         "interrupt", "terminated", "launcher_killed", "cancelled_1", "sleeps_1", "spins_0")  # fmt: skip


class Case:
    """One launcher at work, its output, and when it ended."""

    def __init__(self, name: str, script: Path, turns: threading.Semaphore) -> None:
        self.name, self.script, self.turns = name, script, turns
        self.output, self.code, self.ended = "", 0, 0.0
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        with self.turns:
            self.process = subprocess.Popen(
                [sys.executable, "-c", DRIVER, sys.executable, str(self.script), self.name],
                cwd=ROOT, env=os.environ | {"JAXMODELS_HEARTBEAT_SECONDS": "5", "PYTHONPATH": str(ROOT)}, text=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            assert self.process.stdout is not None
            for line in self.process.stdout:
                self.output += line
                if "] at " in line and self.output.count("] at ") == 2:
                    if self.name in ("terminated", "sleeps_1"):
                        self.process.send_signal(signal.SIGTERM)
                    elif self.name == "cancelled_1":
                        threading.Thread(target=self._interrupt, daemon=True).start()
                    elif self.name == "launcher_killed":
                        self.process.kill()
            self.code = self.process.wait()
            self.ended = time.time()

    def _interrupt(self) -> None:
        """Press Ctrl-C again and again, as signals that come at once are one."""
        while self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            time.sleep(0.5)

    def finish(self) -> Case:
        self.thread.join(timeout=120)
        assert not self.thread.is_alive(), self.output
        return self

    def seconds_since_the_event(self) -> float:
        return self.ended - min(float(at) for at in re.findall(r"\] at ([\d.]+)", self.output))


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Case]]:
    script = tmp_path_factory.mktemp("launch") / "rank.py"
    script.write_text(RANK)
    turns = threading.Semaphore(3)
    # The ones that wait longest begin first.
    cases = {name: Case(name, script, turns) for name in sorted(CASES, key=lambda name: not name.startswith("frozen"))}
    yield cases
    for case in cases.values():
        case.finish()


def alive(case: Case) -> list[int]:
    """Processes of a case that run yet, allowing a moment for the kernel to end them."""
    pids = [int(pid) for pid in re.findall(r"\] pid (\d+)", case.output)]
    assert len(pids) >= 2, case.output
    running: list[int] = []
    for _ in range(50):
        running = []
        for pid in pids:
            stat = Path(f"/proc/{pid}/stat")
            if stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
                running.append(pid)
        if not running:
            break
        time.sleep(0.1)
    return running


def test_every_line_has_its_rank_and_success_is_0(cases: dict[str, Case]) -> None:
    case = cases["done"].finish()
    assert case.code == 0, case.output
    assert "[0] sum 4.0 main True\n" in case.output
    assert "[1] sum 4.0 main False\n" in case.output
    assert all(re.match(r"\[[01]\] ", line) for line in case.output.splitlines()), case.output


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("exception", r"rank 1 failed first, .*: exit code 1: KeyError: 'no such thing'"),
        ("killed_0", r"rank 0 failed first, .*: killed by SIGKILL"),
        ("killed_1", r"rank 1 failed first, .*: killed by SIGKILL"),
        ("frozen_0", r"rank 0 failed first, .*: frozen"),
        ("frozen_1", r"rank 1 failed first, .*: frozen"),
        ("frozen_early", r"rank 1 failed first, .*: frozen"),
    ],
)
def test_the_first_that_failed_is_named_within_30_seconds_and_nobody_is_left(
    cases: dict[str, Case], name: str, said: str
) -> None:
    case = cases[name].finish()
    assert case.code == 1, case.output
    assert len(re.findall("^launch: ", case.output, re.MULTILINE)) == 1, case.output
    assert re.search(f"^launch: {said}", case.output, re.MULTILINE), case.output
    assert case.seconds_since_the_event() < 30
    assert alive(case) == []


@pytest.mark.parametrize(
    ("name", "late"),
    [
        ("sleeps_1", "still running 3 s after it was told to stop"),
        ("spins_0", r"no progress for \d+ s in start, where up to [\d.]+ s are normal for this run"),
    ],
)
def test_a_rank_that_is_stuck_in_python_is_named_by_itself_and_after_sigterm(
    cases: dict[str, Case], name: str, late: str
) -> None:
    case, rank = cases[name].finish(), name[-1]
    assert case.code == 1, case.output
    said = rf"^launch: rank {rank} failed first, .*: {late}, stuck at \S+rank\.py:\d+ in hang"
    assert re.search(said, case.output, re.MULTILINE), case.output
    warning = rf"^launch: warning: rank {rank} on \S+: no progress for .*, stuck at \S+rank\.py:\d+ in hang"
    assert len(re.findall(warning, case.output, re.MULTILINE)) == (name == "spins_0"), case.output
    assert alive(case) == []


def test_the_last_lines_of_the_one_that_failed_are_shown(cases: dict[str, Case]) -> None:
    _, _, last = cases["exception"].finish().output.partition("its last lines:")
    assert 'raise KeyError("no such thing")' in last


def test_a_mistake_is_said_once_and_passes_through_as_2(cases: dict[str, Case]) -> None:
    case = cases["mistake"].finish()
    assert case.code == 2, case.output
    assert case.output.count("got x, expected y, try z") == 1, case.output


def test_a_mistake_found_after_joining_does_not_wait_in_the_barrier(cases: dict[str, Case]) -> None:
    case = cases["late_mistake"].finish()
    assert case.code == 2, case.output
    assert "rank 1 ended with exit code 2" in case.output
    assert case.seconds_since_the_event() < 30


@pytest.mark.parametrize("name", ["terminated", "interrupt"])
def test_a_signal_stops_all_ranks_at_the_same_step_with_75(cases: dict[str, Case], name: str) -> None:
    case = cases[name].finish()
    assert case.code == 75, case.output
    steps = re.findall(r"\[([01])\] stopped at (\d+)", case.output)
    assert sorted(rank for rank, _ in steps) == ["0", "1"], case.output
    assert steps[0][1] == steps[1][1] != "20", case.output
    assert alive(case) == []


def test_a_second_ctrl_c_ends_ranks_that_do_not_save_and_is_no_failure(cases: dict[str, Case]) -> None:
    case = cases["cancelled_1"].finish()
    assert case.code == 1, case.output
    assert "launch: ended by the second signal before all was saved" in case.output
    assert "rank 1" not in case.output and alive(case) == []


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (("--restarts", "-1"), "'-1', expected a number of at least 0"),
        (("--processes", "0"), "'0', expected a number of at least 1"),
        (("--grace", "nan"), "'nan', expected a number above 0"),
        (("--log", "/dev/null/x"), "got --log /dev/null/x"),
    ],
)
def test_a_supervisor_refuses_what_it_cannot_do_and_notes_how_it_ended(tmp_path, capsys, option, said) -> None:
    ended = ["--ended", str(tmp_path / "ended")]
    assert node.main([*ended, "--processes", "1", *option, "--", "train", "x.py"]) == 2
    assert said in capsys.readouterr().err
    assert option[0] != "--log" or (tmp_path / "ended").read_text() == "2\n"


def test_a_launcher_that_is_killed_takes_its_ranks_along(cases: dict[str, Case]) -> None:
    if sys.platform != "linux":
        pytest.skip("only Linux ends a process with its parent")
    case = cases["launcher_killed"].finish()
    assert case.code == -signal.SIGKILL
    assert alive(case) == []


def test_on_a_terminal_rank_0_has_one_of_its_own(tmp_path: Path) -> None:
    script = tmp_path / "show.py"
    script.write_text(
        textwrap.dedent("""
        import os, sys
        print("terminal", sys.stdout.isatty(), flush=True)
        if sys.stdout.isatty():
            print("columns", os.get_terminal_size(1).columns, end="\\r\\x1b[2K", flush=True)
            print("redrawn", flush=True)
    """)
    )
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER, sys.executable, str(script)],
        cwd=ROOT, env=os.environ | {"COLUMNS": "90"}, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs,
    ) as process:  # fmt: skip
        os.close(theirs)
        shown = b""
        while True:
            try:
                data = os.read(ours, 4096)
            except OSError:
                break
            if not data:
                break
            shown += data
    os.close(ours)
    assert process.returncode == 0, shown
    text = re.sub(r"\x1b\[\d*m", "", shown.decode())
    assert "[0] terminal True" in text
    assert "[1] terminal False" in text
    assert "[0] columns 86\r\x1b[2K[0] redrawn" in text
    assert text.endswith("\x1b[?25h")
