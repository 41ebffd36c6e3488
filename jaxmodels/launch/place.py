"""The base class of places to launch on: a place renders, submits, reports on and cancels jobs."""

from __future__ import annotations

import dataclasses
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
    """A command that is submitted to a place."""

    name: str
    """At most 40 lower-case letters, digits and hyphens, which every place accepts as a name."""
    command: tuple[str, ...]
    """The arguments after `jaxmodels launch PLACE --`, such as train configs/gpt_stdlib.py --mesh.fsdp 8."""
    directory: Path
    """The directory of its rendered files, its record and its output."""
    code: Code

    def started(self, handle: str) -> None:
        """Record the handle of a foreground job, so that `status` and `cancel` work from another terminal."""
        write(self.directory / "handle", handle)

    def ended(self) -> int | None:
        """Return the exit code that was recorded at the job's end; None if there is none yet.

        Raises:
            UserError: what is recorded is no exit code.
        """
        path = self.directory / "code"
        try:
            return int(path.read_text())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise UserError(f"got {path} that is no exit code, expected a number") from error


class State(enum.StrEnum):
    """The state of a job."""

    WAITING = "waiting"
    """The place has not started it."""
    STARTING = "starting"
    RUNNING = "running"
    SAVED = "saved"
    """It saved a checkpoint and stopped; the same command continues from there."""
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    GONE = "gone"
    """The place no longer knows it."""


@dataclass(frozen=True)
class Status:
    """The state of a job, as its place reports it."""

    state: State
    detail: str = ""
    """Details from the place, in one line."""
    code: int | None = None
    """The exit code of a job that has ended, where the place knows it."""
    restarts: int = 0

    @classmethod
    def ended(cls, code: int, restarts: int = 0) -> Status:
        """Return the status of a job that ended with this exit code."""
        states = {ExitCode.DONE: State.DONE, ExitCode.SAVED: State.SAVED}
        detail = "a mistake in what was asked" if code == ExitCode.MISTAKE else ""
        return cls(states.get(code, State.FAILED), detail, code, restarts)  # type: ignore[call-overload]

    def __str__(self) -> str:
        parts = [self.state.value]
        parts += [f"exit code {self.code}"] if self.code is not None else []
        parts += [f"{self.restarts} restart{'s' * (self.restarts != 1)}"] if self.restarts else []
        return ", ".join([*parts, self.detail] if self.detail else parts)


@dataclass(frozen=True, kw_only=True)
class Place(Section, kinds=PLACES):
    """Where jobs run. Each kind of place has its own fields and implements five methods; it keeps no state."""

    stays: ClassVar[bool] = False
    """Whether `submit` returns only when the job has ended, so that the command exits with the job's exit code."""
    from_image: ClassVar[bool] = False
    """Whether a job runs in a container with its own files instead of this directory."""

    restarts: Natural = 3
    """How many restarts in a row may make no progress before the job is given up."""
    grace: Positive = 60.0
    """Seconds that a job has to save after it was told to stop."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in dataclasses.fields(self):
            if field.default is dataclasses.MISSING and not getattr(self, field.name):
                option = field.name.replace("_", "-")
                raise UserError(f"got no {field.name}, expected one, try --{option} {field.name.upper()}")

    @abstractmethod
    def render(self, job: Job) -> dict[str, str]:
        """Return everything that would be submitted: the texts of files, by their names.

        Raises:
            UserError: this place cannot run the job.
        """

    @abstractmethod
    def submit(self, job: Job) -> str:
        """Submit the files that were rendered into the job's directory; return the handle by which the place knows it.

        Signals are held back until this returns; after a signal the handle is cancelled. So a place submits once and
        waits for nothing, unless the job runs in the foreground.

        Raises:
            UserError: the place refused the job, and nothing of it remains there.
        """

    @abstractmethod
    def status(self, job: Job, handle: str) -> Status:
        """Return the state of the job."""

    @abstractmethod
    def logs(self, job: Job, handle: str, follow: bool = False) -> Iterator[str]:
        """Yield the lines that the job has printed; with `follow`, until it ends."""

    @abstractmethod
    def cancel(self, job: Job, handle: str) -> None:
        """Tell the job to save and stop, as far as the place supports that."""

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
        """Return the command that starts and supervises the ranks of a node.

        Args:
            job: the job.
            processes: ranks on this node.
            devices: devices per rank; None: an equal share of the node's.
            platform: auto, cpu, gpu or tpu.
            more: further options of `python -m jaxmodels.launch.node`.
            python: the interpreter.
            environment: additional environment variables.
        """
        options = ["--processes", str(processes), *([] if devices is None else ["--devices", str(devices)])]
        options += ["--platform", platform, "--restarts", str(self.restarts), "--grace", f"{self.grace:g}", *more]
        variables = {**(environment or {}), "JAXMODELS_JOB": job.code.mark(job.name, self.locks(job))}
        set_to = [f"{name}={value}" for name, value in variables.items()]
        return ["env", *set_to, python, "-m", "jaxmodels.launch.node", *options, "--", *job.command]

    def locks(self, job: Job) -> str:
        """Return the file with the package versions that the job requires; empty if it runs from an image."""
        return "" if self.from_image else str(job.directory.resolve() / LOCK)


def call(command: Sequence[str], stdin: str = "", seconds: float = 60.0) -> str:
    """Run a place's client program (sbatch, kubectl, gcloud) and return its output.

    It runs in its own session, so that Ctrl-C does not interrupt it.

    Raises:
        UserError: it is not installed, it fails, or it takes longer than `seconds`.
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
        message = " ".join((done.stderr or done.stdout).split())[-500:]
        raise UserError(f"got a refusal from {' '.join(command[:2])}: {message or f'exit code {done.returncode}'}")
    return done.stdout


def write(path: Path, text: str) -> None:
    """Write a file atomically."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    os.replace(part, path)
