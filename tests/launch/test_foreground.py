"""The process that a command stays with is told to save, whatever ends the command, and its end is kept."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxmodels.errors import UserError
from jaxmodels.launch.local import Local
from jaxmodels.launch.place import State
from tests.launch.jobs import job

COMMAND = """
import sys
from pathlib import Path
from jaxmodels.launch import foreground
from tests.launch.jobs import job

script = 'trap "echo told > told; exit 75" TERM; echo $$ > pid; sleep 60 & wait'
foreground.stay(job(Path(sys.argv[1])), lambda: foreground.start(["sh", "-c", script]))
"""


@pytest.fixture(params=[()])
def command(tmp_path: Path, root: Path, request: pytest.FixtureRequest):
    """A command that stays with a job, which has begun; its parameter are words before it."""
    process = subprocess.Popen(
        [*request.param, sys.executable, "-c", COMMAND, str(tmp_path)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin"},
    )
    wait_for(tmp_path / "pid")
    yield process
    process.kill()
    process.wait()


def wait_for(file: Path) -> None:
    until = time.monotonic() + 120
    while not (file.exists() and file.read_text()):
        assert time.monotonic() < until, file
        time.sleep(0.05)


def test_cancel_from_another_process_saves_and_the_code_is_kept(command, tmp_path: Path) -> None:
    handle = (tmp_path / "handle").read_text()
    assert Local().status(job(tmp_path), handle).state is State.RUNNING
    Local().cancel(job(tmp_path), handle)
    command.wait(timeout=30)
    found = Local().status(job(tmp_path), handle)
    assert (found.state, found.code) == (State.SAVED, 75) and (tmp_path / "told").exists()
    Local().cancel(job(tmp_path), handle)  # one that has ended is left alone


@pytest.mark.parametrize("command", [("nohup",)], indirect=True)
def test_a_lost_terminal_ends_nothing_under_nohup(command, tmp_path: Path) -> None:
    command.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        command.wait(timeout=1)
    assert not (tmp_path / "told").exists()


def test_a_command_that_is_killed_has_its_job_save_and_is_gone(command, tmp_path: Path) -> None:
    command.send_signal(signal.SIGKILL)
    command.wait(timeout=30)
    wait_for(tmp_path / "told")
    assert Local().status(job(tmp_path), (tmp_path / "handle").read_text()).state is State.GONE


def test_another_process_with_its_number_is_not_taken_for_it_nor_one_of_another_machine(
    command, tmp_path: Path
) -> None:
    host, pid, born = (tmp_path / "handle").read_text().split()
    assert Local().status(job(tmp_path), f"{host} {pid} {int(born) - 1}").state is State.GONE
    with pytest.raises(UserError, match="got a job that was started on elsewhere, expected one of this machine"):
        Local().status(job(tmp_path), f"elsewhere {pid} {born}")


def test_what_is_damaged_in_the_record_of_a_job_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="got the handle 'host 1' of a job"):
        Local().status(job(tmp_path), "host 1")
    (tmp_path / "code").write_text("twelve")
    with pytest.raises(UserError, match="code that is no exit code"):
        Local().status(job(tmp_path), "host 1 2")
