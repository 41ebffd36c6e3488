"""The place `slurm`: a batch job, which SLURM or the job itself restarts from its last checkpoint."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxmodels.errors import UserError
from jaxmodels.fields import Count, Workers
from jaxmodels.launch.output import growing
from jaxmodels.launch.place import Job, Place, State, Status, call, write

# seconds beyond the time to save, in which ranks start and stop and SLURM is asked to restart the job
_MARGIN = 30
# SLURM's states of jobs that have not ended
_WAITING = {name: State.WAITING for name in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT")}
_RUNNING = {name: State.RUNNING for name in ("RUNNING", "COMPLETING", "STOPPED", "SUSPENDED", "SIGNALING", "RESIZING")}
_GOES_ON = (State.WAITING, State.STARTING, State.RUNNING)
_GOING = {**_WAITING, "CONFIGURING": State.STARTING, **_RUNNING}


@dataclass(frozen=True, kw_only=True)
class Slurm(Place):
    """Nodes of the SLURM cluster that this machine submits to; the working directory must be on a shared disk."""

    nodes: Count = 1
    """Nodes of the job, with one supervisor each."""
    min_nodes: Count | None = None
    """Continue on as few nodes as this if others are lost. None: only on all of them."""
    processes: Workers = 1
    """Processes on each node: one for each GPU, or one for all of them."""
    devices: Workers | None = None
    """Devices per process. None: an equal share of the node's GPUs."""
    platform: Literal["auto", "cpu", "gpu"] = "auto"
    """auto uses GPUs where a node has any."""
    partition: str = ""
    """Partition; empty: the cluster's default."""
    account: str = ""
    """Account that the time is charged to."""
    qos: str = ""
    """Quality of service."""
    gres: str = ""
    """Generic resources per node: gpu:8 or gpu:h100:8."""
    constraint: str = ""
    """Features that the nodes must have."""
    cpus: Count | None = None
    """CPUs per node, for the supervisor and all ranks; None: the cluster's default."""
    time: str = ""
    """Time limit of one attempt, as SLURM writes it: 4:00:00 or 2-00:00:00. The job saves before, and continues."""
    directives: tuple[str, ...] = ()
    """Further options of sbatch, one each, with or without their dashes: exclusive mem=0."""
    setup: tuple[str, ...] = ()
    """Shell commands for the first node before the job starts; ranks get their environment: "module load cuda"."""
    image: str = ""
    """Container image in which the supervisors run; empty: the environment that the job was submitted from."""
    container: Literal["pyxis", "apptainer"] = "pyxis"
    """Container runtime: Pyxis, which is a plugin of srun, or Apptainer."""
    mounts: tuple[str, ...] = ()
    """Directories to mount in the container beside the working directory: /data or /data:/inside."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_nodes is not None and self.min_nodes > self.nodes:
            raise UserError(f"got min_nodes {self.min_nodes} of {self.nodes} nodes, expected at most as many as nodes")
        if self.mounts and not self.image:
            raise UserError("got mounts without an image, expected a container to mount them in, try --image IMAGE")
        for directive in self.directives:
            if not re.fullmatch(r"--?\w.*|\w[\w-]*(=.*)?", directive):
                raise UserError(
                    f"got directive {directive!r}, expected an option of sbatch, try --directives exclusive"
                )
        limit = seconds(self.time)
        if limit is not None and limit <= self.warning:
            raise UserError(
                f"got time {self.time}, of which the last {self.warning} s are for saving, expected more, try --time "
                f"{self.warning // 30 + 1}:00, or a shorter --grace"
            )

    @property
    def warning(self) -> int:
        """How many seconds before its time limit the job is told to save."""
        return int(self.grace) + _MARGIN

    def locks(self, job: Job) -> str:
        return "" if self.image else super().locks(job)

    def render(self, job: Job) -> dict[str, str]:
        return {"job.sh": self._script(job)}

    def submit(self, job: Job) -> str:
        # "123" or "123;cluster"
        return call(["sbatch", "--parsable", str(_script(job))]).strip().partition(";")[0]

    def status(self, job: Job, handle: str) -> Status:
        attempts = _attempts(job)
        number = attempts[-1][0] if attempts else handle
        starts = sum(what == "started" for _, what in attempts)
        state, reason = _asked(number)
        if state in _WAITING:
            return Status(_WAITING[state], reason, None, starts)
        restarts = max(starts - 1, 0)
        if state in _GOING:
            return Status(_GOING[state], reason, None, restarts)
        if _cancelled(job).exists() or state == "CANCELLED":
            return Status(State.CANCELLED, "", None, restarts)
        if (code := job.ended()) is not None:
            return Status.ended(code, restarts)
        if state == "COMPLETED":
            return Status.ended(0, restarts)
        if state:  # NODE_FAIL, OUT_OF_MEMORY, TIMEOUT, PREEMPTED, BOOT_FAIL, DEADLINE: ended before it could say so
            return Status(State.FAILED, state.lower().replace("_", " "), None, restarts)
        return Status(State.GONE, f"SLURM knows no job {number} any more", None, restarts)

    def logs(self, job: Job, handle: str, follow: bool = False) -> Iterator[str]:
        return growing(_log(job), lambda: follow and self.status(job, handle).state in _GOES_ON)

    def cancel(self, job: Job, handle: str) -> None:
        write(_cancelled(job), "")  # so that the job does not start itself again
        number = (_attempts(job) or [(handle, "")])[-1][0]
        state, _ = _asked(number)
        if state in _RUNNING:
            call(["scancel", "--signal=TERM", "--batch", number])  # to its script, which tells its supervisors
        elif state in _GOING:
            call(["scancel", number])

    def _script(self, job: Job) -> str:
        directory = job.directory.resolve()
        directives = {
            "job-name": job.name,
            "nodes": str(self.nodes),
            "ntasks-per-node": "1",
            "cpus-per-task": str(self.cpus or ""),
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "gres": self.gres,
            "constraint": self.constraint,
            "time": self.time,
            "chdir": str(job.code.directory),
            "output": str(directory / "output.log").replace("%", "%%"),
            "signal": f"B:TERM@{self.warning}",
        }
        options = [f"--{name}={_quoted(value)}" for name, value in directives.items() if value]
        options += ["--requeue", "--open-mode=append"]
        options += ["--no-kill"] if self.min_nodes is not None else []
        options += [each if each.startswith("-") else f"--{each}" for each in self.directives]
        # where a job continues on fewer nodes, the first supervisor to end does not end it
        alone = self.min_nodes is None
        more = ("--ended", str(directory / "ended")) if alone else ("--min-nodes", str(self.min_nodes))
        python = "python" if self.image else job.code.python
        command = self.supervisor(job, self.processes, self.devices, self.platform, more, python)
        return _SCRIPT.format(
            directives="\n".join(f"#SBATCH {option}" for option in options),
            directory=shlex.quote(str(directory)),
            setup="".join(f"{line}\n" for line in self.setup),
            srun=shlex.join([*self._srun(job), *command]),
            restarts=self.restarts,
        )

    def _srun(self, job: Job) -> list[str]:
        """srun, with the container: one supervisor that is killed ends them all, unless the job may do with fewer."""
        alone = ["--kill-on-bad-exit=0", "--wait=0", "--no-kill"]
        together = ["--kill-on-bad-exit=1", f"--wait={self.warning}"]
        srun = ["srun", *(together if self.min_nodes is None else alone)]
        srun += [f"--cpus-per-task={self.cpus}"] if self.cpus else []
        if not self.image:
            return srun
        here = str(job.code.directory)
        mounts = [mount if ":" in mount else f"{mount}:{mount}" for mount in (here, *self.mounts)]
        if self.container == "pyxis":
            return [
                *srun,
                f"--container-image={self.image}",
                f"--container-mounts={','.join(mounts)}",
                f"--container-workdir={here}",
            ]
        nvidia = ["--nv"] if self.platform != "cpu" else []
        return [*srun, "apptainer", "exec", *nvidia, "--bind", ",".join(mounts), "--pwd", here, self.image]


_SCRIPT = """\
#!/bin/bash
{directives}

