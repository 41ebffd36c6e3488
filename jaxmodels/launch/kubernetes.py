"""The place `kubernetes`: an Indexed Job, or a JobSet with one job for each slice of TPUs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from jaxmodels.errors import ExitCode, UserError
from jaxmodels.fields import Count, Natural, Workers
from jaxmodels.launch.output import stream
from jaxmodels.launch.place import Job, Place, State, Status, call, write
from jaxmodels.launch.slices import Slice

# names that the rendered objects and the commands about them share
_CONTAINER, _JOBS = "ranks", "slice"
_SETTLING = 30
"""Seconds after the time to save in which ranks and supervisor end, before Kubernetes kills the pod."""
_KEPT = 7 * 24 * 3600
"""Seconds after which Kubernetes deletes a job that has ended, with its output."""
_PAIRS = {
    "selectors": (r"[^=\s]+=[^=\s]*", "key=value"),
    "variables": (r"[A-Za-z_]\w*=.*", "NAME=value"),
    "claims": (r"[a-z0-9.-]+:/.*", "claim:/mounted/here"),
}
_OURS = ("JAXMODELS_", "JAX_COORDINATOR_", "JOB_COMPLETION_INDEX")
"""How the names of variables begin by which supervisors and ranks find each other."""
_DISRUPTED = {"onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}


@dataclass(frozen=True, kw_only=True)
class Kubernetes(Place):
    """Pods of a Kubernetes cluster that `kubectl` reaches, with one supervisor each."""

    from_image: ClassVar[bool] = True

    image: str
    """Container image with jaxmodels installed and the configs in its working directory."""
    kind: Literal["JobSet", "Job"] = "JobSet"
    """JobSet (0.10 or newer must be installed) restarts all pods together; every cluster has Job."""
    nodes: Count = 1
    """Number of pods; on TPUs it follows from `tpu`."""
    tpu: str = ""
    """Slices of TPUs as `jaxmodels plan` writes them: v5e:4x4, or v5e:2x4x4 for two slices."""
    gpus: Natural = 0
    """NVIDIA GPUs per pod."""
    processes: Workers = 1
    """Processes per pod: one for each GPU, or one for all of them. On TPUs there is one."""
    selectors: tuple[str, ...] = ()
    """Labels that the machines must have: cloud.google.com/gke-accelerator=nvidia-h100-80gb."""
    cpu: str = ""
    """CPUs that a pod requests, as Kubernetes writes it: 8."""
    memory: str = ""
    """Memory that a pod requests: 64Gi."""
    queue: str = ""
    """Local queue of Kueue; empty: no queue, the pods are scheduled at once."""
    priority: str = ""
    """Priority class of the pods, also of the job in Kueue's queue."""
    topology: str = ""
    """Label of groups of machines, each used by one slice alone: cloud.google.com/gke-nodepool."""
    claims: tuple[str, ...] = ()
    """Volume claims and their mount points. Runs must be on one to survive a restart: runs:/app/runs."""
    variables: tuple[str, ...] = ()
    """Environment variables of the pods: NAME=value."""
    host_network: bool = False
    """Whether a pod uses its machine's network, which is faster between slices, and has its ports to itself."""
    service_account: str = ""
    """Service account of the pods, which gives them access to buckets; it needs no permission in the cluster."""
    namespace: str = "default"
    """Namespace of the job."""
    context: str = ""
    """Context in kubectl's configuration; empty: the current one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        slices = self.slices
        if slices is not None and self.gpus:
            raise UserError(f"got tpu {self.tpu} and {self.gpus} GPUs, expected one of them, try --gpus 0")
        if slices is not None and (self.nodes > 1 or self.processes > 1):
            raise UserError(
                f"got tpu {self.tpu} with {self.nodes} nodes and {self.processes} processes, expected none: there is "
                f"one process for each of its {slices.hosts * slices.count} hosts, try --nodes 1 --processes 1"
            )
        if self.kind == "Job" and ((slices is not None and slices.count > 1) or self.topology):
            wanted = f"topology {self.topology}" if self.topology else f"{self.tpu}, which is several slices,"
            raise UserError(f"got kind Job with {wanted}, expected a JobSet, try --kind JobSet")
        if self.gpus % self.processes:
            raise UserError(
                f"got {self.gpus} GPUs for {self.processes} processes, expected as many for each, try --processes "
                f"{self.gpus}"
            )
        for field, (form, example) in _PAIRS.items():
            for value in getattr(self, field):
                if not re.fullmatch(form, value, re.DOTALL):
                    raise UserError(f"got {field} {value!r}, expected {example}, try --{field} {example}")
        for value in self.variables:
            name = value.partition("=")[0]
            if name.startswith(_OURS):
                raise UserError(f"got variable {name}, which every job sets itself, expected another one")

    @property
    def slices(self) -> Slice | None:
        """The TPUs; None if there are none."""
        return Slice.of(self.tpu) if self.tpu else None

    def render(self, job: Job) -> dict[str, str]:
        import yaml

        if job.command[:1] in (("train",), ("tune",)) and not self.claims:
            raise UserError(
                "got no claims, expected a volume for the runs, which a pod's own files do not outlive, try --claims "
                "runs:/app/runs"
            )

        class Plain(yaml.SafeDumper):
            """Writes repeated values out instead of as YAML aliases."""

            def ignore_aliases(self, data: Any) -> bool:
                return True

        objects = [self._jobset(job)] if self.kind == "JobSet" else [self._service(job), self._indexed(job)]
        return {f"{self.kind.lower()}.yaml": yaml.dump_all(objects, Dumper=Plain, sort_keys=False, width=120)}

    def submit(self, job: Job) -> str:
        file = str(job.directory / f"{self.kind.lower()}.yaml")
        kinds = ",".join(self._kinds)
        if there := self._kubectl("get", kinds, job.name, "--ignore-not-found", "--output=name").split():
            raise UserError(f"got {there[0]}, which is there already, expected a new name, try another --name")
        try:
            self._kubectl("create", "--filename", file)
        except UserError as refusal:
            # one of the two may have been created; what somebody else has created since is left alone
            others = rf'(\w+)s\S* "{job.name}" already exists'
            if ours := ",".join(kind for kind in self._kinds if kind not in re.findall(others, str(refusal))):
                self._kubectl("delete", ours, job.name, "--ignore-not-found", "--wait=false")
            raise
        return f"{self.namespace}/{job.name}"

    def status(self, job: Job, handle: str) -> Status:
        answer = self._kubectl("get", self.kind.lower(), job.name, "--output=json", "--ignore-not-found")
        if not answer.strip():
            cancelled = (job.directory / "cancelled").exists()
            return Status(State.CANCELLED if cancelled else State.GONE)
        return read(json.loads(answer))

    def logs(self, job: Job, handle: str, follow: bool = False) -> Iterator[str]:
        command = ["logs", f"--selector={self._label}={job.name}", f"--container={_CONTAINER}", "--prefix", "--tail=-1"]
        most = f"--max-log-requests={self._jobs * self._pods}"
        return stream(self._command(*command, most, *["--follow"] * follow))

    def cancel(self, job: Job, handle: str) -> None:
        write(job.directory / "cancelled", "")
        # the pods get SIGTERM and the time to save; this does not wait for them
        self._kubectl("delete", ",".join(self._kinds), job.name, "--ignore-not-found", "--wait=false")

    @property
    def _kinds(self) -> list[str]:
        """The kinds of the objects that a job consists of; all have its name."""
        return ["jobset"] if self.kind == "JobSet" else ["job", "service"]

    @property
    def _jobs(self) -> int:
        return 1 if self.slices is None else self.slices.count

    @property
    def _pods(self) -> int:
        """Number of pods of each job."""
        return self.nodes if self.slices is None else self.slices.hosts

    @property
    def _label(self) -> str:
        return "jobset.sigs.k8s.io/jobset-name" if self.kind == "JobSet" else "batch.kubernetes.io/job-name"

    def _command(self, *arguments: str) -> list[str]:
        context = [f"--context={self.context}"] if self.context else []
        return ["kubectl", *context, f"--namespace={self.namespace}", *arguments]

    def _kubectl(self, *arguments: str) -> str:
        return call(self._command(*arguments))

    def _metadata(self, job: Job) -> dict[str, Any]:
        labels = {"kueue.x-k8s.io/queue-name": self.queue} if self.queue else {}
        notes = {"alpha.jobset.sigs.k8s.io/exclusive-topology": self.topology} if self.topology else {}
        return _filled({"name": job.name, "namespace": self.namespace, "labels": labels, "annotations": notes})

    def _jobset(self, job: Job) -> dict[str, Any]:
        """Return a JobSet, which restarts all jobs or none, by the exit code of the job that ended.

        A job fails by a rule of its `podFailurePolicy`; JobSet's own rules read the name of that rule in the job's
        message. A failure without a rule (a supervisor was killed, the image does not exist) restarts all jobs, and
        counts as one of `restarts`.
        """
        ended = ExitCode.FAILED, ExitCode.MISTAKE
        rules = [
            {"action": "FailJob", **_DISRUPTED},
            {"action": "FailJob", **_exits(ExitCode.SAVED)},
            {"action": "FailJob", **_exits(*ended)},
        ]
        by_rule = {"onJobFailureReasons": ["PodFailurePolicy"]}
        over = [f"failed with exit code ({'|'.join(map(str, map(int, ended)))}) matching FailJob rule"]
        return {
            "apiVersion": "jobset.x-k8s.io/v1alpha2",
            "kind": "JobSet",
            "metadata": self._metadata(job),
            "spec": {
                "ttlSecondsAfterFinished": _KEPT,
                "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
                "failurePolicy": {
                    "maxRestarts": self.restarts,
                    # no pod of the last attempt is left when those of the next one look for their peers
                    "restartStrategy": "BlockingRecreate",
                    "rules": [
                        {"name": "over", "action": "FailJobSet", **by_rule, "onJobFailureMessagePatterns": over},
                        {"name": "saved", "action": "RestartJobSetAndIgnoreMaxRestarts", **by_rule},
                    ],
                },
                "replicatedJobs": [
                    {
                        "name": _JOBS,
                        "replicas": self._jobs,
                        "template": {"spec": self._job(job, rules, 0, f"{job.name}-{_JOBS}-0-0.{job.name}")},
                    }
                ],
            },
        }

    def _indexed(self, job: Job) -> dict[str, Any]:
        """Return an Indexed Job, whose pods are replaced one by one; it fails unless all of them end with 75."""
        rules = [
            {"action": "Ignore", **_DISRUPTED},
            {"action": "Ignore", **_exits(ExitCode.SAVED)},
            {"action": "FailJob", **_exits(ExitCode.FAILED, ExitCode.MISTAKE)},
        ]
        spec = self._job(job, rules, self.restarts, f"{job.name}-0.{job.name}")
        spec["ttlSecondsAfterFinished"] = _KEPT
        spec["podReplacementPolicy"] = "Failed"  # not while the old pod is still saving
        spec["template"]["spec"]["subdomain"] = job.name
        return {"apiVersion": "batch/v1", "kind": "Job", "metadata": self._metadata(job), "spec": spec}

    def _service(self, job: Job) -> dict[str, Any]:
        """Return the headless service that gives the pods of an Indexed Job DNS names, even before they are ready."""
        return {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": job.name, "namespace": self.namespace},
            "spec": {
                "clusterIP": "None",
                "publishNotReadyAddresses": True,
                "selector": {"batch.kubernetes.io/job-name": job.name},
            },
        }

    def _job(self, job: Job, rules: list[dict[str, Any]], backoff: int, coordinator: str) -> dict[str, Any]:
        return {
            "completionMode": "Indexed",
            "completions": self._pods,
            "parallelism": self._pods,
            "backoffLimit": backoff,
            "podFailurePolicy": {"rules": rules},
            "template": {"spec": self._pod(job, coordinator)},
        }

    def _pod(self, job: Job, coordinator: str) -> dict[str, Any]:
        slices = self.slices
        chips = {} if slices is None else {"google.com/tpu": slices.chips_per_host}
        limits = {**chips, **({"nvidia.com/gpu": self.gpus} if self.gpus else {})}
        labels = dict(selector.split("=", 1) for selector in self.selectors)
        if slices is not None:
            labels |= {
                "cloud.google.com/gke-tpu-accelerator": slices.gke,
                "cloud.google.com/gke-tpu-topology": slices.topology,
            }
        mounts = [claim.split(":", 1) for claim in self.claims]
        claims = list(dict.fromkeys(claim for claim, _ in mounts))
        platform = "tpu" if slices is not None else "gpu" if self.gpus else "cpu"
        devices = self.gpus // self.processes if self.gpus else None
        container = {
            "name": _CONTAINER,
            "image": self.image,
            # Kubernetes replaces $(NAME), and $$ by $
            "command": [word.replace("$", "$$") for word in self.supervisor(job, self.processes, devices, platform)],
            "env": self._environment(coordinator),
            "resources": _filled(
                {"limits": limits, "requests": _filled({"cpu": self.cpu, "memory": self.memory})},
            ),
            "volumeMounts": [
                {"name": "shm", "mountPath": "/dev/shm"},
                *({"name": f"claim-{claims.index(claim)}", "mountPath": path} for claim, path in mounts),
            ],
        }
        return _filled(
            {
                "restartPolicy": "Never",
                "terminationGracePeriodSeconds": int(self.grace) + _SETTLING,
                "hostNetwork": self.host_network or None,
                "dnsPolicy": "ClusterFirstWithHostNet" if self.host_network else "",
                "serviceAccountName": self.service_account,
                "priorityClassName": self.priority,
                "nodeSelector": labels,
                "tolerations": [{"key": kind, "operator": "Exists"} for kind in limits],
                "containers": [_filled(container)],
                "volumes": [
                    {"name": "shm", "emptyDir": {"medium": "Memory"}},
                    *(
                        {"name": f"claim-{i}", "persistentVolumeClaim": {"claimName": claim}}
                        for i, claim in enumerate(claims)
                    ),
                ],
            }
        )

    def _environment(self, coordinator: str) -> list[dict[str, Any]]:
        """The variables that `cluster.found` reads; Kubernetes itself sets a pod's index within its job."""
        job_index = {"fieldRef": {"fieldPath": "metadata.labels['jobset.sigs.k8s.io/job-index']"}}
        return [
            {"name": "JAXMODELS_NODES", "value": str(self._jobs * self._pods)},
            {"name": "JAXMODELS_NODES_PER_JOB", "value": str(self._pods)},
            {
                "name": "JAXMODELS_JOB_INDEX",
                **({"valueFrom": job_index} if self.kind == "JobSet" else {"value": "0"}),
            },
            {"name": "JAXMODELS_COORDINATOR_HOST", "value": coordinator},
            *({"name": name, "value": value} for name, _, value in (each.partition("=") for each in self.variables)),
        ]


