"""Every kind of fault, with real processes that train nothing: named rightly, started again or not, no process left.

All cases run beside each other; each test reads one.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxmodels.launch import events, story

ROOT = Path(__file__).resolve().parents[2]

# Ranks that go step by step together, as by a collective: each waits until the others have come as far.
RANK = textwrap.dedent("""
    import os, signal, sys, time
    from pathlib import Path

    from jaxmodels.parallel import progress

    case, run = sys.argv[1], Path(sys.argv[2])
    rank, count, attempt = (int(os.environ[f"JAXMODELS_{x}"]) for x in ("PROCESS_ID", "NUM_PROCESSES", "ATTEMPT"))
    print("pid", os.getpid(), flush=True)
    if case == "mistake":
        sys.exit(2)
    if case == "told_early":
        time.sleep(600)
    progress.begin()
    if rank == 0:
        progress.run(run)
        (run / "checkpoints").mkdir(exist_ok=True)
    saved = [int(path.name) for path in run.glob("checkpoints/*")]
    first = max(saved, default=0)
    places = run / f"attempt{attempt}"
    places.mkdir(exist_ok=True)

    sys.path.insert(0, str(Path(__file__).parent / "site-packages" / "jax"))
    from collective import meet

    class NotFinite(RuntimeError):
        pass

    def fail(error):
        progress.failed(error)
        print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(1)

    def hang():
        time.sleep(600)

    def save(step):
        if rank == 0:
            (run / "checkpoints" / str(step)).mkdir(exist_ok=True)

    if case == "full_fewer" and attempt == 1:
        fail(MemoryError("cannot allocate 8 GiB"))
    told = []
    signal.signal(signal.SIGTERM, lambda *_: os._exit(75) if case == "requeued" else told.append(True))
    long = case in ("slow", "requeued", "first_gone") or (case.endswith("fewer") and attempt == 0)
    long = long or (case == "back_fewer" and attempt == 1)
    for step in range(first, 1000 if long else max(80, first + 20)):
        if told:
            save(step)
            os._exit(75)
        progress.phase("data", step)
        if case == "starved" and step == 40 and rank == 1 and attempt == 0:
            hang()
        progress.phase("step", step)
        time.sleep(0.01)
        if rank == 1 and case == "slow":
            time.sleep(0.04)
        if case == "one_by_one" and step == 40:
            if rank == 1:
                (places / "1").write_text("999999999")  # nobody waits for it any more
                os._exit(0)
            for _ in range(40):
                time.sleep(0.1)
                progress.poll()
        if rank == 1 and step == 40 and (attempt == 0 or case == "hopeless"):
            print("at", time.time(), flush=True)
            if case in ("killed", "hopeless"):
                os.kill(os.getpid(), signal.SIGKILL)
            elif case == "died":
                os.kill(os.getpid(), signal.SIGSEGV)
            elif case == "raised":
                fail(KeyError("no such thing"))
            elif case == "memory":
                fail(MemoryError("cannot allocate 8 GiB"))
            elif case == "not-finite":
                fail(NotFinite("got loss nan at step 40"))
            elif case == "frozen":
                os.kill(os.getpid(), signal.SIGSTOP)
            elif case == "stuck":
                hang()
        before = time.perf_counter()
        meet(places, rank, count, step)
        progress.waited(device=time.perf_counter() - before)
        progress.poll()
        if step == 20 and rank == 0 and case == "raised" and attempt == 0:
            progress.unsaved(10, "checkpoint of step 10 NOT saved: No space left on device")
        if step == 20 and case != "requeued":
            save(step)
            print("saved", flush=True)
        if case == "slow" and step % 50 == 49 and '"event": "slow"' in (run / "events.jsonl").read_text():
            break
    print("ended at", step, flush=True)
