"""What Kubernetes and JobSet are given: checked against their schemas, against xpk's, and by what `kubectl` answers."""

import dataclasses
import json
import os
import re
from pathlib import Path

import pytest
import yaml

from jaxmodels.errors import UserError
from jaxmodels.launch.cluster import found
from jaxmodels.launch.kubernetes import Kubernetes, read
from jaxmodels.launch.place import State
from tests.launch.jobs import job

DATA = Path(__file__).parent / "data"
TPUS = Kubernetes(
    image="gcr.io/p/i:1",
    tpu="v5e:2x4x4",
    claims=("runs:/app/runs", "data:/data"),
    queue="multislice-queue",
    priority="high",
    topology="cloud.google.com/gke-nodepool",
    host_network=True,
    variables=("XLA_FLAGS=--xla_a=1 --xla_b=2",),
    service_account="trainer",
)
GPUS = Kubernetes(
    image="gcr.io/p/i:1", nodes=4, gpus=8, processes=8, cpu="64", memory="512Gi", queue="multislice-queue",
    priority="high", claims=("runs:/app/runs",), selectors=("cloud.google.com/gke-accelerator=nvidia-h100-80gb",),
)  # fmt: skip
CPUS = Kubernetes(image="i", kind="Job", nodes=2, claims=("runs:/app/runs",))


def rendered(place, tmp_path, *command):
    (text,) = place.render(job(tmp_path, *command)).values()
    return list(yaml.safe_load_all(text))


