"""Files of rows: CSV, JSON lines and Parquet."""

from __future__ import annotations

import codecs
import csv
import functools
import io
import itertools
import json
import logging
import mmap
import sys
from abc import ABC, abstractmethod
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxmodels.errors import UserError

_log = logging.getLogger("jaxmodels")

BOM = codecs.BOM_UTF8
_BEGINNING = 1 << 16
_SEPARATORS = ",;\t|"
_BETWEEN = 3
_USUAL = 3
_MARKS = {  # UTF-32LE's begins with UTF-16LE's
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}  # fmt: skip
_COMPRESSED = {
    b"\x1f\x8b": "gzip -d", b"\x28\xb5\x2f\xfd": "zstd -d", b"BZh": "bzip2 -d", b"\xfd7zXZ\0": "xz -d",
    b"PK\3\4": "unzip, or saving as CSV what Excel or NumPy wrote",
}  # fmt: skip


def not_text(beginning: bytes) -> str:
    """Describe a file with this beginning, and say what to try; empty if it may be UTF-8 text."""
    for magic, command in _COMPRESSED.items():
        if beginning.startswith(magic):
            return f"compressed, expected text, try {command}"
    if encoding := _wide(beginning):
        return f"text in {encoding[:6]}, expected UTF-8, try iconv -f {encoding} -t UTF-8"
    if beginning.count(0) > len(beginning) // 100:
        return "binary (it has zero bytes), expected text, try another file"
    return ""


def _wide(beginning: bytes) -> str:
    """Name an encoding of two or four bytes per character, recognized by its mark or by where zeros are."""
    for mark, name in _MARKS.items():
        if beginning.startswith(mark):
            return name
    zeros = [beginning[place::4].count(0) for place in range(4)]
    few, most = len(beginning) // 16, len(beginning) // 4 - len(beginning) // 16
    for order, (lowest, *upper, highest) in ("LE", zeros), ("BE", zeros[::-1]):
        if lowest < few and min(*upper[1:], highest) > most:  # no character is above 0x10FFFF, and few above 0xFFFF
            return f"UTF-32{order}"
    even, odd = zeros[0] + zeros[2], zeros[1] + zeros[3]
    if max(even, odd) > len(beginning) // 8 > min(even, odd):
        return "UTF-16BE" if even > odd else "UTF-16LE"
    return ""


class File(ABC):
    """A table in one file. `typed` says whether the file distinguishes numbers from text."""

    typed = True
    columns: tuple[str, ...] | None = None
    """Columns of every row; None if each row has its own."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @abstractmethod
    def rows(self) -> Iterator[tuple[dict[str, Any] | str, bytes]]:
        """Yield every row in order: values by column, or why it has none; and, for text files, its bytes."""

    @abstractmethod
    def read(self, rows: Sequence[int], fields: Sequence[str]) -> list[dict[str, Any] | str]:
        """Read rows by their index in `rows()`, which must have been iterated before; thread-safe."""

    @abstractmethod
    def line(self, row: int) -> int:
        """Return where a row is, counted from 1: its first line, or the row itself if the file has no lines."""


class _Lines(File):
    """A memory-mapped text file, with the start and end of each row."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        if not path.stat().st_size:
            raise UserError(f"got {path}, which is empty, expected a table, try another file")
        with path.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if foreign := not_text(self._bytes[:4096]):
            raise UserError(f"got {path}, which is {foreign}")
        self._start = 3 if self._bytes[:3] == BOM else 0
        beginning = self._bytes[:_BEGINNING]
        self._line_end = b"\r" if b"\r" in beginning and b"\n" not in beginning else b"\n"
        self._extents, self._numbers = array("q"), array("q")

    @abstractmethod
    def _parse(self, raw: bytes) -> dict[str, Any] | str: ...

    @abstractmethod
    def _cut(self) -> Iterator[tuple[int, int, int]]:
        """Yield start, end and first line of each row."""

    def rows(self) -> Iterator[tuple[dict[str, Any] | str, bytes]]:
        self._extents, self._numbers = array("q"), array("q")
        for start, end, number in self._cut():
            raw = self._bytes[start:end]
            if not raw.strip():
                continue
            self._extents.extend((start, end))
            self._numbers.append(number)
            yield self._parse(raw), raw

    def read(self, rows: Sequence[int], fields: Sequence[str]) -> list[dict[str, Any] | str]:
        return [self._parse(self._bytes[self._extents[2 * row] : self._extents[2 * row + 1]]) for row in rows]

    def line(self, row: int) -> int:
        return self._numbers[row]

    def _each_line(self) -> Iterator[tuple[int, int]]:
        start = self._start
        while start < len(self._bytes):
            end = self._bytes.find(self._line_end, start) + 1 or len(self._bytes)
            yield start, end
            start = end