""")
# For a supervisor this is JAX's code: a main thread there waits for a device.
COLLECTIVE = textwrap.dedent("""
    import time

    def meet(places, rank, count, step):
        own = places / str(rank)
        own.write_text(f"{step:9d}")
        others = [places / str(other) for other in range(count)]
        while not all(other.exists() and int(other.read_text() or 0) >= step for other in others):
            time.sleep(0.005)
""")
DRIVER = """
import sys
from jaxmodels.launch import follow, lead, limits, node, wire
from jaxmodels.launch.cluster import Cluster
limits.MARGIN_SECONDS, limits.PATIENCE_SECONDS, lead.FROZEN_SECONDS = 1.5, 3.0, 1.0
wire.LOST_SECONDS = lead.LOST_SECONDS = 4.0
follow.RETURN_SECONDS = 10.0
if sys.argv[-2] == "one_by_one":
    lead._LEAVE_SECONDS = 1.5
limits._WINDOW_SECONDS = 1.0
at, nodes, port = map(int, sys.argv[1:4])
least = 1 if "fewer" in sys.argv[-2] else None
options = node.Node(processes=2 // nodes, platform="cpu", min_nodes=least)
where = Cluster(nodes, at, "127.0.0.1", port)
sys.exit(node.run([sys.executable, *sys.argv[4:]], options, where))
"""
ONE_NODE = (
    "killed",
    "died",
    "raised",
    "memory",
    "not-finite",
    "frozen",
    "stuck",
    "starved",
    "slow",
    "hopeless",
    "mistake",
    "requeued",
    "one_by_one",
    "told_early",
)
TWO_NODES = ("first_gone", "gone_fewer", "silent_fewer", "back_fewer", "full_fewer")


class Case:
    """One job at work."""

    def __init__(self, name: str, folder: Path, turns: threading.Semaphore) -> None:
        self.name, self.run, self.turns = name, folder / name, turns
        self.script = folder / "rank.py"
        self.nodes = 2 if name in TWO_NODES else 1
        self.run.mkdir()
        self.output, self.code = "", 0
        if name == "requeued":  # supervisors before this one have started it three times
            for attempt in range(3):
                events.append(self.run, "start", attempt=attempt, job="demo")
                events.append(self.run, "preempted")
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _start(self, node: int, port: int) -> subprocess.Popen[str]:
        numbers = [str(number) for number in (node, self.nodes, port)]
        return subprocess.Popen(
            [sys.executable, "-c", DRIVER, *numbers, str(self.script), self.name, str(self.run)],
            cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT), "JAXMODELS_JOB": '{"name": "demo"}'}, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def _run(self) -> None:
        with self.turns:
            port = two_ports()
            other = self._start(1, port) if self.nodes > 1 else None
            process = self._start(0, port)
            assert process.stdout is not None
            for line in process.stdout:
                self.output += line
                if self.name == "told_early" and "] pid" in line and self.output.count("] pid") == 2:
                    process.send_signal(signal.SIGTERM)
                if self.name == "requeued" and "] at " in line:
                    process.send_signal(signal.SIGTERM)
                if self.name == "first_gone" and "saved" in line:
                    time.sleep(3.0)  # in which the supervisors tell each other where the run is
                    process.kill()
                elif other is not None and "saved" in line and self.output.count("saved") == 1:
                    other.send_signal(signal.SIGSTOP if "silent" in self.name else signal.SIGKILL)
                again = {"back_fewer": 1, "full_fewer": 2}.get(self.name)
                if other is not None and "launch: restart" in line and self.output.count("launch: restart") == again:
                    self.output += other.communicate()[0]
                    other = self._start(1, port)
            self.code = process.wait()
            if other is not None:
                if self.name == "first_gone":
                    self.code = other.wait()
                other.kill()
                self.output += other.communicate()[0]

    def finish(self) -> Case:
        self.thread.join(timeout=120)
        assert not self.thread.is_alive(), self.output
        return self

    def events(self, name: str) -> list[dict]:
        return [row for row in events.read(self.run) if row["event"] == name]

    def left(self) -> list[int]:
        """Processes of it that run yet, allowing a moment for the kernel to end them."""
        pids = [int(pid) for pid in re.findall(r"\] pid (\d+)", self.output)]
        assert len(pids) >= 2, self.output
        running: list[int] = []
        for _ in range(50):
            running = [pid for pid in pids if alive(pid)]
            if not running:
                break
            time.sleep(0.1)
        return running


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def two_ports() -> int:
    while True:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            try:
                other.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Case]]:
    folder = tmp_path_factory.mktemp("faults")
    (folder / "rank.py").write_text(RANK)
    (folder / "site-packages" / "jax").mkdir(parents=True)
    (folder / "site-packages" / "jax" / "collective.py").write_text(COLLECTIVE)
    turns = threading.Semaphore(4)
    cases = {name: Case(name, folder, turns) for name in (*TWO_NODES, *ONE_NODE)}
    yield cases
    for case in cases.values():
        case.finish()


@pytest.mark.parametrize("name", ["killed", "died", "raised", "memory", "not-finite", "frozen", "stuck", "starved"])
def test_each_kind_is_named_with_rank_and_step_and_a_restart_goes_on_from_the_checkpoint(
    cases: dict[str, Case], name: str
) -> None:
    case = cases[name].finish()
    assert case.code == 0, case.output
    (failed,) = case.events("failed")
    assert (failed["kind"], failed["rank"], failed["step"]) == (name, 1, 40), failed
    assert failed["host"] == socket.gethostname() and failed["device"] == "cpu"
    assert failed["phase"] == ("data" if name == "starved" else "step")
    assert [(row["attempt"], row["step"]) for row in case.events("start")] == [(0, None), (1, 20)]
    assert [row["step"] for row in case.events("saved")] == [20]
    assert [row["event"] for row in events.read(case.run)][-1] == "done"
    assert "rank 1 failed first" in case.output and case.output.count("ended at 79") == 2
    assert case.left() == []


def test_a_checkpoint_that_could_not_be_saved_is_told_once(cases: dict[str, Case]) -> None:
    (unsaved,) = cases["raised"].finish().events("unsaved")
    assert (unsaved["rank"], unsaved["step"], unsaved["phase"]) == (0, 10, "save")
    assert unsaved["message"] == "checkpoint of step 10 NOT saved: No space left on device"


def test_the_stacks_of_all_ranks_are_kept_grouped_by_likeness(cases: dict[str, Case]) -> None:
    (failed,) = cases["stuck"].finish().events("failed")
    groups = {tuple(group["ranks"]): group["stack"][0] for group in failed["stacks"]}
    assert groups[1,].endswith("in hang") and groups[0,].endswith("in meet")
    assert "stuck at" in failed["message"] and "in hang" in failed["message"]
    (warned,) = cases["stuck"].events("slow")
    assert (warned["kind"], warned["rank"]) == ("stuck", 1) and warned["time"] < failed["time"]


def test_a_straggler_is_named_while_it_runs_with_its_factor(cases: dict[str, Case]) -> None:
    case = cases["slow"].finish()
    assert case.code == 0, case.output
    slow = case.events("slow")[0]
    assert (slow["rank"], slow["kind"]) == (1, "slow")
    assert 1.5 < slow["factor"] < 50 and slow["since"] < slow["time"]
    assert case.events("failed") == []


def test_three_restarts_without_progress_are_the_last(cases: dict[str, Case]) -> None:
    case = cases["hopeless"].finish()
    assert case.code == 1, case.output
    assert [row["fruitless"] for row in case.events("restart")] == [1, 2, 3]
    assert len(case.events("failed")) == 4 and "given up after 3 restarts without progress" in case.output
    assert case.left() == []


def test_a_mistake_never_restarts(cases: dict[str, Case]) -> None:
    case = cases["mistake"].finish()
    assert case.code == 2, case.output
    assert case.output.count("pid") == 2 and "restart" not in case.output


def test_told_to_stop_before_its_first_step_a_job_has_nothing_to_save(cases: dict[str, Case]) -> None:
    case = cases["told_early"].finish()
    assert case.code == 75, case.output
    assert "stopped before the first step" in case.output and case.left() == []


@pytest.mark.parametrize(("name", "kind"), [("gone_fewer", "died"), ("silent_fewer", "link")])
def test_a_lost_node_is_named_and_the_others_go_on(cases: dict[str, Case], name: str, kind: str) -> None:
    case = cases[name].finish()
    assert case.code == 0, case.output
    (failed,) = case.events("failed")
    assert (failed["kind"], failed["rank"]) == (kind, 1), failed
    assert [row["processes"] for row in case.events("start")] == [2, 1]
    assert case.events("shrunk")[0]["nodes"] == 1
    assert case.output.count("ended at 79") == 1
    assert case.left() == []


def test_a_node_that_comes_back_is_taken_in_after_all_have_saved(cases: dict[str, Case]) -> None:
    case = cases["back_fewer"].finish()
    assert case.code == 0, case.output
    assert [row["processes"] for row in case.events("start")] == [2, 1, 2], case.output
    assert [row["event"] for row in events.read(case.run) if row["event"] in ("shrunk", "preempted", "grown")] == [
        "shrunk", "preempted", "grown",
    ]  # fmt: skip
    (first, second) = (row["step"] for row in case.events("saved"))
    assert first == 20 < second
    assert case.output.count(f"ended at {max(79, second + 19)}") == 2
    assert case.left() == []


def test_where_fewer_nodes_have_too_little_memory_all_are_waited_for(cases: dict[str, Case]) -> None:
    case = cases["full_fewer"].finish()
    assert case.code == 0, case.output
    assert [row["kind"] for row in case.events("failed")] == ["died", "memory"]
    assert [row["processes"] for row in case.events("start")] == [2, 1, 2], case.output
    assert case.left() == []


def test_without_node_0_the_others_note_it_end_their_ranks_and_ask_to_be_started_again(cases: dict[str, Case]) -> None:
    case = cases["first_gone"].finish()
    assert case.code == 75, case.output
    (failed,) = case.events("failed")
    assert (failed["kind"], failed["leader"]) == ("died", True) and "supervisor of node 0" in failed["message"]
    assert "is gone: the ranks here were ended" in case.output and "has to be started again" in case.output
    assert story.fruitless(events.read(case.run), "demo", -1) == 0
    assert case.left() == []


def test_a_job_that_is_started_again_and_again_without_progress_is_given_up(cases: dict[str, Case]) -> None:
    case = cases["requeued"].finish()
    assert case.code == 1, case.output
    assert "given up: 4 attempts of job demo came to no newer checkpoint" in case.output
    assert case.left() == []


def test_a_rank_that_goes_on_alone_is_left_to_it(cases: dict[str, Case]) -> None:
    case = cases["one_by_one"].finish()
    assert case.code == 0, case.output
    assert case.output.count("ended at 79") == 1 and case.events("failed") == []


def test_only_attempts_of_the_same_job_at_the_same_checkpoint_are_without_progress() -> None:
    def start(job: str | None, step: int | None) -> dict:
        return {"event": "start", "step": step, **({"job": job} if job else {})}

    rows = [start("a", None), start("b", 20), start("a", 20), {"event": "preempted"}, start(None, 20), start("a", 20)]
    assert story.fruitless(rows, "a", 20) == 2
    assert story.fruitless([*rows, {"event": "failed", "leader": True}], "a", 20) == 1
    assert story.fruitless([*rows, {"event": "failed"}], "a", 20) == 2
    assert story.fruitless(rows, "a", 40) == 0
    assert story.fruitless(rows, "", 20) == 0
