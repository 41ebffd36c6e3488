"""Files of rows: CSV, JSON lines and Parquet."""

from __future__ import annotations

import csv
import io
import json
import mmap
import sys
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxmodels.errors import UserError


class File(ABC):
    """A table in one file. `typed`: whether the file says of a value that it is a number."""

    typed = True

    def __init__(self, path: Path) -> None:
        self.path = path

    @abstractmethod
    def rows(self) -> Iterator[tuple[dict[str, Any] | str, bytes]]:
        """Every row in order: values by column, or why there are none; and, of text, its bytes."""

    @abstractmethod
    def read(self, rows: Sequence[int], fields: Sequence[str]) -> list[dict[str, Any] | str]:
        """Rows by their places in `rows()`, which must have been gone through; thread-safe."""

    @abstractmethod
    def line(self, row: int) -> int:
        """Where a row is, counted from 1: the line that it begins in, or the row itself where there are no lines."""


class _Lines(File):
    """A file of text, mapped; it remembers where each row begins and ends."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        if not path.stat().st_size:
            raise UserError(f"got {path}, which is empty, expected a table, try another file")
        with path.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._start = 3 if self._bytes[:3] == b"\xef\xbb\xbf" else 0
        self._first_line = 1
        self._extents, self._numbers = array("q"), array("q")

    @abstractmethod
    def _parse(self, raw: bytes) -> dict[str, Any] | str: ...

    @abstractmethod
    def _cut(self) -> Iterator[tuple[int, int, int]]:
        """Beginning, end and first line of each row."""

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
            end = self._bytes.find(b"\n", start) + 1 or len(self._bytes)
            yield start, end
            start = end


class _Json(_Lines):
    """One JSON object a line."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        if self._bytes[self._start : self._start + 256].lstrip()[:1] == b"[":
            raise UserError(f"got {path}, which is one JSON array, expected JSON lines, try jq -c '.[]' {path}")

    def _parse(self, raw: bytes) -> dict[str, Any] | str:
        try:
            value = json.loads(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            return f"byte {error.start} of the row is not UTF-8"
        except json.JSONDecodeError as error:
            return f"invalid JSON ({error.msg} at character {error.pos})"
        except (ValueError, RecursionError) as error:  # numbers of thousands of digits, endless nesting
            return f"invalid JSON ({error})"
        return value if isinstance(value, dict) else f"{shown(value)} is no JSON object"

    def _cut(self) -> Iterator[tuple[int, int, int]]:
        for number, (start, end) in enumerate(self._each_line(), 1):
            yield start, end, number


class _Csv(_Lines):
    """Comma- or tab-separated values, with the columns' names in the first row."""

    typed = False

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        # a field may be a whole document
        csv.field_size_limit(sys.maxsize)
        self._delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        self._names: list[str] = []
        start, end, _ = next(self._cut())
        header = self._cells(self._bytes[start:end])
        if isinstance(header, str) or len(set(header)) < len(header) or not all(header):
            raise UserError(
                f"got {path} with the first row {shown(header)}, expected the names of the columns, each once, "
                "try adding such a row"
            )
        self._names = header

    def _cells(self, raw: bytes) -> list[str] | str:
        try:
            text = io.StringIO(raw.decode("utf-8"), newline="\n")
            return next(csv.reader(text, delimiter=self._delimiter, strict=True))
        except UnicodeDecodeError as error:
            return f"byte {error.start} of the row is not UTF-8"
        except csv.Error as error:
            return f"invalid CSV ({error})"

    def _parse(self, raw: bytes) -> dict[str, Any] | str:
        cells = self._cells(raw)
        if isinstance(cells, str):
            return cells
        if len(cells) != len(self._names):
            return f"has {len(cells)} columns, expected {len(self._names)}"
        return dict(zip(self._names, cells, strict=True))

    def _cut(self) -> Iterator[tuple[int, int, int]]:
        end = begin = self._start

        def lines() -> Iterator[str]:
            nonlocal end
            for start, end in self._each_line():
                # any byte is a character of latin-1, and those that end a cell or a row are the same
                yield self._bytes[start:end].decode("latin-1")

        reader, number, ended, header = csv.reader(lines(), delimiter=self._delimiter), 1, False, True
        while not ended:
            try:
                next(reader)
            except csv.Error:
                pass  # what it is will be said where the row is parsed
            except StopIteration:
                ended = True
            if end > begin and not (header and self._names):
                yield begin, end, number
            header, begin, number = False, end, reader.line_num + 1


class _Parquet(File):
    """Parquet, read whole into memory as Arrow's columns."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            import pyarrow as arrow
            from pyarrow import parquet
        except ImportError:
            raise UserError(
                f"got {path}, which needs pyarrow to be read, expected it installed, try pip install jaxmodels[tables]"
            ) from None
        try:
            self._table = parquet.read_table(path)
        except arrow.ArrowInvalid as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"got {path}, which is no Parquet file ({reason}), expected one, try another file"
            ) from error

    def rows(self) -> Iterator[tuple[dict[str, Any] | str, bytes]]:
        for batch in self._table.to_batches(max_chunksize=1024):
            for row in batch.to_pylist():
                yield row, b""

    def read(self, rows: Sequence[int], fields: Sequence[str]) -> list[dict[str, Any] | str]:
        return self._table.select(list(fields)).take(rows).to_pylist()

    def line(self, row: int) -> int:
        return row + 1


TABLES: dict[str, type[File]] = {
    ".csv": _Csv, ".tsv": _Csv, ".jsonl": _Json, ".json": _Json, ".parquet": _Parquet,
}  # fmt: skip


def open_file(path: Path) -> File:
    """The table in a file, by the ending of its name.

    Raises: UserError where it is none.
    """
    kind = TABLES.get(path.suffix.lower())
    if kind is None:
        raise UserError(f"got {path}, expected a table: one of {', '.join(TABLES)}, try renaming or converting it")
    return kind(path)


def shown(value: Any) -> str:
    """A value as it may stand in a message."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
