"""What a place to launch on is: it renders a job, submits it, and says how it goes, what it prints, and ends it."""

from __future__ import annotations

import enum
import os
import shutil
import subprocess
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from jaxmodels.errors import ExitCode, UserError
from jaxmodels.fields import Count, Natural, Positive, Section
from jaxmodels.launch.code import Code
from jaxmodels.registry import Registry

PLACES = Registry(
    "place",
    "jaxmodels.places",
    {
        "local": "jaxmodels.launch.local:Local",
        "ssh": "jaxmodels.launch.ssh:SSH",
        "slurm": "jaxmodels.launch.slurm:Slurm",
        "kubernetes": "jaxmodels.launch.kubernetes:Kubernetes",
        "tpu": "jaxmodels.launch.tpu:TPU",
    },
)

LOCK = "lock.txt"
"""The file of a job with the versions of Python and of all packages."""


@dataclass(frozen=True)
class Job:
    """One of our commands, as it goes to a place."""

    name: str
    """Lower-case letters, digits and hyphens, at most 40, so that it is a name everywhere."""
    command: tuple[str, ...]
    """What follows `jaxmodels launch PLACE --`, such as train configs/gpt_stdlib.py --mesh.fsdp 8."""
    directory: Path
    """Where its rendered files, its record and its output lie."""
    code: Code

    def started(self, handle: str) -> None:
        """Note the handle of a job that runs in the foreground, for `status` and `cancel` from another terminal."""
        write(self.directory / "handle", handle)


class State(enum.StrEnum):
    """Where a job is on its way."""

    WAITING = "waiting"
    """The place has not begun it."""
    STARTING = "starting"
    RUNNING = "running"
    SAVED = "saved"
    """It stopped with all saved, and the same command goes on from there."""
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    GONE = "gone"
    """The place knows nothing of it any more."""


@dataclass(frozen=True)
class Status:
    """How a job goes."""

    state: State
    detail: str = ""
    """What the place says of it, in one line."""
    code: int | None = None
    """The exit code of a job that has ended, where the place knows it."""
    restarts: int = 0

    @classmethod
    def ended(cls, code: int, restarts: int = 0) -> Status:
        """The status of a job that ended with a code."""
        states = {ExitCode.DONE: State.DONE, ExitCode.SAVED: State.SAVED}
        detail = "a mistake in what was asked" if code == ExitCode.MISTAKE else ""
        return cls(states.get(code, State.FAILED), detail, code, restarts)  # type: ignore[call-overload]


@dataclass(frozen=True, kw_only=True)
class Place(Section, kinds=PLACES):
    """Where jobs run. A kind of place has its own fields, and the five methods; it keeps nothing between calls."""

    stays: ClassVar[bool] = False
    """Whether `submit` stays until the job has ended, so that the command ends with the job's exit code."""
    from_image: ClassVar[bool] = False
    """Whether a job runs in a container, which has its own files, and not in this directory."""

    restarts: Natural = 3
    """Restarts without progress in between after which a job is given up."""
    grace: Positive = 60.0
    """Seconds that a job has to save when it is told to stop."""

    @abstractmethod
    def render(self, job: Job) -> dict[str, str]:
        """What would be submitted, as texts by the names of files; nothing else is submitted.

        Raises:
            UserError: this place cannot run the job.
        """

    @abstractmethod
    def submit(self, job: Job) -> str:
        """Start the job from what was rendered into its directory; returns what the place calls it.

        Signals wait until this is over, and then what it returns is cancelled; so it hands over once, and waits for
        nothing, unless it stays in the foreground.

        Raises:
            UserError: the place refused it; nothing of it is left there.
        """

    @abstractmethod
    def status(self, job: Job, handle: str) -> Status:
        """How the job goes."""

    @abstractmethod
    def logs(self, job: Job, handle: str, follow: bool = False) -> Iterator[str]:
        """What the job has printed, line by line; with `follow`, until it ends."""

    @abstractmethod
    def cancel(self, job: Job, handle: str) -> None:
        """Tell the job to save and stop, as far as the place lets it."""

    def supervisor(
        self,
        job: Job,
        processes: Count,
        devices: int | None = None,
        platform: str = "auto",
        more: Sequence[str] = (),
        python: str = "python",
        environment: Mapping[str, str] | None = None,
    ) -> list[str]:
        """The command that starts and watches a node's ranks.

        Args:
            job: the job.
            processes: ranks on this node.
            devices: devices of each of them; None: as many as the node has for each.
            platform: auto, cpu, gpu or tpu.
            more: further options of `python -m jaxmodels.launch.node`.
            python: the interpreter.
            environment: variables that it gets beside those that are there.
        """
        options = ["--processes", str(processes), *([] if devices is None else ["--devices", str(devices)])]
        options += ["--platform", platform, "--restarts", str(self.restarts), "--grace", f"{self.grace:g}", *more]
        variables = {**(environment or {}), "JAXMODELS_JOB": job.code.mark(job.name, self.locks(job))}
        set_to = [f"{name}={value}" for name, value in variables.items()]
        return ["env", *set_to, python, "-m", "jaxmodels.launch.node", *options, "--", *job.command]

    def locks(self, job: Job) -> str:
        """The file with the versions that a job must find; empty for one from an image, which has its own."""
        return "" if self.from_image else str(job.directory.resolve() / LOCK)


def call(command: Sequence[str], stdin: str = "", seconds: float = 60.0) -> str:
    """What a program of a place (sbatch, kubectl, gcloud) prints.

    It runs in a session of its own, so that Ctrl-C does not end it halfway.

    Raises:
        UserError: it is not installed, it refuses, or it takes longer than `seconds`.
    """
    if shutil.which(command[0]) is None:
        raise UserError(
            f"got no program {command[0]!r} here, expected it on PATH, try a machine from which the place is reached"
        )
    try:
        done = subprocess.run(
            list(command), input=stdin, capture_output=True, text=True, errors="replace", timeout=seconds,
            start_new_session=True, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as late:
        raise UserError(
            f"got no answer from {command[0]} in {seconds:g} s, expected one, try {' '.join(command)}"
        ) from late
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())[-500:]
        raise UserError(f"got a refusal from {' '.join(command[:2])}: {said or f'exit code {done.returncode}'}")
    return done.stdout


def write(path: Path, text: str) -> None:
    """Write a file that is there as a whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    os.replace(part, path)
