"""Queued resources against a fake of the service: a `gcloud` on PATH that keeps state and takes machines away."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jaxmodels.commands.launch_cancel import cancel
from jaxmodels.errors import UserError
from jaxmodels.launch import record, tpu
from jaxmodels.launch.place import Job, State
from jaxmodels.launch.tpu import TPU
from tests.launch.jobs import job

PLACE = TPU(tpu="v6e:4x4", zone="us-east5-b", image="i:1", mounts=("/mnt/runs:/app/runs",), grace=1.0)

GCLOUD = f"""#!{sys.executable} -SE
import fcntl, json, os, sys, time
words = sys.argv[1:]
root = os.environ["CLOUD"]
with open(root + "/lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    with open(root + "/calls", "a") as calls:
        calls.write(json.dumps(words) + "\\n")
    cloud = json.load(open(root + "/cloud.json"))
    def keep():
        json.dump(cloud, open(root + "/part", "w"))
        os.replace(root + "/part", root + "/cloud.json")
    if words[0] == "alpha":
        del words[0]
    elif any(word.startswith("--reservation=") for word in words):
        sys.exit("ERROR: (gcloud) unrecognized arguments: --reservation")
    elif any(word.startswith("--type=") and word[7:] not in ("v2", "v3", "v4") for word in words):
        sys.exit("ERROR: (gcloud) argument --type: Invalid choice")
    assert words[:2] == ["compute", "tpus"] and "--zone=us-east5-b" in words and "--quiet" in words, words
    noun, verb, name = words[2:5]
    queued = cloud["queued"]
    if verb == "create":
        if cloud.get("others"):  # somebody was faster
            queued[name] = ["ACTIVE"]
            keep()
        if cloud.get("refuses"):
            sys.exit("ERROR: (gcloud) RESOURCE_EXHAUSTED: quota")
        if name in queued:
            sys.exit("ERROR: ALREADY_EXISTS: " + name)
        queued[name] = cloud["lives"].pop(0)
        keep()
    elif noun == "queued-resources" and name not in queued:
        sys.exit("ERROR: (gcloud) NOT_FOUND: Resource not found")
    elif verb == "delete":
        queued[name] = ["DELETING"]
        keep()
    elif verb == "describe":
        states = queued[name]
        state = states.pop(0) if len(states) > 1 else states[0]
        if states == ["DELETING"] and state == "DELETING":
            del queued[name]
        keep()
        if state == "(no answer)":
            sys.exit("ERROR: UNAVAILABLE")
        failed = {{"failedData": {{"error": {{"message": "no capacity"}}}}}} if state == "FAILED" else {{}}
        print(json.dumps({{"state": {{"state": state, **failed}}}}))
    elif verb == "ssh" and "docker kill" in " ".join(words):
        cloud["told"] = True
        keep()
    elif verb == "ssh":
        code, after = cloud["runs"].pop(0)
        if after:
            queued[cloud["name"]] = after
        keep()
if verb == "ssh" and "docker kill" not in " ".join(words):
    print("worker of", name, flush=True)
    while code == "told":
        time.sleep(0.05)
        code = 75 if json.load(open(root + "/cloud.json")).get("told") else code
    sys.exit(code)
"""


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """Starts a service: the states that each request goes through, and how each run on the machines ends."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "gcloud"
    program.write_text(GCLOUD)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("CLOUD", str(tmp_path))
    monkeypatch.setattr(tpu, "_POLL_SECONDS", 0.01)

    def start(lives, runs=(), **more):
        state = {"queued": {}, "lives": lives, "runs": list(runs), "name": "demo", **more}
        (tmp_path / "cloud.json").write_text(json.dumps(state))

    return start


def submit(directory: Path, place: TPU = PLACE) -> State:
    """Submit, as the command does, and give the state that the job has then."""
    one = job(directory)
    for name, text in place.render(one).items():
        (directory / name).write_text(text)
    handle = place.submit(one)
    return place.status(one, handle).state


def submitted(directory: Path, monkeypatch) -> Job:
    """A job with its record, as a command that was killed leaves it."""
    monkeypatch.setattr(record, "JOBS", directory / "jobs")
    one = job(directory / "jobs" / "demo")

    def killed(place, job):
        job.started("handle")
        return "handle"

    with monkeypatch.context() as patch:
        patch.setattr(TPU, "submit", killed)
        return record.submit(PLACE, "", one).job


def calls(directory: Path, verb: str) -> list[list[str]]:
    rows = [json.loads(line) for line in (directory / "calls").read_text().splitlines()]
    return [row for row in rows if row[3] == verb]


def rented(directory: Path) -> bool:
    """Whether machines are left that nobody deletes."""
    queued = json.loads((directory / "cloud.json").read_text())["queued"]
    return any(states != ["DELETING"] for states in queued.values())


COMING = ["CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
TAKEN = ["SUSPENDING", "SUSPENDED"]


def test_a_job_waits_for_its_machines_runs_on_every_worker_and_gives_them_back(cloud, tmp_path):
    cloud([COMING], [(0, None)])
    assert submit(tmp_path) is State.DONE
    (ssh,) = calls(tmp_path, "ssh")
    assert "--worker=all" in ssh and f"--command={(tmp_path / 'worker.sh').read_text()}" in ssh
    assert "worker of demo" in (tmp_path / "log.txt").read_text() and not rented(tmp_path)


def test_machines_that_are_taken_away_are_asked_for_again_as_often_as_need_be(cloud, tmp_path):
    cloud([COMING, *[["ACTIVE"]] * 3], [(75, TAKEN), (255, TAKEN), (255, TAKEN), (0, None)])
    assert submit(tmp_path, dataclasses.replace(PLACE, restarts=1)) is State.DONE
    assert len(calls(tmp_path, "create")) == 4 and not rented(tmp_path)
    assert len({tuple(call) for call in calls(tmp_path, "create")}) == 1  # the same request each time


@pytest.mark.parametrize(("code", "state"), [(2, State.FAILED), (1, State.FAILED)])
def test_a_job_that_failed_is_not_run_again(cloud, tmp_path, code, state):
    cloud([COMING], [(code, None)])
    assert submit(tmp_path) is state
    assert PLACE.status(job(tmp_path), "").code == code
    assert len(calls(tmp_path, "ssh")) == 1 and not rented(tmp_path)


def test_a_lost_connection_to_machines_that_stay_counts_against_the_restarts(cloud, tmp_path):
    cloud([COMING], [(255, None)] * 3)
    assert submit(tmp_path, dataclasses.replace(PLACE, restarts=2)) is State.FAILED
    assert len(calls(tmp_path, "ssh")) == 3 and "given up after 2 restarts" in (tmp_path / "log.txt").read_text()


def test_a_request_that_fails_is_made_again_and_its_reason_is_said(cloud, tmp_path):
    cloud([["WAITING_FOR_RESOURCES", "FAILED"], COMING], [(0, None)])
    assert submit(tmp_path) is State.DONE
    assert "failed no capacity" in (tmp_path / "log.txt").read_text()
    cloud([["FAILED"]] * 4)
    (tmp_path / "code").unlink()
    assert submit(tmp_path, dataclasses.replace(PLACE, restarts=1)) is State.FAILED and not rented(tmp_path)


def test_a_service_that_does_not_answer_for_a_while_ends_no_job(cloud, tmp_path, monkeypatch):
    cloud([["WAITING_FOR_RESOURCES", "(no answer)", "(no answer)", "ACTIVE"]], [(0, None)])
    assert submit(tmp_path) is State.DONE


def test_machines_that_somebody_deletes_are_not_asked_for_again(cloud, tmp_path):
    cloud([["WAITING_FOR_RESOURCES", "DELETING"]])
    assert submit(tmp_path) is State.FAILED
    assert len(calls(tmp_path, "create")) == 1


@pytest.mark.parametrize("state", [{"queued": {"demo": ["ACTIVE"]}}, {"others": True}])
def test_a_name_that_somebody_else_has_is_refused_and_their_machines_are_left_alone(
    cloud, tmp_path, monkeypatch, state
):
    cloud([], **state)
    monkeypatch.setattr(record, "JOBS", tmp_path / "jobs")
    one = job(tmp_path / "jobs" / "demo")
    with pytest.raises(UserError, match="got queued resource demo, which is there already in us-east5-b, .* --name"):
        record.submit(PLACE, "", one)
    assert not calls(tmp_path, "delete") and rented(tmp_path) and not one.directory.exists()


def test_a_first_request_that_fails_is_deleted_in_case_it_was_made_all_the_same(cloud, tmp_path):
    cloud([], refuses=True)
    with pytest.raises(UserError, match="RESOURCE_EXHAUSTED"):
        submit(tmp_path)
    assert len(calls(tmp_path, "delete")) == 1


@pytest.mark.parametrize("waiting", [False, True])
def test_a_signal_lets_the_job_save_and_gives_the_machines_back(cloud, tmp_path, waiting):
    cloud([["WAITING_FOR_RESOURCES"] if waiting else COMING], [("told", None)])

    def interrupt():
        sign = '"create"' if waiting else '"ssh"'
        while not (tmp_path / "calls").exists() or sign not in (tmp_path / "calls").read_text():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    assert submit(tmp_path) is State.SAVED
    assert not rented(tmp_path) and len(calls(tmp_path, "ssh")) == (0 if waiting else 2)


def test_cancel_from_elsewhere_tells_the_workers_and_the_job_is_cancelled(cloud, tmp_path):
    cloud([COMING], [("told", None)])

    def interrupt():
        while not (tmp_path / "calls").exists() or '"ssh"' not in (tmp_path / "calls").read_text():
            time.sleep(0.02)
        assert PLACE.status(job(tmp_path), "").state is State.RUNNING
        PLACE.cancel(job(tmp_path), "")

    threading.Thread(target=interrupt, daemon=True).start()
    assert submit(tmp_path) is State.CANCELLED and not rented(tmp_path)


def test_machines_whose_command_was_killed_are_deleted_by_cancelling_twice(cloud, tmp_path, monkeypatch):
    cloud([], queued={"demo": ["ACTIVE"]})
    one = submitted(tmp_path, monkeypatch)
    cancel("demo")
    assert rented(tmp_path) and len(calls(tmp_path, "ssh")) == 1
    cancel("demo")
    assert not rented(tmp_path) and len(calls(tmp_path, "ssh")) == 1
    assert PLACE.status(one, "").state is State.WAITING  # DELETING
    assert PLACE.status(one, "").state is State.CANCELLED


@pytest.mark.parametrize("states", [["FAILED"], []])
def test_cancel_reaches_a_command_whose_machines_are_about_to_be_asked_for_again(cloud, tmp_path, monkeypatch, states):
    cloud([], queued={"demo": states} if states else {})
    one = submitted(tmp_path, monkeypatch)
    cancel("demo")
    assert (one.directory / "cancelled").exists() and not rented(tmp_path)


def test_a_job_that_has_ended_is_not_cancelled(cloud, tmp_path, monkeypatch, capsys):
    cloud([])
    one = submitted(tmp_path, monkeypatch)
    (one.directory / "code").write_text("75")
    cancel("demo")
    assert capsys.readouterr().out == "demo has ended: saved, exit code 75\n"
    assert PLACE.status(one, "").state is State.SAVED and not (tmp_path / "calls").exists()


def test_several_slices_are_one_request_and_run_at_once(cloud, tmp_path):
    cloud([COMING], [(0, None), (0, None)])
    assert submit(tmp_path, dataclasses.replace(PLACE, tpu="v6e:2x4x4")) is State.DONE
    (create,) = calls(tmp_path, "create")
    assert "--node-count=2" in create and "--node-prefix=demo" in create
    assert sorted(call[4] for call in calls(tmp_path, "ssh")) == ["demo-0", "demo-1"]
    assert "slice 1: worker of demo-1" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize(
    ("change", "track"),
    [
        ({}, "compute"),
        ({"tpu": "v4:2x2x2"}, "compute"),
        ({"tpu": "v5p:2x2x2"}, "alpha"),
        ({"capacity": "reserved", "reservation": "mine"}, "alpha"),
    ],
)
def test_alpha_is_asked_only_for_what_no_other_version_of_gcloud_s_command_has(cloud, tmp_path, change, track):
    cloud([COMING], [(0, None)])
    place = dataclasses.replace(PLACE, **change)
    assert submit(tmp_path, place) is State.DONE
    assert place.render(job(tmp_path))["create.sh"].split("gcloud ")[1].startswith(track)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, ["--accelerator-type=v6e-16", "--runtime-version=v2-alpha-tpuv6e", "--spot", "--node-id=demo"]),
        ({"tpu": "v5e:2x4", "capacity": "on-demand"}, ["--accelerator-type=v5litepod-8"]),
        ({"tpu": "v5p:2x2x4", "project": "p"}, ["--type=v5p", "--topology=2x2x4", "--project=p"]),
        ({"capacity": "reserved", "reservation": "mine"}, ["--reserved", "--reservation=mine"]),
    ],
)
def test_the_request_says_what_is_wanted(change, words, tmp_path):
    ask = dataclasses.replace(PLACE, **change).render(job(tmp_path))["create.sh"].split()
    assert set(words) <= set(ask)
    assert ("--spot" in ask) == (change.get("capacity", "spot") == "spot")


