"""`jaxmodels launch` from its arguments to its exit code, with a place of one file that only takes notes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jaxmodels.cli import main
from jaxmodels.launch import record

PLACE = '''
"""A queue that is a directory."""
import os
import signal
from dataclasses import dataclass
from pathlib import Path

from jaxmodels.errors import UserError
from jaxmodels.fields import Count
from jaxmodels.launch.place import Place, State, Status


@dataclass(frozen=True, kw_only=True)
class Queue(Place):
    """Takes notes of what it is asked for."""

    nodes: Count = 2
    """Machines to ask for."""
    path: str = "queue"
    """Where the notes are."""

    def render(self, job):
        return {"job.sh": "#!/bin/sh\\n" + " ".join(self.supervisor(job, self.nodes)) + "\\n"}

    def submit(self, job):
        if os.environ.get("QUEUE") == "full":
            raise UserError("got no room, expected some, try tomorrow")
        Path(self.path).mkdir(exist_ok=True)
        (Path(self.path) / job.name).write_text((job.directory / "job.sh").read_text())
        if os.environ.get("QUEUE") in ("interrupted", "stuck"):
            os.kill(os.getpid(), signal.SIGTERM)
        return f"{self.path}/{job.name}"

    def status(self, job, handle):
        if (Path(self.path) / "done").exists():
            return Status.ended(0, 1)
        return Status(State.WAITING, "behind others") if Path(handle).exists() else Status(State.CANCELLED)

    def logs(self, job, handle, follow=False):
        yield from Path(handle).read_text().splitlines()

    def cancel(self, job, handle):
        if os.environ.get("QUEUE") == "stuck":
            raise UserError("got no answer, expected one, try jaxmodels launch cancel again")
        Path(handle).unlink()


def get_place():
    return Queue(nodes=4)
'''
CONFIG = """
from jaxmodels.config import Config, Stdlib
from jaxmodels.models.gpt2 import GPT2Config


def get_config():
    return Config(model=GPT2Config(vocab_size=256), data=Stdlib())
