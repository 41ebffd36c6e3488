"""Jobs under a real SLURM: a stand-in for the supervisor where only the script is asked, and one real training."""

import dataclasses
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import slurm as cluster
from jaxmodels import cli, load_run
from jaxmodels.errors import UserError
from jaxmodels.launch import record
from jaxmodels.launch.place import Job, State, Status
from jaxmodels.launch.slurm import Slurm, seconds
from tests.launch.jobs import job

# Called as an interpreter would be; the last word says how this job's supervisors behave.
STAND_IN = f"""#!/bin/bash
mode="${{@: -1}}"
folder="$(dirname "$0")/$mode"
mkdir -p "$folder"
echo "$SLURM_PROCID" >> "$folder/starts.$SLURM_PROCID"
attempt=$(wc -l < "$folder/starts.$SLURM_PROCID")
echo "$mode attempt $attempt of task $SLURM_PROCID"
while [ $# -gt 1 ]; do [ "$1" = --ended ] && ended=$2; shift; done
end() {{ echo "$1" >> "$ended"; exit "$1"; }}
trap 'trap "" TERM; echo saved; sleep 0.5; end 75' TERM
wait_for_it() {{ touch "$folder/waits.$SLURM_PROCID"; for i in $(seq 3000); do sleep 0.1; done; end 1; }}
case $mode in
  mistake) [ "$SLURM_PROCID" = 0 ] || wait_for_it; end 2;;
  broken) end 1;;
  killed) [ $attempt = 1 ] && {{ [ "$SLURM_PROCID" = 0 ] || kill -KILL $$; wait_for_it; }}; end 0;;
  peers*) {sys.executable} -SEc "
import os, sys
sys.path.insert(0, '{Path(__file__).resolve().parents[2]}')
from jaxmodels.launch.cluster import found
print('found', found(os.environ))";;
  again|limit|preempted) [ $attempt = 1 ] && wait_for_it; end 0;;
  *) wait_for_it;;
esac
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """The environment of a SLURM cluster, for this process too."""
    if lacking := cluster.missing():
        pytest.skip(lacking)
    with cluster.here(tmp_path_factory.mktemp("slurm")) as environ, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", environ["PATH"])
        patch.setenv("SLURM_CONF", environ["SLURM_CONF"])
        yield environ


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("jobs")
    (made / "python").write_text(STAND_IN)
    (made / "python").chmod(0o755)
    return made


def submit(folder: Path, mode: str, place: Slurm) -> tuple[Slurm, Job, str]:
    one = job(folder / f"job-{mode}", "train", mode, name=f"job-{mode}")
    one = dataclasses.replace(one, code=dataclasses.replace(one.code, python=str(folder / "python")))
    return hand_in(one, place)


def hand_in(one: Job, place: Slurm) -> tuple[Slurm, Job, str]:
    one.directory.mkdir(exist_ok=True)
    (text,) = place.render(one).values()
    (one.directory / "job.sh").write_text(text)
    return place, one, place.submit(one)


def until(submitted: tuple[Slurm, Job, str], *states: State, limit: float = 120.0) -> Status:
    place, one, handle = submitted
    end = time.monotonic() + limit
    while time.monotonic() < end:
        now = place.status(one, handle)
        if now.state in states:
            return now
        time.sleep(0.3)
    pytest.fail(f"{one.name} is {now}: {list(place.logs(one, handle))}")


TWO = Slurm(nodes=2, platform="cpu", grace=1.0, restarts=1)
ENDED = (State.DONE, State.FAILED, State.CANCELLED, State.GONE)


@pytest.fixture(scope="module")
def jobs(slurm, folder):
    """All jobs at once, since a real cluster takes its time to start one again; each is disturbed when it runs."""
    submitted = {
        "mistake": TWO, "broken": TWO, "killed": TWO, "peers1": TWO, "peers2": TWO, "again": TWO, "cancelled": TWO,
        "scancelled": TWO, "limit": dataclasses.replace(TWO, time="2"),
        "preempted": dataclasses.replace(TWO, nodes=1, partition="spot", directives=("--no-requeue",)),
    }  # fmt: skip
    submitted = {mode: submit(folder, mode, place) for mode, place in submitted.items()}
    for mode in ("again", "cancelled", "scancelled", "preempted"):
        place, one, handle = submitted[mode]
        end = time.monotonic() + 60
        while not all((folder / mode / f"waits.{task}").exists() for task in range(place.nodes)):
            assert time.monotonic() < end, f"{mode}: {place.status(one, handle)} {list(place.logs(one, handle))}"
            time.sleep(0.1)
        if mode == "again":
            subprocess.run(["scancel", "--signal=TERM", "--batch", handle], check=True)
        elif mode == "cancelled":
            assert place.status(one, handle).state is State.RUNNING
            place.cancel(one, handle)
        elif mode == "scancelled":
            subprocess.run(["scancel", handle], check=True)
        else:
            subprocess.run(["sbatch", "-p", "urgent", "-o", "/dev/null", "--wrap", "sleep 1"], check=True)
    return submitted


def starts(folder: Path, mode: str) -> int:
    return len((folder / mode / "starts.0").read_text().splitlines())


@pytest.mark.parametrize(("mode", "code"), [("mistake", 2), ("broken", 1)])
def test_a_job_that_failed_is_not_started_again(jobs, folder, mode, code):
    status = until(jobs[mode], *ENDED)
    assert (status.state, status.code, status.restarts) == (State.FAILED, code, 0)
    assert starts(folder, mode) == 1


def test_two_jobs_on_the_same_nodes_meet_at_ports_of_their_own(jobs):
    found = {}
    for mode in ("peers1", "peers2"):
        assert until(jobs[mode], *ENDED).state is State.DONE
        lines = [line for line in jobs[mode][0].logs(*jobs[mode][1:]) if line.startswith("found ")]
        found[mode] = [re.findall(r"nodes=2, node=(\d), host='localhost', port=(\d+)", line)[0] for line in lines]
        assert sorted(node for node, _ in found[mode]) == ["0", "1"]
    ports = [{port for _, port in rows} for rows in found.values()]
    assert len(ports[0]) == len(ports[1]) == 1 and ports[0] != ports[1]


def test_a_job_that_is_told_to_save_starts_again_and_ends(jobs, folder):
    status = until(jobs["again"], *ENDED)
    assert (status.state, status.code, status.restarts) == (State.DONE, 0, 1)
    assert starts(folder, "again") == 2
    lines = list(jobs["again"][0].logs(*jobs["again"][1:]))
    assert lines.count("saved") == 2 and "again attempt 2 of task 1" in lines  # and the log goes on


def test_where_slurm_does_not_requeue_a_preempted_job_a_successor_goes_on(jobs, folder):
    _, one, handle = jobs["preempted"]
    status = until(jobs["preempted"], *ENDED)
    assert (status.state, status.restarts) == (State.DONE, 1)
    rows = (one.directory / "attempts").read_text().split("\n")
    assert [row.split()[1] for row in rows if row] == ["started", "submitted", "started"]
    assert rows[1].split()[0] == rows[2].split()[0] != handle


def test_a_supervisor_that_was_killed_starts_the_job_again_a_few_times(jobs, folder):
    status = until(jobs["killed"], *ENDED)
    assert (status.state, status.restarts) == (State.DONE, 1)


@pytest.mark.parametrize("mode", ["cancelled", "scancelled"])
def test_a_job_that_is_cancelled_stays_so(jobs, folder, mode):
    assert until(jobs[mode], *ENDED).state is State.CANCELLED
    time.sleep(1.0)
    assert jobs[mode][0].status(*jobs[mode][1:]).state is State.CANCELLED and starts(folder, mode) == 1
    if mode == "cancelled":
        assert "saved" in list(jobs[mode][0].logs(*jobs[mode][1:]))


def test_a_job_that_slurm_refuses_is_a_mistake_in_one_line(slurm, folder):
    with pytest.raises(UserError, match=r"got a refusal from sbatch .*partition"):
        submit(folder, "nowhere", dataclasses.replace(TWO, partition="nowhere"))


def test_a_job_that_slurm_has_forgotten_is_gone_unless_it_said_how_it_ended(slurm, tmp_path):
    assert TWO.status(job(tmp_path), "999999").state is State.GONE
    (tmp_path / "code").write_text("2\n")
    assert TWO.status(job(tmp_path), "999999").code == 2


FAKES = {
    "srun": "#!/bin/sh\nexit 75\n",
    "scontrol": '#!/bin/sh\n[ "$1" = requeue ] && exit 1\necho JobState=RUNNING PreemptTime=None\n',
    "sbatch": "#!/bin/sh\nexit 1\n",
    "squeue": "#!/bin/sh\necho 'FAILED|NonZeroExitCode'\n",
}


def run_with(fakes: dict[str, str], place: Slurm, one: Job, folder: Path, monkeypatch) -> subprocess.CompletedProcess:
    """Run a job's script, with stand-ins for SLURM's programs."""
    for name, text in fakes.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    one.directory.mkdir()
    script = place.render(one)["job.sh"]
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False, timeout=60)


def test_where_slurm_lets_nothing_start_again_the_job_says_how_to_go_on(tmp_path, monkeypatch):
    one = job(tmp_path / "record")
    ran = run_with(FAKES, TWO, one, tmp_path, monkeypatch)
    assert ran.returncode == 75
    assert f"go on with: sbatch {one.directory}/job.sh" in ran.stdout
    assert TWO.status(one, "7") == Status(State.SAVED, "", 75)


def test_a_signal_during_the_setup_reaches_the_supervisors_once_they_are_there(tmp_path, monkeypatch):
    tries, told = tmp_path / "tries", tmp_path / "told"
    third = f"echo >> {tries}; [ $(wc -l < {tries}) -lt 3 ] || touch {told}; [ -e {told} ]"
    fakes = {
        "scancel": f"#!/bin/sh\n{third}\n",
        "srun": f"#!/bin/sh\nuntil [ -e {told} ]; do sleep 0.1; done\nexit 75\n",
    }
    place = dataclasses.replace(TWO, setup=("kill -TERM $$",))
    assert run_with(FAKES | fakes, place, job(tmp_path / "record"), tmp_path, monkeypatch).returncode == 75
    assert tries.read_text().count("\n") == 3


def test_the_script_says_what_the_place_says(tmp_path):
    place = Slurm(
        nodes=4, min_nodes=3, processes=8, devices=1, platform="gpu", partition="gpu", account="a b", qos="high",
        gres="gpu:h100:8", constraint="ib", cpus=64, time="1-00:00:00", directives=("--exclusive", "mem=0", "-w a"),
        setup=("module load cuda",), restarts=5,
    )  # fmt: skip
    text = place.render(job(tmp_path / "50%"))["job.sh"]
    for line in (
        "--nodes=4", "--ntasks-per-node=1", "--cpus-per-task=64", "--partition=gpu", '--account="a b"', "--qos=high",
        "--gres=gpu:h100:8", "--constraint=ib", "--time=1-00:00:00", "--signal=B:TERM@90", "--requeue", "--no-kill",
        "--open-mode=append", "--exclusive", "--mem=0", "-w a", f"--output={tmp_path}/50%%/output.log",
    ):  # fmt: skip
        assert f"\n#SBATCH {line}\n" in text, line
    (srun,) = [line for line in text.split("\n") if line.startswith("srun ")]
    assert "--kill-on-bad-exit=0 --wait=0 --no-kill" in srun  # the supervisors that are left go on
    assert "--min-nodes 3 -- train" in srun and "--processes 8 --devices 1" in srun and "'two words'" in srun
    assert text.index("module load cuda\n") < text.index(srun)
    assert subprocess.run(["bash", "-n", "-c", text], check=False).returncode == 0


@pytest.mark.parametrize(
    ("container", "words"),
    [
        (
            "pyxis",
            "--container-image=nvcr.io/jax --container-mounts={here}:{here},/data:/data --container-workdir={here}",
        ),
        ("apptainer", "apptainer exec --nv --bind {here}:{here},/data:/data --pwd {here} nvcr.io/jax"),
    ],
)
def test_a_container_sees_the_working_directory_and_runs_its_own_python(tmp_path, container, words):
    one = job(tmp_path)
    place = Slurm(image="nvcr.io/jax", container=container, mounts=("/data",))
    text = place.render(one)["job.sh"]
    assert words.format(here=one.code.directory) in text
    assert " python -m jaxmodels.launch.node" in text and "lock" not in text  # versions are the image's own


@pytest.mark.parametrize(
    ("text", "limit"),
    [("", None), ("30", 1800), ("30:10", 1810), ("4:00:00", 14400), ("1-12", 129600), ("2-00:00:30", 172830)],
)
def test_time_limits_are_read_as_slurm_reads_them(text, limit):
    assert seconds(text) == limit


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"time": "1"}, "got time 1, of which the last 90 s are for saving"),
        ({"time": "4h"}, "got time '4h'"),
        ({"nodes": 2, "min_nodes": 3}, "got min_nodes 3 of 2 nodes"),
        ({"mounts": ("/data",)}, "got mounts without an image"),
        ({"directives": ("exclusive mem",)}, "got directive 'exclusive mem', .* try --directives exclusive"),
        ({"directives": ("",)}, "got directive ''"),
        ({"directives": ("--a\nrm -rf /",)}, "got directive"),
    ],
)
def test_a_place_that_cannot_be_is_refused(change, said):
    with pytest.raises(UserError, match=said):
        Slurm(**change)


def test_where_there_is_no_slurm_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", os.devnull)
    with pytest.raises(UserError, match="got no program 'sbatch' here"):
        hand_in(job(tmp_path), Slurm())


CONFIG = """
from jaxmodels.config import Classification, Config, Synthetic
from jaxmodels.models.mlp import MLPConfig