class _Json(_Lines):
    """One JSON object per line."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        beginning = self._bytes[self._start : self._start + _BEGINNING].lstrip()
        if beginning[:1] == b"[":
            line, _, rest = beginning.partition(b"\n")
            if line.rstrip().endswith(b"]") and rest.strip():
                raise UserError(
                    f"got {path}, whose lines are JSON arrays, expected an object a line, "
                    f"try jq -c '{{input: .[0], label: .[1]}}' {path}"
                )
            raise UserError(f"got {path}, which is one JSON array, expected JSON lines, try jq -c '.[]' {path}")

    def _parse(self, raw: bytes) -> dict[str, Any] | str:
        try:
            value = json.loads(raw.decode("utf-8"), object_pairs_hook=_once)
        except UnicodeDecodeError as error:
            return f"byte {error.start} of the row is not UTF-8"
        except json.JSONDecodeError as error:
            return f"invalid JSON ({error.msg} at character {error.pos})"
        except (ValueError, RecursionError) as error:  # a duplicate key, a number too long, endless nesting
            return f"invalid JSON ({error})"
        return value if isinstance(value, dict) else f"{shown(value)} is not a JSON object"

    def _cut(self) -> Iterator[tuple[int, int, int]]:
        for number, (start, end) in enumerate(self._each_line(), 1):
            yield start, end, number


class _Csv(_Lines):
    """Values separated by commas, semicolons, tabs or bars, with column names in the first row.

    A quoted cell may contain line breaks. If such a row is broken (the quote is never closed, or other text follows
    it), or its lines are rows themselves, only its first line is bad and reading continues after it: a stray quote
    costs one row.
    """

    typed = False

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        # a cell may be a whole document
        csv.field_size_limit(sys.maxsize)
        self._delimiter = self._separator(path.suffix.lower())
        self._names: list[str] = []
        start, end, _ = next(self._cut(), (self._start, self._start, 1))
        header = self._cells(self._bytes[start:end])
        header = header if isinstance(header, str) else [name.strip() for name in header]
        named = [] if isinstance(header, str) else [name for name in header if name]
        if not named or len(set(named)) < len(named):
            twice = next((name for name in named if named.count(name) > 1), None)
            raise UserError(
                f"got {path} with the first row {shown(header)}, expected the names of the columns, each once, "
                f"try {'adding such a row' if twice is None else f'renaming one of the columns {twice!r}'}"
            )
        if unnamed := len(header) - len(named):
            _log.warning("left out %d of the %d columns of %s, for want of a name", unnamed, len(header), path)
        self._names = list(header)
        self.columns = tuple(named)

    def _separator(self, suffix: str) -> str:
        """Return the file's own separator, or one that gives the first and second row equally many cells."""
        usual = "\t" if suffix == ".tsv" else ","
        lines = [self._bytes[start:end] for start, end in itertools.islice(self._each_line(), 2)]
        for self._delimiter in (usual, *_SEPARATORS.replace(usual, "")):
            counts = [len(cells) if isinstance(cells := self._cells(line), list) else 0 for line in lines]
            if counts[0] > 1 and len(set(counts)) == 1:
                return self._delimiter
        return usual

    def _cells(self, raw: bytes) -> list[str] | str:
        try:
            text = io.StringIO(raw.decode("utf-8"), newline="\n")
            return next(csv.reader(text, delimiter=self._delimiter, strict=True), [])
        except UnicodeDecodeError as error:
            return f"byte {error.start} of the row is not UTF-8"
        except csv.Error as error:
            known = str(error).replace("unexpected end of data", "a quote that is not closed")
            return f"invalid CSV ({known})"

    def _parse(self, raw: bytes) -> dict[str, Any] | str:
        cells = self._cells(raw)
        if isinstance(cells, str):
            return cells
        if len(cells) != len(self._names):
            return f"has {len(cells)} columns, expected {len(self._names)}"
        if b"\0" in raw:
            return "has a zero byte"
        # a column without a name, such as the row numbers that pandas writes, is none of the record's
        return {name: cell for name, cell in zip(self._names, cells, strict=True) if name}

    def _cut(self) -> Iterator[tuple[int, int, int]]:
        at, number = self._start, 0

        def lines() -> Iterator[str]:
            nonlocal at, number
            while at < len(self._bytes):
                start, at = at, self._bytes.find(self._line_end, at) + 1 or len(self._bytes)
                number += 1
                # in latin-1 any byte is a character, and those that end a cell or a row are the same
                yield self._bytes[start:at].decode("latin-1")

        def reader() -> Any:
            return csv.reader(lines(), delimiter=self._delimiter, strict=True)

        rows, header = reader(), True
        while at < len(self._bytes):
            begin, first = at, number + 1
            try:
                cells = len(next(rows))
            except csv.Error:  # reported where the row is parsed
                cells = -1
            if number > first and not header and (cells != len(self._names) or self._is_several(begin, at)):
                at, number = self._bytes.find(self._line_end, begin) + 1, first
                rows = reader()
            if not (header and self._names):
                yield begin, at, first
            header = False

    def _is_several(self, begin: int, end: int) -> bool:
        """Whether a row of several lines is really several rows, joined by two stray quotes.

        All lines between the first and the last must be rows: as many cells, none of which starts with a space as in
        prose. If those are few, the first and the last must be rows too, and in some column each of the lines must have
        a value that is frequent in the file, such as a class.
        """
        lines = self._bytes[begin:end].removesuffix(self._line_end).split(self._line_end)
        rows = [self._cells(line) for line in lines[1:-1]]
        if len(rows) < _BETWEEN:  # a stray quote is literal text
            text = (line.decode("utf-8", "replace").replace('"', "") for line in (lines[0], lines[-1]))
            rows += [line.split(self._delimiter) for line in text]
        for cells in rows:
            if not 1 < len(cells) == len(self._names) or isinstance(cells, str) or any(c[:1] == " " for c in cells[1:]):
                return False
        return len(lines) - 2 >= _BETWEEN or any(map(set.issuperset, self._usual, map(set, zip(*rows, strict=True))))

    @functools.cached_property
    def _usual(self) -> list[set[str]]:
        """The values of each column that recur near the beginning of the file."""
        lines = self._bytes[self._start : self._start + _BEGINNING].split(self._line_end)
        rows = [cells for line in lines if len(cells := self._cells(line)) == len(self._names)]
        counts = map(Counter, zip(*(cells for cells in rows if not isinstance(cells, str)), strict=True))
        return [{value for value, count in each.items() if count >= _USUAL and value} for each in counts]


