"""Records of submitted jobs: the command, the place, the code, and the handle by which the place knows the job."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from jaxmodels.errors import UserError, nearest
from jaxmodels.launch.code import Code
from jaxmodels.launch.place import LOCK, PLACES, Job, Place, write
from jaxmodels.launch.signals import handled
from jaxmodels.registry import given_by

JOBS = Path("runs/launch")
"""The directory that holds a directory for each job."""
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")
_FILE = "job.json"


@dataclass(frozen=True)
class Record:
    """A job that was submitted to a place."""

    place: Place
    job: Job
    handle: str
    """The name by which the place knows it; empty: the process that submitted it was killed before it was known."""


def name_for(command: tuple[str, ...], moment: float | None = None) -> str:
    """Make a job's name from its command and the time: train-gpt-stdlib-1129-151200."""
    words = [command[0], *(Path(word).stem for word in command[1:2] if not word.startswith("-"))]
    text = re.sub(r"[^a-z0-9]+", "-", "-".join(words).lower()).strip("-")
    text = text if text[:1].isalpha() else f"job-{text}"
    return f"{text[:28].rstrip('-')}-{time.strftime('%m%d-%H%M%S', time.localtime(moment))}"


def check_name(name: str) -> None:
    """Raise UserError if some place could not accept this name."""
    if not _NAME.fullmatch(name):
        better = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40].rstrip("-")
        raise UserError(
            f"got name {name!r}, expected lower-case letters, digits and hyphens, a letter first, at most 40"
            + (f", try --name {better}" if _NAME.fullmatch(better) else "")
        )


def submit(place: Place, file: str, job: Job) -> Record:
    """Submit a job and write its record; nothing remains of a job that was interrupted or refused.

    Args:
        place: where the job is submitted.
        file: the file that defines the place; empty if the place was named.
        job: the job.

    Raises:
        UserError: a job of that name exists, or the place refuses it.
        KeyboardInterrupt: the submission was interrupted; what had been submitted is cancelled.
    """
    rendered = place.render(job)
    try:
        job.directory.mkdir(parents=True)
    except FileExistsError:
        raise UserError(
            f"got job {job.name}, which is there already ({job.directory}), expected a new name, try another --name"
        ) from None
    try:
        for name, text in rendered.items():
            path = job.directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            if text.startswith("#!"):
                path.chmod(0o755)
        (job.directory / LOCK).write_text("\n".join(job.code.lock) + "\n")
        write(job.directory / _FILE, json.dumps(_described(place, file, job), indent=2) + "\n")
        if place.stays:
            return Record(place, job, place.submit(job))
        with _held() as signalled:
            handle = place.submit(job)
            write(job.directory / "handle", handle)
            if signalled:
                place.cancel(job, handle)
                (job.directory / "handle").unlink()
                raise KeyboardInterrupt
        return Record(place, job, handle)
    except BaseException:
        if not (job.directory / "handle").exists():  # otherwise the place has the job, and the record is needed
            shutil.rmtree(job.directory, ignore_errors=True)
        raise


@contextlib.contextmanager
def _held() -> Iterator[list[int]]:
    """Hold signals back during a submission; a second signal interrupts it."""
    signalled: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if signalled:
            raise KeyboardInterrupt
        signalled.append(number)

    with handled(note):
        yield signalled


def _described(place: Place, file: str, job: Job) -> dict[str, Any]:
    fields = {field.name: getattr(place, field.name) for field in dataclasses.fields(place)}
    code = {field.name: getattr(job.code, field.name) for field in dataclasses.fields(job.code)}
    return {
        "name": job.name,
        "command": job.command,
        "place": {"file": str(Path(file).resolve())} if file else {"class": PLACES.name_of(type(place))},
        "fields": fields,
        "submitted": time.time(),
        "from": socket.gethostname(),
        "code": {**code, "directory": str(job.code.directory)},
    }


def names() -> list[str]:
    """Return the names of all jobs submitted from this directory, the newest last."""
    files = sorted(JOBS.glob(f"*/{_FILE}"), key=lambda path: path.stat().st_mtime)
    return [path.parent.name for path in files]


def read(name: str) -> Record:
    """Read the record of a job.

    Raises:
        UserError: there is no such job, or its place can no longer be found.
    """
    directory = JOBS / name
    if not (directory / _FILE).is_file():
        known = names()
        recent = f", expected one of {', '.join(known[-5:])}" if known else f", expected a job in {JOBS}"
        raise UserError(f"got job {name!r}{recent}{nearest(name, known) or ', try jaxmodels launch status'}")
    try:
        found = json.loads((directory / _FILE).read_text())
        code = {**found["code"], "directory": Path(found["code"]["directory"])}
        code |= {key: tuple(code[key]) for key in ("changed", "lock")}
        job = Job(found["name"], tuple(found["command"]), directory, Code(**code))
        named, fields = found["place"], found["fields"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"got {directory / _FILE} that is no record of a job ({error!r})") from error
    make = partial(dataclasses.replace, place_in(named["file"])) if "file" in named else PLACES.find(named["class"])
    try:
        place = make(**fields)
    except TypeError as error:  # the place's fields have changed since
        raise UserError(f"got {directory / _FILE} with other fields than its place has now ({error})") from error
    handle = directory / "handle"
    return Record(place, job, handle.read_text() if handle.is_file() else "")


def submitted(name: str) -> Record:
    """Read the record of a job that was handed to its place.

    Raises:
        UserError: there is no such job, or its submission was cut off.
    """
    found = read(name)
    if not found.handle:
        raise UserError(f"got job {name}, expected one that was submitted: the submission was cut off")
    return found


def place_in(file: str | Path) -> Place:
    """Return the place that a file defines by `get_place()`.

    Raises:
        UserError: the file defines none.
    """
    place = given_by(file, "place", "get_place", "a Place", f"place_{Path(file).stem}")
    if not isinstance(place, Place):
        raise UserError(
            f"got {type(place).__name__} from get_place() in {file}, expected a jaxmodels.launch.place.Place"
        )
    return place