def get_config() -> Config:
    model = MLPConfig(input_shape=(4, 4, 1), classes=4, hidden=(16,), dropout=0.1)
    return Config(model=model, task=Classification(), data=Synthetic(batch_size=8))
"""
# a run that begins takes so long for its steps that it is told to stop before its last; one that goes on does not
SLOW = """
import time

from jaxmodels.train.loggers import Logger


class Slow(Logger):
    def start(self, run, config, step):
        self.pause = 0.0 if step else 0.5

    def scalars(self, step, values):
        time.sleep(self.pause)
"""
PLACE = """
from jaxmodels.launch.slurm import Slurm


def get_place() -> Slurm:
    return Slurm(nodes=2, processes=1, platform="cpu")
"""


@pytest.mark.timeout(900)
def test_a_training_that_was_told_to_stop_ends_with_the_bits_of_one_that_was_not(slurm, tmp_path, monkeypatch):
    """Both at once, on the same two nodes, by the command."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).resolve().parents[2]}:{tmp_path}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # all of them run the same programs
    files = {"config.py": CONFIG, "place.py": PLACE, "slow.py": SLOW}
    for file, text in files.items():
        (tmp_path / file).write_text(text)
    fields = "--train.steps 100 --optim.warmup-steps 1 --eval.batches 1 --checkpoint.every 0 --metrics.every 1"
    submitted = {}
    for name in ("told", "left"):
        loggers = ["--metrics.loggers", *(["slow:Slow"] if name == "told" else [])]
        command = ["train", "config.py", "--run-dir", name, "--mesh.data", "2", "--resume", "auto", *fields.split()]
        assert cli.main(["launch", "place.py", "--name", name, "--", *command, *loggers]) == 0
        found = record.read(name)
        submitted[name] = (found.place, found.job, found.handle)
    end = time.monotonic() + 400
    while not (metrics := tmp_path / "told" / "metrics.jsonl").exists() or not metrics.read_text():
        assert time.monotonic() < end, list(submitted["told"][0].logs(*submitted["told"][1:]))
        time.sleep(0.05)
    subprocess.run(["scancel", "--signal=TERM", "--batch", submitted["told"][2]], check=True)
    for name, restarts in (("told", 1), ("left", 0)):
        status = until(submitted[name], *ENDED, limit=400)
        said = list(submitted[name][0].logs(*submitted[name][1:]))
        assert (status.state, status.restarts) == (State.DONE, restarts), "\n".join(said)
    told, left = (jax.tree.leaves(load_run(tmp_path / name).params) for name in ("told", "left"))
    assert len(told) == len(left) == 4
    for ours, theirs in zip(told, left, strict=True):
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


def test_a_job_saves_before_its_time_limit_and_goes_on(jobs, folder):
    """Its limit is so far off that SLURM, which warns up to a minute early, does so when the supervisors are there.

    It comes last in this file, so that other tests run meanwhile.
    """
    status = until(jobs["limit"], *ENDED, limit=300)
    assert (status.state, status.restarts) == (State.DONE, 1)
    lines = list(jobs["limit"][0].logs(*jobs["limit"][1:]))
    assert lines.count("saved") == 2
    assert any(re.fullmatch(r"launch: told to save, \d+:\d\d before the time limit", line) for line in lines)
