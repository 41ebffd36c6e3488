"""The progress of a run on the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from jaxmodels.train.loggers import Logger
from jaxmodels.train.metrics import main_metrics


class Display(Logger):
    """Progress for a person: live on a terminal, otherwise a line each time metrics are written."""

    def __init__(self, kind: str, steps: int, unit: str):
        self.unit = unit
        if kind == "auto":
            kind = "live" if sys.stdout.isatty() else "plain"
        self.plain = kind == "plain"
        self.live: Any = None
        self.status = "compiling"
        if kind == "live":
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self.live = Progress(
                TextColumn("[bold]step {task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[shown]}"),
                TextColumn("left"),
                TimeRemainingColumn(),
                refresh_per_second=2,
            )
            self.task = self.live.add_task("train", total=steps, shown=self.status)
        self.steps = steps
        self.began: tuple[int, float] | None = None
        self.held = ""

    def __enter__(self) -> Display:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    @property
    def shows(self) -> bool:
        """Whether `say` reaches anyone."""
        return self.plain or self.live is not None

    def say(self, text: str, failed: bool = False) -> None:
        """Print a line above the live display; to stderr if something failed."""
        if self.live:
            self.live.console.print(text, highlight=False, markup=False)
        elif self.plain:
            print(text, file=sys.stderr if failed else sys.stdout, flush=True)

    def progress(self, step: int, loss: float, rate: float | None) -> None:
        """Show on the live display that a step is done; `rate` is in tokens or examples per second."""
        if self.live:
            speed = f"{rate:,.0f} {self.unit}/s" if rate else ""
            self.live.update(self.task, completed=step, shown=f"loss {loss:.4f}  {speed}{self.held}")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Show the values of a step: as a plain line, or the evaluation beside the live bar."""
        if held := values.get("eval/loss"):
            self.held = f"  eval {held:.4f}"
        if not self.plain:
            return
        now = time.perf_counter()
        self.began = self.began or (step, now)
        done, spent = step - self.began[0], now - self.began[1]
        parts = [f"step {step}/{self.steps}"]
        losses = [name for name in values if name.startswith("train/") and name.endswith("loss")]
        parts += [f"{name.removeprefix('train/').replace('/', ' ')} {values[name]:.4f}" for name in losses]
        parts += [f"{name} {value:.4f}" for name, value in main_metrics(values).items() if name.startswith("eval/")]
        if rate := values.get(f"perf/{self.unit}_per_second"):
            parts.append(f"{rate:,.0f} {self.unit}/s")
        if done and step < self.steps:
            left = int(spent / done * (self.steps - step))
            parts.append(f"left {left // 60}:{left % 60:02d}")
        print("  ".join(parts), flush=True)