def check(document):
    """Hold a document to the schema of its kind, where no field may be unknown."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="needs the test extra")
    if document["kind"] == "JobSet":
        jsonschema = pytest.importorskip("jsonschema", reason="needs the test extra")
        jsonschema.validate(document, json.loads((DATA / "jobset.json").read_text()))
        for each in document["spec"]["replicatedJobs"]:
            inner = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **each["template"]}
            kubernetes_validate.validate(inner, kubernetes_validate.latest_version(), strict=True)
    else:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize(
    "place",
    [TPUS, GPUS, CPUS, dataclasses.replace(GPUS, kind="Job", queue="", priority="", selectors=(), processes=1)],
)
def test_what_is_rendered_fits_the_schemas_to_the_last_field(place, tmp_path):
    for document in rendered(place, tmp_path):
        check(document)


def test_the_schemas_refuse_a_field_that_is_mistyped(tmp_path):
    (document,) = rendered(TPUS, tmp_path)
    document["spec"]["failurePolicy"]["rules"][0]["onJobFailureMessages"] = []
    with pytest.raises(Exception, match="onJobFailureMessages"):
        check(document)
    (document,) = rendered(TPUS, tmp_path)
    document["spec"]["replicatedJobs"][0]["template"]["spec"]["completionsMode"] = "Indexed"
    with pytest.raises(Exception, match="completionsMode"):
        check(document)


def flat(value, path=""):
    """The leaves of a document by their paths; of several rules and variables each has its number."""
    if isinstance(value, dict) and value:
        return {k: v for name, inner in value.items() for k, v in flat(inner, f"{path}/{name}").items()}
    if isinstance(value, list) and value:
        return {k: v for i, inner in enumerate(value) for k, v in flat(inner, f"{path}/{i}").items()}
    return {path: value}


POD = "/spec/replicatedJobs/0/template/spec/template/spec"
BOTH = {
    r"/metadata/labels/xpk.*|.*/metadata/labels/xpk.*": "xpk finds its own workloads by a label; a name is enough",
    r"/metadata/namespace": "said, so that the place does not depend on kubectl's current one",
    r"/spec/ttlSecondsAfterFinished": "a week to read status and logs in, and not twelve hours",
    r"/spec/network/.*": "what is JobSet's default, said because peers are found by it",
    r"/spec/failurePolicy/restartStrategy": "no pod of one attempt is left when one of the next looks for its peers",
    r"/spec/failurePolicy/rules/.*": "xpk counts every restart against maxRestarts; here one that has saved does not",
    r"/spec/replicatedJobs/0/name": "slice, as both call it in the end: xpk says slice-job",
    r"/spec/replicatedJobs/0/template/spec/podFailurePolicy/.*": (
        "xpk lists all codes that start again; here the two that must not, 75 and a disruption have rules of their own"
    ),
    r"/spec/replicatedJobs/0/template/spec/completionMode": "JobSet's default, said because pods are numbered by it",
    rf"{POD}/schedulerName": "the default",
    rf"{POD}/imagePullSecrets/.*": "xpk writes a secret named None; a service account has its secrets",
    rf"{POD}/terminationGracePeriodSeconds": "30 s are too few to save in: the place's grace and what ends after it",
    rf"{POD}/serviceAccountName": "the place's own",
    rf"{POD}/containers/0/(name|command/.*|env.*)": (
        "the supervisor itself gets the signals and gives the exit code, where xpk has a shell in between"
    ),
    rf"{POD}/containers/0/securityContext/privileged": "TPUs and GPUs of GKE need no privileged container any more",
    rf"{POD}/containers/0/volumeMounts/.*|{POD}/volumes/.*": "runs outlive pods on a claim; xpk's storage is apart",
}
GPU = {
    r".*/metadata/annotations/.*": "GPUDirect-TCPX is a matter of the cluster's network: its daemon and interfaces",
    rf"{POD}/initContainers/.*": "GPUDirect-TCPX, as above",
    rf"{POD}/(dnsPolicy)": "xpk says it although the pods have no host network",
    rf"{POD}/nodeSelector.*": "xpk leaves the choice of machines to Kueue's flavor; here the accelerator is named too",
    rf"{POD}/tolerations/1/.*": "a taint of xpk's own node pools",
    rf"{POD}/containers/0/imagePullPolicy": "xpk's images have one tag that changes; the default is right for others",
    rf"{POD}/containers/0/resources/requests/.*": "the place's own",
}


@pytest.mark.parametrize(("place", "file", "more"), [(TPUS, "xpk_v5e.yaml", {}), (GPUS, "xpk_h100.yaml", GPU)])
def test_every_field_that_xpk_renders_otherwise_has_its_reason(place, file, more, tmp_path):
    (ours,) = rendered(place, tmp_path)
    theirs = flat(yaml.safe_load((DATA / file).read_text()))
    ours = flat(ours)
    differ = {path for path in ours.keys() | theirs.keys() if ours.get(path) != theirs.get(path)}
    reasons = BOTH | more
    assert not [path for path in sorted(differ) if not any(re.fullmatch(known, path) for known in reasons)]
    unused = [known for known in more if not any(re.fullmatch(known, path) for path in differ)]
    assert not unused  # a reason for what is the same by now
    same = [path for path in ours if ours[path] == theirs.get(path)]
    for field in ("queue-name", "maxRestarts", "completions", "backoffLimit", "priorityClassName", "replicas", "image"):
        assert any(path.endswith(field) for path in same), field


def test_tpus_are_asked_for_as_xpk_does(tmp_path):
    (ours,), theirs = rendered(TPUS, tmp_path), yaml.safe_load((DATA / "xpk_v5e.yaml").read_text())
    pods = [d["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"] for d in (ours, theirs)]
    for field in ("nodeSelector", "tolerations", "hostNetwork", "dnsPolicy"):
        assert pods[0][field] == pods[1][field]
    assert pods[0]["containers"][0]["resources"]["limits"] == pods[1]["containers"][0]["resources"]["limits"]


@pytest.mark.parametrize("place", [TPUS, GPUS, CPUS])
def test_every_pod_finds_its_number_and_its_peers(place, tmp_path):
    document = rendered(place, tmp_path)[-1]
    jobs, template = [(0, document["spec"])], None
    if place.kind == "JobSet":
        (replicated,) = document["spec"]["replicatedJobs"]
        jobs = [(i, replicated["template"]["spec"]) for i in range(replicated["replicas"])]
    nodes = []
    for index, spec in jobs:
        template = spec["template"]["spec"]
        for pod in range(spec["completions"]):
            environ = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": str(pod)}
            for each in template["containers"][0]["env"]:
                label = each.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath", "")
                assert not label or label == "metadata.labels['jobset.sigs.k8s.io/job-index']"
                environ[each["name"]] = str(index) if label else each["value"]
            cluster = found(environ)
            nodes.append(cluster.node)
            assert cluster.nodes == len(jobs) * spec["completions"]
            assert cluster.host == ("demo-slice-0-0.demo" if place.kind == "JobSet" else "demo-0.demo")
    assert nodes == list(range(len(nodes)))
    if place.kind == "Job":  # the name is the service's
        service = rendered(place, tmp_path)[0]
        assert service["metadata"]["name"] == template["subdomain"] == "demo"
        assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": "demo"}


def decide(document, messages):
    """What JobSet does after jobs failed with these messages, by its first rule that fits; RestartJobSet by default."""
    for rule in document["spec"]["failurePolicy"]["rules"]:
        for reason, message in messages:
            patterns = rule.get("onJobFailureMessagePatterns", [""])
            if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
                return rule["action"]
    return "RestartJobSet"


def failure(document, code, disrupted=False):
    """Reason and message of a job one of whose pods ended so, in Kubernetes' words."""
    (replicated,) = document["spec"]["replicatedJobs"]
    spec = replicated["template"]["spec"]
    for i, rule in enumerate(spec["podFailurePolicy"]["rules"]):
        if disrupted and "onPodConditions" in rule:
            text = f"Pod default/demo-0 has condition DisruptionTarget matching {rule['action']} rule at index {i}"
            return "PodFailurePolicy", text
        if code in rule.get("onExitCodes", {}).get("values", []):
            head = "Container ranks for pod default/demo-0 failed with exit code"
            return "PodFailurePolicy", f"{head} {code} matching {rule['action']} rule at index {i}"
    assert spec["backoffLimit"] == 0
    return "BackoffLimitExceeded", "Job has reached the specified backoff limit"