def test_the_workers_script_runs_the_supervisor_in_the_image_with_the_words_as_they_are(tmp_path):
    place = dataclasses.replace(PLACE, setup=("mountpoint /mnt || false  # the bucket",))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sudo").write_text('#!/bin/sh\n[ "$2" = run ] && for word in "$@"; do echo "<$word>"; done\n')
    (tmp_path / "bin" / "mountpoint").write_text("#!/bin/sh\nexit 0\n")
    for program in (tmp_path / "bin").iterdir():
        program.chmod(0o755)
    environ = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    text = place.render(job(tmp_path))["worker.sh"]
    said = subprocess.run(["sh", "-c", text], env=environ, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    assert said[said.index("<i:1>") + 1] == "<env>" and "<jaxmodels.launch.node>" in said
    assert "<two words>" in said and "</mnt/runs:/app/runs>" in said
    (tmp_path / "bin" / "mountpoint").write_text("#!/bin/sh\nexit 1\n")
    assert subprocess.run(["sh", "-c", text], env=environ, capture_output=True, check=False).returncode == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"reservation": "mine"}, "got reservation mine with spot machines"),
        ({"mounts": ("runs",)}, "got mounts 'runs'"),
        ({"tpu": "v7:2x2x2"}, "got tpu v7"),
        ({"tpu": "v6e:3x3"}, "a slice that exists"),
    ],
)
def test_a_place_that_cannot_be_is_refused(change, said):
    with pytest.raises(UserError, match=said):
        dataclasses.replace(PLACE, **change)


def test_runs_that_would_go_with_their_machines_are_refused(tmp_path):
    with pytest.raises(UserError, match="got no mounts"):
        dataclasses.replace(PLACE, mounts=()).render(job(tmp_path))