"""


TPU = "tpu --tpu v6e:4x4 --zone us-east5-b --image i:1 --mounts /mnt/runs:/app/runs"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a place and a config, under no version control."""
    (tmp_path / "notes.py").write_text(PLACE)
    (tmp_path / "cfg.py").write_text(CONFIG)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--processes 2 -- train cfg.py", "got --processes, expected a place first, try jaxmodels launch local"),
        ("locl -- train cfg.py", "got place 'locl', expected a file with get_place(), one of local"),
        ("statsu x", "did you mean 'status'?"),
        ("ntoes.py -- train cfg.py", "expected a Python file with get_place(), did you mean 'notes.py'"),
        ("cfg.py -- train cfg.py", "got place 'cfg.py' without get_place(), expected get_place() -> Place"),
        ("json:dumps -- train cfg.py", "got place json:dumps, "),
        ("local --proceses 2 -- train cfg.py", "an option of jaxmodels launch local, did you mean '--processes'?"),
        ("local --processes two -- train cfg.py", "got --processes 'two', expected INT"),
        ("local --processes 0 -- train cfg.py", "got processes 0, expected at least 1, try --processes 1"),
        ("local --platform gpus -- train cfg.py", "expected one of auto, cpu, gpu, tpu, did you mean 'gpu'?"),
        ("local --name Mine! -- train cfg.py", "got name 'Mine!', expected lower-case letters, digits and hyphens"),
        ("local cfg.py", "got 'cfg.py', expected options only of jaxmodels launch local"),
        ("local", "got nothing to launch, expected a command after --, try jaxmodels launch local -- train"),
        ("local --", "got nothing to launch, expected a command after --"),
        ("local -- tarin cfg.py", "got command 'tarin' after --, expected one of train, eval"),
        ("ssh -- train cfg.py", "expected --hosts"),
        ("ssh --hosts a a -- train cfg.py", "got host a twice"),
        ("ssh --hosts a b --min-hosts 3 -- train cfg.py", "got min_hosts 3, expected at most the 2 hosts"),
        # what would wait in a queue is held to its config before
        ("notes.py -- train cgf.py", "expected a Python file with get_config(), did you mean 'cfg.py'"),
        ("notes.py -- train cfg.py --optim.peek-lr 3", "did you mean '--optim.peak-lr'?"),
        ("notes.py -- eval runs/x --stepp 3", "did you mean"),
        (f"{TPU} -- train cfg.py --optim.peek-lr 3", "did you mean '--optim.peak-lr'?"),
        ("notes.py --nodes 1.5 -- train cfg.py", "got --nodes '1.5', expected INT"),
        ("status nothing", "got job 'nothing', expected a job in runs/launch"),
        ("logs nothing", "got job 'nothing'"),
        ("cancel nothing", "got job 'nothing'"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_2_and_leaves_nothing(here: Path, arguments: str, said: str, capsys) -> None:
    assert main(["launch", *arguments.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: got") and said in err
    assert not (here / "runs").exists()


def test_a_dry_run_prints_what_would_be_submitted_and_submits_nothing(here: Path, capsys) -> None:
    assert main("launch notes.py --dry-run --name a-b --nodes 3 -- train cfg.py --train.steps 7".split()) == 0
    out = capsys.readouterr().out
    assert "-m jaxmodels.launch.node --processes 3 " in out and out.endswith("-- train cfg.py --train.steps 7\n")
    assert not (here / "runs").exists() and not (here / "queue").exists()


def test_options_of_sbatch_are_given_without_their_dashes(here: Path, capsys) -> None:
    assert main("launch slurm --directives exclusive mem=0 --dry-run -- train cfg.py".split()) == 0
    assert "\n#SBATCH --exclusive\n#SBATCH --mem=0\n" in capsys.readouterr().out


def test_a_job_is_found_by_its_name_until_it_is_cancelled(here: Path, capsys) -> None:
    assert main("launch notes.py --path notes --name mine -- train cfg.py".split()) == 0
    out, err = capsys.readouterr()
    assert "jaxmodels launch status mine" in out and "is not under git" in err
    written = json.loads((here / "runs/launch/mine/job.json").read_text())
    assert written["command"] == ["train", "cfg.py"] and written["fields"]["path"] == "notes"
    assert f"python=={sys.version.split()[0]}" in (here / "runs/launch/mine/lock.txt").read_text().split("\n")
    assert main("launch status".split()) == 0 and main("launch status mine".split()) == 0
    assert capsys.readouterr().out == "mine  waiting, behind others\n" * 2
    assert main("launch logs mine".split()) == 0
    assert capsys.readouterr().out == (here / "runs/launch/mine/job.sh").read_text()
    assert main("launch notes.py --name mine -- train cfg.py".split()) == 2
    assert "got job mine, which is there already" in capsys.readouterr().err
    assert main("launch status min".split()) == 2 and "did you mean 'mine'?" in capsys.readouterr().err
    assert main("launch cancel mine".split()) == 0 and not (here / "notes/mine").exists()
    capsys.readouterr()
    assert main("launch status mine".split()) == 0 and capsys.readouterr().out == "mine  cancelled\n"


def test_cancel_leaves_a_job_alone_that_has_ended_and_says_how(here: Path, capsys) -> None:
    assert main("launch notes.py --name mine -- train cfg.py".split()) == 0
    (here / "queue/done").touch()
    capsys.readouterr()
    assert main("launch cancel mine".split()) == 0 and (here / "queue/mine").exists()
    assert capsys.readouterr().out == "mine has ended: done, exit code 0, 1 restart\n"


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets jobs of this machine be done without a process."""

    def stay(job, begin) -> str:
        job.started("machine 1 1")
        (job.directory / "code").write_text("0")
        return "machine 1 1"

    monkeypatch.setattr("jaxmodels.launch.foreground.stay", stay)


@pytest.mark.usefixtures("at_once")
def test_a_job_whose_submission_was_cut_off_is_said_to_be_so_and_nothing_is_done(here: Path, capsys) -> None:
    for name, place in (("queued", "notes.py"), ("here", "local")):
        assert main(f"launch {place} --name {name} -- train cfg.py".split()) == 0
        (here / "runs/launch" / name / "handle").unlink()
        capsys.readouterr()
        for asked in (f"cancel {name}", f"logs {name}", f"logs {name} --follow"):
            assert main(f"launch {asked}".split()) == 2
            out, err = capsys.readouterr()
            said = f"error: got job {name}, expected one that was submitted: the submission was cut off\n"
            assert (out, err) == ("", said)
        assert main(f"launch status {name}".split()) == 0
        assert capsys.readouterr().out == f"{name}  gone, the submission was cut off\n"
    assert (here / "queue/queued").exists()


@pytest.mark.usefixtures("at_once")
def test_a_job_whose_place_has_other_fields_by_now_is_unknown_and_hides_no_other(here: Path, capsys) -> None:
    for place, name in (("notes.py", "file"), ("local", "kind")):
        assert main(f"launch {place} --name {name} -- train cfg.py".split()) == 0
        written = here / "runs/launch" / name / "job.json"
        fields = written.read_text().replace('"restarts"', '"attempts"')
        written.write_text(fields)
    assert main("launch notes.py --name whole -- train cfg.py".split()) == 0
    capsys.readouterr()
    assert main(["launch", "status"]) == 0
    said = capsys.readouterr().out.splitlines()
    for line, name in zip(said, ("file ", "kind "), strict=False):
        assert line.startswith(f"{name}  unknown: got runs/launch/{name.strip()}/job.json with other fields than"), line
        assert "'attempts'" in line
    assert said[2] == "whole  waiting, behind others"
    assert main("launch cancel kind".split()) == 2


@pytest.mark.parametrize(("how", "code"), [("interrupted", 130), ("full", 2)])
def test_an_interrupted_or_refused_submission_leaves_nothing(here: Path, how: str, code: int, monkeypatch) -> None:
    monkeypatch.setenv("QUEUE", how)
    handler = signal.getsignal(signal.SIGTERM)
    assert main("launch notes.py -- train cfg.py".split()) == code
    assert signal.getsignal(signal.SIGTERM) == handler
    assert list((here / "runs/launch").iterdir()) == [] and not list(here.glob("queue/*"))


def test_where_an_interrupted_one_cannot_be_cancelled_its_record_stays(here: Path, monkeypatch) -> None:
    monkeypatch.setenv("QUEUE", "stuck")
    assert main("launch notes.py --name mine -- train cfg.py".split()) == 2
    monkeypatch.delenv("QUEUE")
    assert main("launch cancel mine".split()) == 0 and not (here / "queue/mine").exists()


def test_names_are_made_of_the_command_and_the_time() -> None:
    name = record.name_for(("train", "configs/gpt_stdlib.py", "--x"), 0)
    assert name.startswith("train-gpt-stdlib-") and len(name) == len("train-gpt-stdlib-0101-000000")
    for command in (("benchmarks", "scaling"), ("eval", "runs/" + 60 * "x"), ("train", "ü.py"), ("tune", "--help")):
        record.check_name(record.name_for(command))


def test_help_is_there_before_jax_is(here: Path) -> None:
    code = "import sys; from jaxmodels.cli import main; main(sys.argv[1:]); print({'jax', 'flax'} & set(sys.modules))"
    root = Path(__file__).resolve().parents[2]
    shown = subprocess.run(
        [sys.executable, "-c", code, "launch", "--help"], capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    ).stdout  # fmt: skip
    assert shown.endswith("set()\n") and all(word in shown for word in ("local", " -- COMMAND", "75 stopped", "cancel"))


def test_a_user_s_mistake_ends_a_job_at_once_and_is_not_tried_again(here: Path, capsys) -> None:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "jaxmodels", "launch", "local", "--platform", "cpu", "--name", "wrong"]
    done = subprocess.run(
        [*command, "--processes", "1", "--", "train", "cfg.py", "--model.widht", "3"], capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    )  # fmt: skip
    assert done.returncode == 2, done
    assert (done.stdout + done.stderr).count("did you mean '--model.width'?") == 1
    capsys.readouterr()
    assert main("launch status wrong".split()) == 0
    assert capsys.readouterr().out == "wrong  failed, exit code 2, a mistake in what was asked\n"
    assert main("launch logs wrong".split()) == 0 and "--model.width" in capsys.readouterr().out
    assert main("launch cancel wrong".split()) == 0