@pytest.mark.parametrize(
    ("codes", "action"),
    [
        ([75], "RestartJobSetAndIgnoreMaxRestarts"),
        ([2], "FailJobSet"),
        ([1], "FailJobSet"),
        ([137], "RestartJobSet"),
        ([75, 2], "FailJobSet"),  # one job says that it was a mistake
        ([137, 75], "RestartJobSetAndIgnoreMaxRestarts"),
    ],
)
def test_a_jobset_starts_again_by_the_exit_code_and_counts_only_what_was_not_saved(codes, action, tmp_path):
    (document,) = rendered(TPUS, tmp_path)
    assert decide(document, [failure(document, code) for code in codes]) == action


def test_a_pod_that_was_taken_away_does_not_count_whatever_its_code(tmp_path):
    (document,) = rendered(TPUS, tmp_path)
    for code in (1, 75, 137):
        assert decide(document, [failure(document, code, disrupted=True)]) == "RestartJobSetAndIgnoreMaxRestarts"


def test_the_pods_of_a_job_are_replaced_by_their_exit_codes(tmp_path):
    spec = rendered(CPUS, tmp_path)[1]["spec"]
    rules = [(r["action"], r.get("onExitCodes", {}).get("values")) for r in spec["podFailurePolicy"]["rules"]]
    assert rules == [("Ignore", None), ("Ignore", [75]), ("FailJob", [1, 2])]
    assert spec["podReplacementPolicy"] == "Failed" and spec["backoffLimit"] == 3
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] == 90


