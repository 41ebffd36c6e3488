"""The place `tpu`: Cloud TPU machines, requested as queued resources, and again after each preemption."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from jaxmodels.errors import ExitCode, UserError
from jaxmodels.launch.output import growing
from jaxmodels.launch.place import Job, Place, State, Status, call, write
from jaxmodels.launch.signals import handled
from jaxmodels.launch.slices import Slice

_POLL_SECONDS = 20.0
_UNANSWERED = 30
"""How many requests in a row may fail, such as during an outage of the network, before the job is given up."""
_STATES = {
    "CREATING": State.WAITING,
    "ACCEPTED": State.WAITING,
    "WAITING_FOR_RESOURCES": State.WAITING,
    "PROVISIONING": State.STARTING,
    "ACTIVE": State.RUNNING,
    "SUSPENDING": State.WAITING,
    "SUSPENDED": State.WAITING,
    "DELETING": State.WAITING,
    "FAILED": State.WAITING,  # it is deleted and requested again, until the command gives up
}
"""All states of a queued resource, and of the job while its command has not ended it.

Source: cloud.google.com/tpu/docs/queued-resources, and its API's enumeration."""
_SSH_LOST = 255


@dataclass(frozen=True, kw_only=True)
class TPU(Place):
    """TPU machines, requested by `gcloud`; the command keeps running and requests them again after each preemption."""

    stays: ClassVar[bool] = True
    from_image: ClassVar[bool] = True

    tpu: str
    """Slices of TPUs as `jaxmodels plan` writes them: v6e:16x16, or v6e:2x16x16 for two slices."""
    image: str
    """Container image with jaxmodels and libtpu installed and the configs in its working directory."""
    zone: str
    """Zone of the TPUs: us-east5-b."""
    project: str = ""
    """Project; empty: the one that gcloud is configured for."""
    capacity: Literal["spot", "reserved", "on-demand"] = "spot"
    """Spot machines may be preempted at any time; the job then continues on the next ones."""
    reservation: str = ""
    """Name of the reservation, if there are several."""
    runtime: str = ""
    """Software version of the machines; empty: the one that Cloud TPU recommends for JAX on this TPU."""
    service_account: str = ""
    """Service account of the machines, which gives them access to buckets and the image."""
    setup: tuple[str, ...] = ()
    """Shell commands to run on each machine before the job starts: "gcsfuse my-bucket /mnt/runs"."""
    mounts: tuple[str, ...] = ()
    """Directories to mount in the container. Runs must be in one to survive a preemption: /mnt/runs:/app/runs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reservation and self.capacity != "reserved":
            raise UserError(
                f"got reservation {self.reservation} with {self.capacity} machines, try --capacity reserved"
            )
        for mount in self.mounts:
            if not re.fullmatch(r"/[^:]*:/[^:]*(:r[ow])?", mount):
                raise UserError(f"got mounts {mount!r}, expected two directories, try --mounts /mnt/runs:/app/runs")
        _ = self.slices.type  # refuses a TPU that this service does not offer

    @property
    def slices(self) -> Slice:
        return Slice.of(self.tpu)

    def render(self, job: Job) -> dict[str, str]:
        if job.command[:1] in (("train",), ("tune",)) and not self.mounts:
            raise UserError(
                "got no mounts, expected a directory for the runs that outlives the machines, try --setup "
                "'gcsfuse my-bucket /mnt/runs' --mounts /mnt/runs:/app/runs"
            )
        ask = f"#!/bin/sh\n# requests the machines, again after each preemption\nexec {shlex.join(self._ask(job))}\n"
        return {"create.sh": ask, "worker.sh": self._worker(job)}

    def submit(self, job: Job) -> str:
        handle = f"{self.zone}/{job.name}"
        stop = threading.Event()
        with handled(lambda *_: self._told(stop)):
            if self._state(job)[0]:
                raise self._taken(job)
            job.started(handle)
            self._first(job)
            code = self._stay(job, stop)
        write(job.directory / "code", str(int(code)))
        return handle

    def status(self, job: Job, handle: str) -> Status:
        if (code := job.ended()) is not None:
            if (job.directory / "cancelled").exists() and code == ExitCode.SAVED:
                return Status(State.CANCELLED, "", code)
            return Status.ended(code)
        state, why = self._state(job)
        if not state and (job.directory / "cancelled").exists():
            return Status(State.CANCELLED)
        if not state:
            return Status(State.GONE, "there is no queued resource of this name, and its command did not end it")
        return Status(_STATES.get(state, State.WAITING), f"{state} {why}".strip())

    def logs(self, job: Job, handle: str, follow: bool = False) -> Iterator[str]:
        return growing(job.directory / "log.txt", lambda: follow and not (job.directory / "code").exists())

    def cancel(self, job: Job, handle: str) -> None:
        twice = (job.directory / "cancelled").exists()
        write(job.directory / "cancelled", "")
        if self._state(job)[0] == "ACTIVE" and not twice:
            self._tell(job)  # the foreground command sees them end, and releases the machines
        else:  # nothing to save, or the foreground command is gone
            self._delete(job)

    def _gcloud(self, *words: str, alpha: bool = False) -> list[str]:
        where = [f"--zone={self.zone}", *([f"--project={self.project}"] if self.project else [])]
        return ["gcloud", *["alpha"] * alpha, "compute", "tpus", *words, *where, "--quiet"]

    def _ask(self, job: Job) -> list[str]:
        slices = self.slices
        # with three dimensions the number of chips does not determine the shape
        flat = len(slices.shape) == 2
        shape = [f"--accelerator-type={slices.type}-{slices.chips}"]
        return self._gcloud(
            "queued-resources",
            "create",
            job.name,
            *(shape if flat else [f"--type={slices.type}", f"--topology={slices.topology}"]),
            f"--runtime-version={self.runtime or slices.runtime}",
            *([f"--node-id={job.name}"] if slices.count == 1 else []),
            *([f"--node-count={slices.count}", f"--node-prefix={job.name}"] if slices.count > 1 else []),
            *{"spot": ["--spot"], "reserved": ["--reserved"], "on-demand": []}[self.capacity],
            *([f"--reservation={self.reservation}"] if self.reservation else []),
            *([f"--service-account={self.service_account}"] if self.service_account else []),
            # without alpha there is no --reservation, and --type is v2, v3 or v4
            alpha=bool(self.reservation) or not (flat or slices.type == "v4"),
        )

    def _nodes(self, job: Job) -> list[str]:
        """The slices' accelerator type, as Cloud TPU names it."""
        count = self.slices.count
        return [job.name] if count == 1 else [f"{job.name}-{i}" for i in range(count)]

    def _worker(self, job: Job) -> str:
        """The script for every machine; it first removes a container that a lost connection has left behind."""
        volumes = [word for mount in self.mounts for word in ("--volume", mount)]
        run = ["sudo", "docker", "run", "--rm", f"--name={job.name}", "--privileged", "--network=host"]
        run += ["--shm-size=16g", *volumes, self.image]
        lines = [
            f"sudo docker rm --force {job.name} > /dev/null 2>&1",
            *(f"{{ {line}\n}} || exit 1" for line in self.setup),  # a line may end in a comment
        ]
        supervisor = self.supervisor(job, 1, None, "tpu")
        return "\n".join(["#!/bin/sh", *lines, f"exec {shlex.join([*run, *supervisor])}", ""])

    def _state(self, job: Job) -> tuple[str, str]:
        """Return the state of the queued resource and the service's message; empty if it does not exist."""
        try:
            answer = call(self._gcloud("queued-resources", "describe", job.name, "--format=json"))
        except UserError as refusal:
            if "NOT_FOUND" in str(refusal):
                return "", ""
            raise
        state: dict[str, Any] = json.loads(answer).get("state", {})
        why = state.get("failedData", {}).get("error", {}).get("message", "")
        return state.get("state", "STATE_UNSPECIFIED"), why

    def _delete(self, job: Job) -> None:
        with contextlib.suppress(UserError):  # it is gone already, or going
            call(self._gcloud("queued-resources", "delete", job.name, "--force", "--async"))

    def _tell(self, job: Job) -> None:
        """Tell the supervisors to save and stop."""
        kill = f"sudo docker kill --signal=TERM {job.name}"
        for node in self._nodes(job):
            with contextlib.suppress(UserError):  # its machines are being deleted
                call(self._gcloud("tpu-vm", "ssh", node, "--worker=all", f"--command={kill}"))

    def _told(self, stop: threading.Event) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    def _taken(self, job: Job) -> UserError:
        return UserError(
            f"got queued resource {job.name}, which is there already in {self.zone}, expected a new name, try another "
            "--name"
        )

    def _first(self, job: Job) -> None:
        """Request the machines; where that fails, delete what it may have created, but never what others have."""
        try:
            call(self._ask(job), seconds=300.0)
        except BaseException as error:
            if isinstance(error, UserError) and re.search("already.exists", str(error), re.IGNORECASE):
                (job.directory / "handle").unlink()  # so that no record of the job remains
                raise self._taken(job) from error
            self._delete(job)
            raise

    def _stay(self, job: Job, stop: threading.Event) -> ExitCode:
        """Run the job on its machines, requested again after each preemption, and release them at the end."""
        left = self.restarts
        try:
            while True:
                state, why = self._patiently(job)
                if stop.is_set() or (job.directory / "cancelled").exists():
                    return ExitCode.SAVED
                if state == "ACTIVE":
                    code = self._attempt(job, stop)
                    if code in (ExitCode.DONE, ExitCode.FAILED, ExitCode.MISTAKE):
                        return ExitCode(code)
                    if code != ExitCode.SAVED and self._patiently(job)[0] == "ACTIVE":
                        left -= 1  # the machines are there, but the job is not
                        self._say(job, f"the connection was lost or the job killed (code {code}): once more")
                elif state in ("SUSPENDED", "FAILED"):
                    left -= state == "FAILED"
                    self._say(job, f"{state.lower()} {why}".strip() + ": deleted, and asked for again")
                    self._again(job, stop)
                elif not state:
                    self._say(job, "somebody deleted the machines")
                    return ExitCode.FAILED
                if left < 0:
                    self._say(job, f"given up after {self.restarts} restarts")
                    return ExitCode.FAILED
                stop.wait(_POLL_SECONDS)
        finally:
            self._delete(job)

    def _patiently(self, job: Job) -> tuple[str, str]:
        """Return the state; failed requests are repeated for a while."""
        for unanswered in range(_UNANSWERED):
            try:
                return self._state(job)
            except UserError as refusal:
                if unanswered + 1 == _UNANSWERED:
                    raise
                self._say(job, str(refusal))
                time.sleep(_POLL_SECONDS)
        raise AssertionError

    def _again(self, job: Job, stop: threading.Event) -> None:
        """Delete the queued resource, wait until it is gone, and request the same one again."""
        self._delete(job)
        while self._patiently(job)[0] and not stop.is_set():
            time.sleep(_POLL_SECONDS)
        if not stop.is_set():
            call(self._ask(job), seconds=300.0)

    def _attempt(self, job: Job, stop: threading.Event) -> int:
        """Run the job on all machines of all slices; return its exit code."""
        command = f"--command={(job.directory / 'worker.sh').read_text()}"
        running = [
            subprocess.Popen(
                self._gcloud("tpu-vm", "ssh", node, "--worker=all", command),
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
            )
            for node in self._nodes(job)
        ]  # fmt: skip
        readers = [
            threading.Thread(target=self._keep, args=(job, i if len(running) > 1 else None, process), daemon=True)
            for i, process in enumerate(running)
        ]
        for reader in readers:
            reader.start()
        stopped, deadline = False, float("inf")
        try:
            while any(process.poll() is None for process in running):
                time.sleep(min(0.2, _POLL_SECONDS))
                if stop.is_set() and not stopped:
                    stopped, deadline = True, time.monotonic() + self.grace + 60
                    self._tell(job)
                if deadline == float("inf") and any(process.poll() for process in running):
                    deadline = time.monotonic() + self.grace + 60  # the other slices notice, save and stop
                if time.monotonic() > deadline:
                    break
        finally:
            for process in running:
                process.kill()
        for reader in readers:
            reader.join(timeout=5.0)
        codes = [process.wait() for process in running]
        for code in (ExitCode.MISTAKE, ExitCode.FAILED, ExitCode.SAVED):
            if code in codes:
                return code
        return max(codes) if min(codes) >= 0 else _SSH_LOST

    def _keep(self, job: Job, index: int | None, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            text = line.decode(errors="replace").rstrip("\n")
            self._say(job, text if index is None else f"slice {index}: {text}", "")

    def _say(self, job: Job, text: str, who: str = "launch: ") -> None:
        """Print a line, and append it to the log."""
        with open(job.directory / "log.txt", "a") as log:
            log.write(f"{who}{text}\n")
        with contextlib.suppress(OSError):  # standard error is closed
            print(f"{who}{text}", file=sys.stderr if who else sys.stdout, flush=True)
