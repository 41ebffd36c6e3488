"""Curves of a run, from its metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib

from jaxmodels.train import metrics

matplotlib.use("Agg")


def draw(run: Path, out: Path, lines: Mapping[str, float] | None = None) -> None:
    """Loss (train and held out), accuracy, learning rate and throughput over steps, as a PNG.

    `lines` are horizontal references beside the loss, such as a baseline's.
    """
    from matplotlib import pyplot as plt

    rows = metrics.read(run)

    def series(name: str) -> tuple[list[float], list[float]]:
        found = [(row["step"], row[name]) for row in rows if name in row]
        return [step for step, _ in found], [value for _, value in found]

    names = {name for row in rows for name in row}
    speed = next((name for name in sorted(names) if name.endswith("s_per_second")), "perf/tokens_per_second")
    panels = [
        ("loss (nats)", [("train/loss", "train"), ("eval/loss", "held out")]),
        ("accuracy", [("train/accuracy", "train"), ("eval/accuracy", "held out")]),
        ("learning rate", [("train/learning_rate", "")]),
        (speed.removeprefix("perf/").replace("_per_", " per ").replace("_", " "), [(speed, "")]),
    ]
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.5), layout="constrained")
    for axis, (title, wanted) in zip(axes.flat, panels, strict=True):
        for name, label in wanted:
            steps, values = series(name)
            if steps:
                marker = "o" if name.startswith("eval/") else ""
                axis.plot(steps, values, label=label, marker=marker, markersize=4, linewidth=1.2)
        if title.startswith("loss"):
            for label, value in (lines or {}).items():
                axis.axhline(value, color="0.5", linestyle="--", linewidth=1, label=label)
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[1] and any(axis.get_legend_handles_labels()[1]):
            axis.legend(frameon=False)
        if title == speed or axis is axes.flat[3]:
            axis.set_ylim(bottom=0)
    figure.suptitle(str(run.name), fontsize=12)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def last(run: Path) -> dict[str, float]:
    """The last evaluation in a run's metrics."""
    rows = [{k: v for k, v in row.items() if k.startswith("eval/")} for row in metrics.read(run)]
    return next((row for row in reversed(rows) if row), {})