class _Parquet(File):
    """Parquet, read whole into memory as Arrow columns."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            import pyarrow as arrow
            from pyarrow import parquet
        except ImportError:
            raise UserError(
                f"got {path}, which needs pyarrow to be read, expected it installed, try pip install jaxmodels[tables]"
            ) from None
        with path.open("rb"):  # where it may not be read, the error says so
            pass
        try:
            self._table = parquet.read_table(path)
        except (arrow.ArrowException, OSError, ValueError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"got {path}, which is not a Parquet file ({reason[:200]}), expected one, try another file"
            ) from error
        names = self._table.column_names
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"got {path} with several columns {twice[0]!r}, expected each once, try renaming one")
        self.columns = tuple(names)

    def rows(self) -> Iterator[tuple[dict[str, Any] | str, bytes]]:
        for batch in self._table.to_batches(max_chunksize=1024):
            for row in _python(batch):
                yield row, b""

    def read(self, rows: Sequence[int], fields: Sequence[str]) -> list[dict[str, Any] | str]:
        return _python(self._table.select([name for name in fields if name in (self.columns or ())]).take(rows))

    def line(self, row: int) -> int:
        return row + 1


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object, refusing duplicate keys, whose meaning is undefined."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{shown(next(name for name in names if names.count(name) > 1))} is given twice")
    return found


def _python(table: Any) -> list[dict[str, Any] | str]:
    """Convert rows of Arrow columns to Python values, or to the reason why a row cannot be."""
    try:
        return table.to_pylist()
    except (ValueError, OverflowError):  # text that is not UTF-8, impossible times: find out where

        def row(number: int) -> dict[str, Any] | str:
            try:
                return table.slice(number, 1).to_pylist()[0]
            except (ValueError, OverflowError) as error:
                return f"cannot be read ({' '.join(str(error).split())[:200]})"

        return [row(number) for number in range(table.num_rows)]


TABLES: dict[str, type[File]] = {
    ".csv": _Csv, ".tsv": _Csv, ".jsonl": _Json, ".json": _Json, ".parquet": _Parquet,
}  # fmt: skip


def open_file(path: Path) -> File:
    """Open the table in a file, by its extension.

    Raises: UserError if it is not one.
    """
    kind = TABLES.get(path.suffix.lower())
    if kind is None:
        with path.open("rb") as file:
            if (foreign := not_text(file.read(8))).startswith("compressed"):
                raise UserError(f"got {path}, which is {foreign}")
        raise UserError(f"got {path}, expected a table: one of {', '.join(TABLES)}, try renaming or converting it")
    return kind(path)


def shown(value: Any) -> str:
    """Format a value for a message."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deep, or of thousands of digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= 40 else f"{text[:37]}..."
