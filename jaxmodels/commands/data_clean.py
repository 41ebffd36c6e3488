"""`jaxmodels data clean FILE... --out FILE`: texts normalized, filtered, without duplicates."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from jaxmodels.data.clean import Rules, beside
from jaxmodels.data.clean import clean as cleaned

DEFAULT = Rules()


def clean(
    paths: tuple[str, ...],
    /,
    out: Path,
    text_field: str = "text",
    lines: bool = False,
    rules: Annotated[Rules, tyro.conf.arg(name="")] = DEFAULT,
) -> None:
    """Normalize and filter texts, leave out duplicates, and report what was left out and why.

    Args:
        paths: files or globs: CSV, JSON lines or Parquet; any other file is a text.
        out: JSON lines of the texts that are kept, each with the other fields of its row; OUT.report.json beside it
        lists what was left out.
        text_field: the column of a table that holds the text.
        lines: whether each line of a text file is a separate text.
        rules: what a text must satisfy to be kept.
    """
    print(cleaned(paths, out, text_field, lines, rules).show())
    print(f"written: {out}, and what was left out: {beside(out)}")
