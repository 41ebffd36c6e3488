"""Tables that a test writes, and what is read of them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from jaxmodels.config import DataConfig, Table
from jaxmodels.data import tables
from jaxmodels.data.records import Reader, Records

KINDS = ("csv", "tsv", "jsonl", "json", "parquet")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def table(*paths: Path, **fields: Any) -> DataConfig:
    return Table(path=tuple(map(str, paths)), **fields)


def values(records: Records, *fields: str, limit: int = 0) -> list[tuple[Any, ...]]:
    return [tuple(row[f] for f in fields) for rows in Reader(records, fields, limit).all() for row in rows]


def read(path: Path, content: bytes | str, **fields: Any) -> Records:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return tables.records(table(path, eval_fraction=0, **fields), "train")
