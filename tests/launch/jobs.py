"""A job to give to a place, without asking git or the installed packages."""

import sys
from pathlib import Path

from jaxmodels.launch.code import Code
from jaxmodels.launch.place import Job

ROOT = Path(__file__).resolve().parents[2]


def job(directory: Path, *command: str, name: str = "demo") -> Job:
    """A job of the repository, whose files lie in `directory`."""
    words = command or ("train", "configs/gpt_stdlib.py", "--name", "two words")
    return Job(name, tuple(words), directory, Code(ROOT, sys.executable))