def test_a_pod_runs_the_supervisor_with_the_words_as_they_are(tmp_path):
    (document,) = rendered(GPUS, tmp_path)
    pod = document["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    command = pod["containers"][0]["command"]
    assert (
        command[0] == "env"
        and command[2:5] == ["python", "-m", "jaxmodels.launch.node"]
        and command[-4:-2]
        == [
            "train",
            "configs/gpt_stdlib.py",
        ]
    )
    assert command[-1] == "two words" and "--processes" in command and command[command.index("--devices") + 1] == "1"
    assert pod["containers"][0]["resources"]["limits"] == {"nvidia.com/gpu": 8}


def test_kubernetes_replaces_nothing_in_the_words(tmp_path):
    words = ["train", "cfg.py", "--name", "$(HOME) $$ $HOME $$(HOME) $"]
    command = rendered(CPUS, tmp_path, *words)[1]["spec"]["template"]["spec"]["containers"][0]["command"]
    # as Kubernetes does: $(NAME) by a variable, and $$ by $
    expanded = [re.sub(r"\$(\$|\(\w+\))", lambda found: "$" if found[1] == "$" else "/root", word) for word in command]
    assert expanded[-4:] == words


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"gpus": 8}, "got tpu v5e:2x4x4 and 8 GPUs"),
        ({"nodes": 2}, "one process for each of its 8 hosts"),
        ({"kind": "Job"}, "got kind Job with topology"),
        ({"tpu": "h100:1x8", "topology": ""}, "got tpu h100:1x8"),
        ({"tpu": "v5e:3x4"}, "a slice that exists"),
        ({"selectors": ("a b",)}, "got selectors 'a b', expected key=value"),
        ({"claims": ("runs",)}, "got claims 'runs', expected claim:/mounted/here"),
        ({"variables": ("1=2",)}, "got variables '1=2', expected NAME=value"),
        ({"variables": ("JAXMODELS_NODES=3",)}, "got variable JAXMODELS_NODES, which every job sets itself"),
        ({"image": ""}, "got no image, expected one, try --image IMAGE"),
    ],
)
def test_a_place_that_cannot_be_is_refused(change, said):
    with pytest.raises(UserError, match=re.escape(said)):
        dataclasses.replace(TPUS, **change)


def test_gpus_that_do_not_divide_and_runs_that_would_not_last_are_refused(tmp_path):
    with pytest.raises(UserError, match="got 8 GPUs for 3 processes"):
        dataclasses.replace(GPUS, processes=3)
    bare = dataclasses.replace(CPUS, claims=())
    with pytest.raises(UserError, match="got no claims"):
        bare.render(job(tmp_path))
    assert bare.render(job(tmp_path, "eval", "runs/x"))


def condition(kind, message=""):
    return {"type": kind, "status": "True", "message": message}


@pytest.mark.parametrize(
    ("status", "state", "code"),
    [
        ({}, State.WAITING, None),
        ({"replicatedJobsStatus": [{"name": "slice", "active": 2, "ready": 1}]}, State.STARTING, None),
        ({"replicatedJobsStatus": [{"name": "slice", "active": 2, "ready": 2}]}, State.RUNNING, None),
        ({"conditions": [condition("Suspended")]}, State.WAITING, None),
        ({"conditions": [condition("Completed")]}, State.DONE, 0),
        ({"conditions": [condition("Failed", "jobset failed")]}, State.FAILED, None),
    ],
)
def test_a_jobset_s_conditions_are_a_status(status, state, code):
    now = read({"kind": "JobSet", "spec": {"replicatedJobs": [{"replicas": 2}]}, "status": {"restarts": 4, **status}})
    assert (now.state, now.code, now.restarts) == (state, code, 4)


