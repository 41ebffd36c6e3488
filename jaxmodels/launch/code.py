"""The code and the packages that a job was submitted with."""

from __future__ import annotations

import json
import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from jaxmodels.errors import UserError

_MOST_NAMES = 50
_RUNS = "runs"  # output of commands, not code


@dataclass(frozen=True)
class Code:
    """The working directory and the environment that a job was submitted with."""

    directory: Path
    """The directory from which the job was submitted, and in which it runs unless it runs from an image."""
    python: str
    """The interpreter that submitted it."""
    revision: str = ""
    """The commit of the directory; empty outside git."""
    changed: tuple[str, ...] = ()
    """Files that differ from that commit or are missing from it."""
    lock: tuple[str, ...] = ()
    """Versions of Python and of all installed packages, name==version, as `pip freeze` gives them."""

    def mark(self, name: str, lock_file: str) -> str:
        """Return what a run records about its job, as JSON for the environment variable JAXMODELS_JOB.

        Args:
            name: the job's name.
            lock_file: the file with the versions that its nodes must have; empty: none.
        """
        found = {"name": name, "revision": self.revision, "changed": self.changed[:_MOST_NAMES]}
        if len(self.changed) > _MOST_NAMES:
            found["more_changed"] = len(self.changed) - _MOST_NAMES
        return json.dumps({**found, **({"lock": lock_file} if lock_file else {})})

    def notice(self) -> str:
        """Return a warning about changes that are not committed; empty if everything is."""
        if not self.revision:
            return f"{self.directory} is not under git: no revision of the code is recorded"
        if not self.changed:
            return ""
        named = ", ".join(self.changed[:5]) + (f" and {len(self.changed) - 5} more" if len(self.changed) > 5 else "")
        return f"not committed at {self.revision[:12]}: {named}"


def here(directory: Path | None = None) -> Code:
    """Return the code and the packages of this process."""
    directory = Path.cwd() if directory is None else directory.resolve()
    revision = _git(directory, "rev-parse", "HEAD").strip()
    changed: list[str] = []
    if revision:
        # of a file that was renamed both names follow, each ended by a zero byte
        status = ["status", "--porcelain", "-z", "--untracked-files=all", "--", ":/", f":(exclude){_RUNS}"]
        fields = iter(_git(directory, *status).split("\0"))
        for field in fields:
            if field:
                changed.append(field[3:])
                if field[0] in "RC":
                    next(fields, None)
    return Code(directory, sys.executable, revision, tuple(sorted(changed)), lock())


def lock() -> tuple[str, ...]:
    """Return the versions of Python and of every installed package, as `pip freeze` gives them."""
    found = {}
    for package in metadata.distributions():
        name = package.metadata["Name"]
        if name and name.lower() not in found:  # the first on the path is the one that is imported
            found[name.lower()] = f"{name}{_origin(package)}"
    return (f"python=={platform.python_version()}", *(found[name] for name in sorted(found)))


def check(environ: Mapping[str, str]) -> None:
    """Check that this machine has the package versions that its job was submitted with, if it recorded them.

    Raises:
        UserError: a package has another version here or is not installed.
    """
    try:
        file = json.loads(environ.get("JAXMODELS_JOB", "{}")).get("lock", "")
        wanted = Path(file).read_text().split("\n") if file else []
    except (OSError, ValueError) as error:
        raise UserError(f"got no lock of this job ({error}), expected the directory it was submitted from") from error
    found = {line.lower() for line in lock()} if wanted else set()
    if missing := [line for line in wanted if line and line.lower() not in found]:
        name = re.split("==| @ ", missing[0])[0]
        here = next((line for line in found if re.split("==| @ ", line)[0] == name.lower()), f"no {name}")
        rest = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"got {here} on {socket.gethostname()}, expected {missing[0]}{rest} as where the job was submitted "
            f"({file}), try the same environment, or submit it again"
        )


def _origin(package: metadata.Distribution) -> str:
    """Return the version of a package, or where it was installed from."""
    try:
        direct = json.loads(package.read_text("direct_url.json") or "{}")
    except ValueError:
        direct = {}
    if commit := direct.get("vcs_info", {}).get("commit_id"):
        return f" @ git+{direct['url']}@{commit}"
    return f"=={package.version}"


def _git(directory: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=directory, capture_output=True, text=True, errors="replace", timeout=20,
            check=False, env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
