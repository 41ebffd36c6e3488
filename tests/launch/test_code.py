"""What is said of the code that goes with a job, and what its nodes are held to."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy
import pytest

from jaxmodels.errors import UserError
from jaxmodels.launch import code
from jaxmodels.train.run import launched


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    (tmp_path / "a b.txt").write_text("1")
    (tmp_path / "old.txt").write_text("a file long enough to be known again under another name\n" * 9)
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "-c", "user.name=x", "-c", "user.email=x@x", "commit", "-q", "-m", "x")
    return tmp_path


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def test_what_is_not_committed_is_named(repository: Path) -> None:
    assert code.here(repository).notice() == ""
    (repository / "a b.txt").write_text("2")
    git(repository, "mv", "old.txt", "new.txt")
    (repository / "ünew").mkdir()
    (repository / "ünew" / "x").write_text("1")
    (repository / "runs").mkdir()
    (repository / "runs" / "log.txt").write_text("what a run has written is no code")
    found = code.here(repository)
    assert found.revision == git(repository, "rev-parse", "HEAD")
    assert found.changed == ("a b.txt", "new.txt", "ünew/x")
    assert found.notice() == f"not committed at {found.revision[:12]}: a b.txt, new.txt, ünew/x"


def test_where_there_is_no_git_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    found = code.here(tmp_path)
    assert (found.revision, found.changed) == ("", ()) and "not under git" in found.notice()


def test_a_run_records_the_job_and_what_was_not_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    made = code.Code(Path(), "python", "12ab", tuple(f"{i}.py" for i in range(70)))
    monkeypatch.setenv("JAXMODELS_JOB", made.mark("mine", ""))
    job = launched()["job"]
    assert (job["name"], job["revision"], len(job["changed"]), job["more_changed"]) == ("mine", "12ab", 50, 20)
    monkeypatch.setenv("JAXMODELS_JOB", "{")
    with pytest.raises(UserError, match="got JAXMODELS_JOB='{', expected JSON"):
        launched()
    monkeypatch.delenv("JAXMODELS_JOB")
    assert launched() == {}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda lines: lines, ""),
        (lambda lines: [line.upper() for line in lines], ""),
        (lambda lines: [*lines, "no-such-package==1.0"], "got no no-such-package on .*, expected no-such"),
        (
            lambda lines: ["numpy==0.9" if line.startswith("numpy==") else line for line in lines],
            f"got numpy=={numpy.__version__} on .*, expected numpy==0.9 as where the job was submitted",
        ),
        (lambda lines: ["python==3.0.1", *lines[1:], "x==1"], "expected python==3.0.1 and 1 more as"),
    ],
)  # fmt: skip
def test_a_node_is_held_to_the_lock_of_its_job(tmp_path: Path, change, said: str) -> None:
    lock = tmp_path / "lock.txt"
    lock.write_text("\n".join(change(list(code.lock()))) + "\n")
    environment = {"JAXMODELS_JOB": json.dumps({"name": "x", "lock": str(lock)})}
    if not said:
        return code.check(environment)
    with pytest.raises(UserError, match=said):
        code.check(environment)


def test_a_lock_that_a_node_does_not_see_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected the directory it was submitted from"):
        code.check({"JAXMODELS_JOB": json.dumps({"lock": str(tmp_path / "none")})})
    code.check({"JAXMODELS_JOB": json.dumps({"name": "from an image"})})
    code.check({})