def test_a_job_says_which_code_it_failed_with():
    message = "Container ranks for pod default/demo-0-x failed with exit code 2 matching FailJob rule at index 2"
    now = read({"kind": "Job", "spec": {"parallelism": 2}, "status": {"conditions": [condition("Failed", message)]}})
    assert (now.state, now.code, now.detail) == (State.FAILED, 2, message)
    now = read({"kind": "Job", "spec": {"parallelism": 2, "suspend": True}})
    assert now.state is State.WAITING


KUBECTL = """#!/bin/sh
# keeps the objects that it is given as files, as a cluster would; refuse holds the kind that it does not create
echo "$@" >> "$CLUSTER/calls"
create() {
  [ "$(cat "$CLUSTER/refuse" 2> /dev/null)" = "$1" ] && { echo "$1s is forbidden" >&2; refused=1; return; }
  [ -e "$CLUSTER/$1" ] && { echo "(AlreadyExists): $1s \\"demo\\" already exists" >&2; refused=1; return; }
  touch "$CLUSTER/$1"
}
case " $* " in
  *" create "*) [ -e "$CLUSTER/meanwhile" ] && touch "$CLUSTER/service"
    create service; create job; exit $refused;;
  *" get "*"--output=name "*) for kind in service job; do [ -e "$CLUSTER/$kind" ] && echo "$kind/demo"; done;;
  *" get "*) [ -e "$CLUSTER/job" ] &&
    echo '{"kind": "Job", "spec": {"parallelism": 2}, "status": {"active": 2, "ready": 2}}';;
  *" delete job,service "*) rm -f "$CLUSTER/job" "$CLUSTER/service";;
  *" delete job "*) rm -f "$CLUSTER/job";;
  *" logs "*) echo "[pod/demo-0-x/ranks] step 1"; echo "[pod/demo-1-y/ranks] step 1";;
esac
exit 0
"""


@pytest.fixture
def kubectl(tmp_path, monkeypatch):
    """A folder that is the cluster of a `kubectl` on PATH."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "kubectl"
    program.write_text(KUBECTL)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("CLUSTER", str(tmp_path))
    return tmp_path


def test_a_job_goes_to_the_cluster_and_is_followed_and_deleted(kubectl):
    one, place = job(kubectl), dataclasses.replace(CPUS, context="there", namespace="team")
    for name, text in place.render(one).items():
        (kubectl / name).write_text(text)
    handle = place.submit(one)
    assert place.status(one, handle).state is State.RUNNING
    assert list(place.logs(one, handle)) == ["[pod/demo-0-x/ranks] step 1", "[pod/demo-1-y/ranks] step 1"]
    place.cancel(one, handle)
    assert place.status(one, handle).state is State.CANCELLED
    assert not (kubectl / "job").exists() and not (kubectl / "service").exists()
    calls = (kubectl / "calls").read_text().splitlines()
    assert all(call.startswith("--context=there --namespace=team ") for call in calls)


@pytest.mark.parametrize("kind", ["job", "service"])
def test_a_job_that_the_cluster_refuses_in_part_leaves_nothing_behind(kubectl, kind):
    (kubectl / "refuse").write_text(kind)
    with pytest.raises(UserError, match=f"{kind}s is forbidden"):
        CPUS.submit(job(kubectl))
    assert not (kubectl / "service").exists() and not (kubectl / "job").exists()


@pytest.mark.parametrize("there", ["service", "job"])
def test_a_name_that_is_taken_is_refused_and_what_has_it_is_left_alone(kubectl, there):
    (kubectl / there).touch()
    with pytest.raises(UserError, match=f"got {there}/demo, which is there already, .* --name"):
        CPUS.submit(job(kubectl))
    assert (kubectl / there).exists() and "delete" not in (kubectl / "calls").read_text()


def test_what_somebody_creates_in_between_is_left_alone_and_the_rest_deleted(kubectl):
    (kubectl / "meanwhile").touch()
    with pytest.raises(UserError, match='services "demo" already exists'):
        CPUS.submit(job(kubectl))
    assert (kubectl / "service").exists() and not (kubectl / "job").exists()
