"""What goes with a job: the code and the packages that it was submitted with."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path


@dataclass(frozen=True)
class Code:
    """The working directory and the environment that a job was submitted with."""

    directory: Path
    """The directory from which the job was submitted, and where it runs unless an image has its own."""
    python: str
    """The interpreter it was submitted with."""
    revision: str = ""
    """The commit of the directory; empty outside git."""
    changed: tuple[str, ...] = ()
    """Files that are not as in that commit, or not in it."""
    lock: tuple[str, ...] = ()
    """Versions of Python and of all installed packages, name==version, as `pip freeze` gives them."""

    def notice(self) -> str:
        """What is worth saying before the job goes: what is not committed. Empty: everything is."""
        if not self.revision:
            return f"{self.directory} is not under git: no revision of the code is recorded"
        if not self.changed:
            return ""
        named = ", ".join(self.changed[:5]) + (f" and {len(self.changed) - 5} more" if len(self.changed) > 5 else "")
        return f"not committed at {self.revision[:12]}: {named}"


def here(directory: Path | None = None) -> Code:
    """The code and the packages of this process."""
    directory = Path.cwd() if directory is None else directory.resolve()
    revision = _git(directory, "rev-parse", "HEAD").strip()
    changed: list[str] = []
    if revision:
        # of a file that was renamed both names follow, each ended by a zero byte
        fields = iter(_git(directory, "status", "--porcelain", "-z", "--untracked-files=all").split("\0"))
        for field in fields:
            if field:
                changed.append(field[3:])
                if field[0] in "RC":
                    next(fields, None)
    return Code(directory, sys.executable, revision, tuple(sorted(changed)), lock())


def lock() -> tuple[str, ...]:
    """Versions of Python and of every installed package, as `pip freeze` gives them."""
    found = {}
    for package in metadata.distributions():
        name = package.metadata["Name"]
        if name and name.lower() not in found:  # the first on the path is the one that is imported
            found[name.lower()] = f"{name}{_origin(package)}"
    return (f"python=={platform.python_version()}", *(found[name] for name in sorted(found)))


def _origin(package: metadata.Distribution) -> str:
    """The version of a package, or the place that it was installed from."""
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