record={directory}

# SLURM is ending the job: its time is over, it was cancelled, or others need the nodes
ending() {{ [[ $(scontrol --oneliner show job "$SLURM_JOB_ID") == *JobState=COMPLETING* ]]; }}
preempted() {{ [[ $(scontrol --oneliner show job "$SLURM_JOB_ID") =~ PreemptTime=[0-9] ]]; }}

# start the same job again: in its own place, or where SLURM does not let it, by one that follows it
again() {{
  [ -e "$record/cancelled" ] || [ -n "$asked" ] && return
  asked=1
  scontrol requeue "$SLURM_JOB_ID" && return
  next=$(sbatch --parsable --dependency=afterany:"$SLURM_JOB_ID" "$record/job.sh") || {{
    echo "launch: all is saved, but SLURM does not start the job again; go on with: sbatch $record/job.sh"
    return
  }}
  echo "${{next%%;*}} submitted" >> "$record/attempts"
  echo "launch: job ${{next%%;*}} goes on from here"
}}

# tell the supervisors, once SLURM knows their step, which may be about to start
pass_on() {{
  until scancel --signal=TERM "$SLURM_JOB_ID.0" || ! kill -0 "$step"; do sleep 1; done 2> /dev/null
}}

told() {{
  if ! ending; then
    warned=1
    echo "launch: told to save, $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%L) before the time limit"
    [ -z "$step" ] || pass_on
  elif [ -n "$warned" ] || preempted; then
    again  # now, as SLURM may not wait for the end; where it starts the job again by itself, nothing need be asked
  fi
}}
trap told TERM

