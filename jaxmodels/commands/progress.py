"""Progress of a long command."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

_SAID = 1_000_000_000  # bytes from which on progress is shown


@contextlib.contextmanager
def progress(verb: str, total: int) -> Iterator[Callable[[int], Any]]:
    """Yield a function to call with bytes done: it draws a bar on a terminal, else prints a line per tenth of a large
    total."""
    if sys.stdout.isatty():
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns = (TextColumn(verb), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(*columns) as bar:
            task = bar.add_task(verb, total=total)
            yield lambda count: bar.advance(task, count)
        return
    so_far = 0

    def tell(count: int) -> None:
        nonlocal so_far
        before, so_far = so_far, so_far + count
        if total >= _SAID and so_far * 10 // total > before * 10 // total:
            print(f"{verb} {so_far / 1e9:.1f} of {total / 1e9:.1f} GB", flush=True)

    yield tell