def _exits(*codes: ExitCode) -> dict[str, Any]:
    return {"onExitCodes": {"containerName": _CONTAINER, "operator": "In", "values": [int(code) for code in codes]}}


def _filled(fields: dict[str, Any]) -> dict[str, Any]:
    """Leave out empty fields."""
    return {name: value for name, value in fields.items() if value not in (None, "", {}, [])}


def read(found: dict[str, Any]) -> Status:
    """Return the state of a Job or a JobSet from Kubernetes' description of it."""
    spec, now = found["spec"], found.get("status", {})
    held = {each["type"]: each.get("message", "") for each in now.get("conditions", []) if each["status"] == "True"}
    replicated = now.get("replicatedJobsStatus")
    restarts = now.get("restarts", 0) if found["kind"] == "JobSet" else now.get("failed", 0)
    if "Complete" in held or "Completed" in held:
        return Status.ended(ExitCode.DONE, restarts)
    if "Failed" in held:
        message = held["Failed"]
        code = re.search(r"exit code (\d+)", message)
        return Status(State.FAILED, message, int(code[1]) if code else None, restarts)
    if "Suspended" in held or spec.get("suspend"):
        return Status(State.WAITING, "suspended: Kueue has not admitted it yet", None, restarts)
    if found["kind"] == "JobSet":
        wanted = sum(each.get("replicas", 1) for each in spec["replicatedJobs"])
        ready = sum(each.get("ready", 0) for each in replicated or [])
        active = sum(each.get("active", 0) for each in replicated or [])
    else:
        wanted, ready, active = spec["parallelism"], now.get("ready", 0), now.get("active", 0)
    state = State.RUNNING if ready >= wanted else State.STARTING if active else State.WAITING
    return Status(state, f"{ready} of {wanted} ready", None, restarts)