echo "$SLURM_JOB_ID started" >> "$record/attempts"
rm -f "$record/code" "$record/ended"

{setup}{srun} &
step=$!
[ -z "$warned" ] || pass_on  # what came during the setup
while kill -0 "$step" 2> /dev/null; do wait "$step"; done  # a signal ends a wait, and not what is waited for
wait "$step"
code=$?
# srun ends the other supervisors when one has ended, and returns the highest code; the job's is that of the first one
first=$(head -n 1 "$record/ended" 2> /dev/null)
[ "${{first:-75}}" -eq 75 ] || code=$first

if [ -e "$record/cancelled" ]; then
  echo "$code" > "$record/code"
  scancel "$SLURM_JOB_ID"
  exit 1
fi
if ending; then
  # saved or not, whether it starts again has been settled; SLURM itself must not take 75 for a wish of the user's
  [ "$code" -eq 75 ] && [ -z "$asked" ] && exit 143
elif [ "$code" -gt 128 ] && [ "$(grep -c killed "$record/attempts")" -lt {restarts} ]; then
  echo "launch: a supervisor was killed, code $code"
  echo "$SLURM_JOB_ID killed" >> "$record/attempts"
  code=75
fi
echo "$code" > "$record/code"
[ "$code" -eq 75 ] && again
exit "$code"
"""


def seconds(time_limit: str) -> int | None:
    """A time limit as SLURM writes it, in seconds: MINUTES[:SECONDS], HOURS:MINUTES:SECONDS, or DAYS-HOURS[:…].

    Raises:
        UserError: it is written otherwise.
    """
    if time_limit in ("", "UNLIMITED", "infinite"):
        return None
    if not re.fullmatch(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}", time_limit):
        raise UserError(f"got time {time_limit!r}, expected hours:minutes:seconds or days-hours, try --time 4:00:00")
    days, dash, clock = time_limit.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if dash:
        hours, minutes, rest = (*parts, 0, 0)[:3]
    else:
        hours, minutes, rest = parts if len(parts) == 3 else (0, *parts, 0)[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + rest


def _asked(number: str) -> tuple[str, str]:
    """What SLURM calls the job's state, and why; empty where it knows the job no more."""
    try:
        answer = call(["squeue", "--noheader", "--states=all", f"--jobs={number}", "--format=%T|%r"])
    except UserError as refusal:
        if "Invalid job id" not in str(refusal):
            raise
        answer = ""
    if answer.strip():
        state, _, reason = answer.splitlines()[0].strip().partition("|")
        return state, "" if reason == "None" else reason
    try:
        answer = call(["sacct", "--noheader", "--allocations", "--parsable2", f"--jobs={number}", "--format=State"])
    except UserError:  # a cluster without accounting
        return "", ""
    return (answer.split() or [""])[0], ""  # "CANCELLED by 1000"


def _attempts(job: Job) -> list[tuple[str, str]]:
    """The numbers that the job has had, and what became of them."""
    try:
        rows = (job.directory / "attempts").read_text().splitlines()
    except FileNotFoundError:
        return []
    return [(row.split()[0], row.split()[1]) for row in rows if len(row.split()) == 2]


def _script(job: Job) -> Path:
    return job.directory / "job.sh"


def _log(job: Job) -> Path:
    return job.directory / "output.log"


def _cancelled(job: Job) -> Path:
    return job.directory / "cancelled"


def _quoted(value: str) -> str:
    """As sbatch reads a directive."""
    return value if re.fullmatch(r"[\w@%+=:,./~-]+", value) else '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'
