"""A training on a SLURM of two hosts, as a fault finds it: its processes, its steps, its events."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import injury, record
from benchmarks.hosts import Hosts
from jaxmodels.launch import events
from jaxmodels.launch.pauses import Pauses
from jaxmodels.launch.seen import Seen
from jaxmodels.train import phases

CONFIG = """
from jaxmodels.config import Checkpoint, Classification, Config, Eval, Metrics, Synthetic, Train
from jaxmodels.models.mlp import MLPConfig


def get_config():
    # dropout uses the key and the average lags behind, so that all that a state can hold changes
    return Config(
        model=MLPConfig(input_shape=(8, 8, 1), classes=4, hidden=(32,), dropout=0.1),
        task=Classification(),
        data=Synthetic(batch_size=16),
        train=Train(steps={steps}, ema=0.99),
        eval=Eval(every=0, batches=1),
        checkpoint=Checkpoint(every={every}),
        metrics=Metrics(progress="plain", loggers=(), every=100),
    )
"""
PLACE = """
from jaxmodels.launch.slurm import Slurm


def get_place():
    # a supervisor that is killed counts as a restart, however far the job has come since the one before
    return Slurm(nodes=2, platform="cpu", grace=10.0, restarts=1000)
"""
STEPS = 200_000
"""More than are ever taken: the job is told to stop when it has had its faults."""
EVERY = 30
"""Steps between checkpoints."""
PACE = 0.1
"""Seconds by which each step is held back, in place of a model of a size worth launching."""
DISK = 24
"""MiB of the file system that the run lies on."""
PATIENCE = 180.0


class Job:
    """A job of two ranks, one on each host."""

    def __init__(self, name: str, folder: Path, hosts: Hosts, environment: Mapping[str, str], pace: float) -> None:
        self.name, self.folder, self.hosts = name, folder, hosts
        self.run = folder / "disk" / name
        self.orders = folder / name
        self.orders.mkdir()
        own = {injury.FOLDER: str(self.orders), injury.PACE: str(pace), "XDG_CACHE_HOME": str(folder / "cache")}
        path = f"{folder / 'hook'}{os.pathsep}{record.ROOT}"
        own["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # its programs are small, and are compiled often
        self.environment = {**environment, **own, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
        self.directory = folder / "runs/launch" / name
        self.log = self.directory / "output.log"
        self.followed = folder / f"{name}.txt"
        self._steps: dict[int, int] = {}
        self._known: dict[tuple[str, str, bytes], dict[str, str] | None] = {}

    def submit(self, *options: str) -> None:
        """Give it to SLURM, by the command that a person types."""
        command = ["train", "config.py", "--run-dir", str(self.run), *options]
        self.launch("place.py", "--name", self.name, "--", *command)

    def launch(self, *arguments: str) -> str:
        """What `jaxmodels launch` prints."""
        return self.command(sys.executable, "-m", "jaxmodels", "launch", *arguments)

    def command(self, *words: str) -> str:
        """What a command on the first host prints."""
        done = subprocess.run(
            [*self.hosts.inside(0, self.folder), *words], env=self.environment, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stdout} {done.stderr}")
        return done.stdout

    def start_command(self, *words: str) -> subprocess.Popen[bytes]:
        """Start a command on the first host, which prints to the file `followed`."""
        with self.followed.open("wb") as file:
            return subprocess.Popen(
                [*self.hosts.inside(0, self.folder), *words],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
            )

    @property
    def number(self) -> str:
        """What SLURM calls it now."""
        return (self.directory / "attempts").read_text().split("\n")[-2].split()[0]

    def starts(self) -> int:
        """How often SLURM has started it."""
        path = self.directory / "attempts"
        return path.read_text().count("started") if path.exists() else 0

    def output(self) -> str:
        """All that it has printed."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def line_like(self, pattern: str, since: int) -> str:
        """What it has printed since its output was so long, as far as it matches."""
        found = re.search(pattern, self.output()[since:])
        return found[0] if found else ""

    def events(self, *names: str) -> list[dict[str, Any]]:
        """Its events of such names."""
        return [row for row in events.read(self.run) if row["event"] in names]

    def processes(self) -> dict[int, dict[str, str]]:
        """The environments of all processes that came of it, by their ids."""
        found = {}
        for path in Path("/proc").iterdir():
            if not path.name.isdecimal():
                continue
            try:
                fields = (path / "stat").read_text().rpartition(")")[2].split()
                # a process is known by its start; its environment comes with the program that it becomes
                key = path.name, fields[19], (path / "cmdline").read_bytes()
                if key not in self._known:
                    self._known[key] = _environment(path, f"{injury.FOLDER}={self.orders}")
            except OSError:
                continue
            if fields[0] != "Z" and (environ := self._known[key]) is not None:
                found[int(path.name)] = environ
        return found

    def ranks(self) -> dict[int, int]:
        """The process of each rank that is there."""
        found = {int(e["JAXMODELS_PROCESS_ID"]): p for p, e in self.processes().items() if "JAXMODELS_PROCESS_ID" in e}
        return dict(sorted(found.items()))

    def supervisors(self) -> dict[int, int]:
        """The supervisor of each node."""
        found = {}
        for pid, environ in self.processes().items():
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            own = b"jaxmodels.launch.node" in words and words[0].endswith(Path(sys.executable).name.encode())
            if own and "JAXMODELS_PROCESS_ID" not in environ and "SLURM_STEP_ID" in environ:
                found[int(environ["SLURM_PROCID"])] = pid
        return found

    def look(self) -> list[Seen]:
        """Both ranks as they report themselves, fewer where one is not there; their steps are remembered."""
        found = []
        for pid, environ in self.processes().items():
            if "JAXMODELS_PROCESS_ID" in environ and "JAXMODELS_PROGRESS_DIR" in environ:
                one = Seen(int(environ["JAXMODELS_PROCESS_ID"]), "", "")
                one.read(Path(environ["JAXMODELS_PROGRESS_DIR"]), Pauses())
                self._steps[pid] = max(self._steps.get(pid, -1), one.step)
                found.append(one)
        return found

    def trains(self) -> bool:
        """Whether both ranks are among their steps, after the first one of this attempt."""
        seen = self.look()
        return {one.rank for one in seen} == {0, 1} and all(
            one.polls and one.phase in ("step", "data", "save") for one in seen
        )

    def pids(self) -> list[int]:
        """The processes of the ranks, in their order."""
        return list(self.ranks().values())

    def lost(self, before: set[int], began: float) -> int | None:
        """Steps of an attempt of these processes that another one, which began later, had to compute again."""

        def first() -> int | None:
            rows = [row for row in phases.read(self.run) if row["began"] > began]
            return rows[-1].get("first") if rows else None

        self.wait(lambda: first() is not None, 10.0)
        start, step = first(), max((self._steps.get(pid, -1) for pid in before), default=-1)
        return None if start is None else max(0, step - start)

    def saved(self) -> int:
        """Steps of the newest complete checkpoint."""
        folder = self.run / "checkpoints"
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        return max((int(name) for name in names if name.isdecimal()), default=0)

    def order(self, rank: int, kind: str) -> None:
        """Tell a rank what to do to itself; an empty kind: nothing any more."""
        path = self.orders / f"order.{rank}"
        path.unlink(missing_ok=True)
        if kind:
            (self.orders / "new").write_text(kind)
            (self.orders / "new").rename(path)

    def wait(self, until: Callable[[], Any], seconds: float = PATIENCE) -> bool:
        """Wait for something to be so; False: it was not in time, or the job has ended before."""
        end, code = time.monotonic() + seconds, self.directory / "code"
        while not until():
            if time.monotonic() > end or (code.exists() and code.read_text().strip() in ("0", "1", "2")):
                return False
            time.sleep(0.15)
        return True

    def stop(self) -> int:
        """Have it save and stay ended; returns the steps that were saved."""
        self.launch("cancel", self.name)
        if not self.wait(lambda: not self.command("squeue", "--noheader", "--states=R,PD,CG,CF")):
            raise RuntimeError(f"the job does not end\n{self.output()[-3000:]}")
        return self.saved()

    def left(self) -> list[str]:
        """Commands of processes that run though the job has ended, allowing moments for the kernel to end them."""
        self.wait(lambda: not self.processes(), 10.0)
        return [Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")[:200] for pid in self.processes()]


def _environment(process: Path, mark: str) -> dict[str, str] | None:
    """A process's environment; None: without the mark, it is none of the job's."""
    words = (process / "environ").read_bytes().decode(errors="replace").split("\0")
    pairs = (word.partition("=") for word in words)
    return {name: value for name, _, value in pairs} if mark in words else None


def prepare(folder: Path) -> None:
    """Put down what a job needs, and mount a small disk for its run."""
    for name, text in (("config.py", CONFIG.format(steps=STEPS, every=EVERY)), ("place.py", PLACE)):
        (folder / name).write_text(text)
    (folder / "hook").mkdir()
    (folder / "hook/sitecustomize.py").write_text("from benchmarks import injury\n\ninjury.begin()\n")
    (folder / "disk").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}m", "none", str(folder / "disk")], check=True)
