"""Inputs that a user gives to a saved run: files of images and sounds, tables, lines of text, and standard input."""

from __future__ import annotations

import glob
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxmodels.data.files import TABLES, File, open_file, shown
from jaxmodels.data.folders import SUFFIXES
from jaxmodels.data.records import Bad
from jaxmodels.data.sounds import SUFFIXES as SOUNDS
from jaxmodels.data.tables import Unfit, content_of
from jaxmodels.errors import UserError, nearest

Kind = Literal["text", "image", "audio", "array", "record"]
"""What a model reads: str; the bytes of an image file or a sound file; numbers as lists; several columns of a row, as a
dict."""
_FILES: dict[Kind, tuple[str, ...]] = {"image": SUFFIXES, "audio": SOUNDS}
"""The suffixes of files that are one record each."""
_GIVES: dict[Kind, str] = {
    "text": "a table with a column of texts (CSV, JSON lines, Parquet), a file of lines, or - for the standard input",
    "image": "images, folders of images, or a table or a file of lines with their paths",
    "audio": "sound files, folders of them, or a table or a file of lines with their paths",
    "array": "a table with a column of numbers (JSON lines, Parquet), a file of lists of numbers, or -",
    "record": "a table (CSV, JSON lines, Parquet), a file of lines of JSON objects, or -",
}
_MEDIA = ("image", "sound", "audio")
"""The columns of a row that may hold the path of a file."""
STDIN = "-"
_MARK = "\ufeff"  # the byte order mark with which some programs begin a text


class Given(NamedTuple):
    """One record: where it comes from, and its value or the reason why it has none."""

    where: str
    value: Any


class _Place(NamedTuple):
    """A file, and how to read it."""

    name: str
    path: Path
    how: Literal["lines", "whole", "table"]


def records(paths: Sequence[str], kind: Kind, field: str, known: str = "") -> Iterator[Given]:
    """Read the records of files in order: the rows of a table, the images or sounds of a folder, the lines of any other
    file.

    A line is a text, the path of an image or a sound, or numbers in JSON; `-` reads the lines of standard input.
    `field` is the table column to read; by default it is `known`, or the only suitable one. Paths in a table are as in
    training (`data.files`): absolute, or from the folder of the table.

    Raises:
        UserError: a file does not exist or holds nothing of that kind. Raised before anything is read.
    """
    if not paths:
        raise UserError("got no files, expected some, or - for the lines of the standard input, try -")
    places = [place for path in paths for place in _places(path, kind)]
    tables = {place.path: open_file(place.path) for place in places if place.how == "table"}
    if field and kind == "record":
        raise UserError(f"got --input-field {field} for a model that reads several columns, try without it")
    columns = {path: "" if kind == "record" else _column(table, kind, field, known) for path, table in tables.items()}
    if field and not tables:
        raise UserError(f"got --input-field {field} without a table, expected CSV, JSON lines or Parquet")
    return _read(places, kind, tables, columns)


def _places(name: str, kind: Kind) -> list[_Place]:
    if name == STDIN:
        return [_Place(STDIN, Path(STDIN), "lines")]
    path = Path(name).expanduser()
    if glob.has_magic(name) and not path.exists():
        found = sorted(glob.glob(str(path), recursive=True))
        if not found:
            raise UserError(f"got {name!r}, which matches no file, expected one that does, try ls {name}")
        return [place for each in found for place in _places(each, kind)]
    if path.is_dir():
        if kind not in _FILES:
            raise UserError(
                f"got the folder {name} for a model that reads {_named(kind)}, expected {_GIVES[kind]}{_inside(path)}"
            )
        found = [Path(folder, each) for folder, _, files in os.walk(path) for each in files]
        found = sorted(each for each in found if each.suffix.lower() in _FILES[kind] and not each.name.startswith("."))
        if not found:
            raise UserError(f"got the folder {name} without {_named(kind)}, expected some of {', '.join(_FILES[kind])}")
        return [_Place(str(each), each, "whole") for each in found]
    if not path.is_file():
        what = "is not a file" if path.exists() else "does not exist"
        what = "is a link to nothing" if path.is_symlink() and not path.exists() else what
        others = [each.name for each in path.parent.iterdir() if each.is_file()] if path.parent.is_dir() else []
        near = nearest(path.name, others)
        raise UserError(f"got {name!r}, which {what}, expected a file, a folder of images or -{near or ', try ls'}")
    for held, suffixes in _FILES.items():
        if path.suffix.lower() in suffixes:
            if kind != held:
                got = _named(held).removesuffix("s")
                raise UserError(f"got the {got} {name} for a model that reads {_named(kind)}, expected {_GIVES[kind]}")
            return [_Place(name, path, "whole")]
    return [_Place(name, path, "table" if path.suffix.lower() in TABLES else "lines")]


def _named(kind: Kind) -> str:
    return "sounds" if kind == "audio" else f"{kind}s"


def _inside(folder: Path) -> str:
    """Suggest what to pass instead of a folder: its tables, or its files of lines."""
    endings = [*TABLES, ".txt"]
    held = next((end for end in endings if any(folder.glob(f"*{end}"))), None)
    if held is not None:
        return f", try '{folder}/*{held}'"
    held = next((end for end in endings if any(folder.rglob(f"*{end}"))), None)
    return f", try '{folder}/**/*{held}'" if held is not None else ", try one of those"


def _holds(value: Any, kind: Kind) -> bool:
    """Whether a table's value may be what a model of this kind reads."""
    if kind in _FILES:
        if isinstance(value, str):
            return Path(value).suffix.lower() in _FILES[kind]
        return isinstance(value, bytes) or (isinstance(value, dict) and isinstance(value.get("bytes"), bytes))
    return isinstance(value, str if kind == "text" else list | tuple | np.ndarray)


def _column(table: File, kind: Kind, field: str, known: str) -> str:
    """Choose the column of a table to read."""
    first = next((values for values, _ in table.rows() if isinstance(values, dict)), {})
    names = list(first)
    fit = [name for name in names if _holds(first[name], kind)]
    if names and not fit and (field or known) not in names:
        raise UserError(
            f"got {table.path} without a column of {_named(kind)} for a model that reads {_named(kind)}, "
            f"expected {_GIVES[kind]}"
        )
    if not field and known not in names and len(names) == 1:
        return names[0]
    wanted = field or known
    if wanted not in names:
        got = f"--input-field {field}" if field else f"{table.path} without {known}" if known else f"{table.path}"
        raise UserError(
            f"got {got}, expected one of its columns, {', '.join(names) or 'of which there are none'}"
            f"{nearest(wanted, names) if wanted else ''}, try --input-field {fit[0] if fit else 'text'}"
        )
    return wanted


def _read(places: Sequence[_Place], kind: Kind, tables: dict[Path, File], columns: dict[Path, str]) -> Iterator[Given]:
    for name, path, how in places:
        if how == "whole":
            yield Given(name, _bytes(path, name))
        elif how == "table":
            yield from _rows(name, tables[path], columns[path], kind)
        elif path == Path(STDIN):
            yield from _lines(name, sys.stdin.buffer, kind)
        else:
            with path.open("rb") as file:
                yield from _lines(name, file, kind)


def _bytes(path: Path, where: str) -> bytes | Bad:
    if path.exists() and not path.is_file():  # reading a pipe would wait
        return Bad(where, "is not a regular file")
    try:
        return path.read_bytes() or Bad(where, "is empty")
    except OSError as error:
        return Bad(where, error.strerror or "cannot be read")


def _rows(name: str, table: File, column: str, kind: Kind) -> Iterator[Given]:
    folder = table.path.parent
    for row, (values, _) in enumerate(table.rows()):
        where = f"{name}:{table.line(row)}"
        if isinstance(values, str):
            yield Given(where, Bad(where, values))
            continue
        if not column:
            paths = {each: str(folder / values[each]) for each in _MEDIA if isinstance(values.get(each), str)}
            yield Given(where, {**values, **paths})
            continue
        value = values.get(column)
        if isinstance(value, dict) and isinstance(value.get("bytes"), bytes):  # as datasets stores images and sounds
            value = value["bytes"]
        if isinstance(value, str):
            value = value.removeprefix(_MARK)
        missing = value is None or (isinstance(value, str) and not value)
        try:
            value = content_of(column, value, folder) if kind in _FILES and isinstance(value, str) and value else value
        except Unfit as error:
            value = Bad(where, str(error))
        yield Given(where, Bad(where, f"{column} is missing") if missing else value)


def _lines(name: str, file: Iterable[bytes], kind: Kind) -> Iterator[Given]:
    for number, raw in enumerate(file, 1):
        where = f"{name}:{number}"
        raw = raw.removesuffix(b"\n").removesuffix(b"\r")
        try:
            line = raw.decode("utf-8").removeprefix(_MARK)
        except UnicodeDecodeError as error:
            yield Given(where, Bad(where, f"byte {error.start} of the line is not UTF-8"))
            continue
        if not line.strip():
            yield Given(where, Bad(where, "is empty"))
        elif kind in _FILES:
            yield Given(line, _bytes(Path(line.strip()).expanduser(), line))
        else:
            yield Given(where, line if kind == "text" else _parsed(where, line, kind))


def _parsed(where: str, line: str, kind: Kind) -> Any:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    if kind == "record":
        return value if isinstance(value, dict) else Bad(where, f"{shown(line)} is not an object in JSON")
    if value is None:
        return Bad(where, f"{shown(line)} is not a list of numbers in JSON")
    return value
