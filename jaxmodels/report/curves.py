"""Training curves of runs, from their metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from jaxmodels.report import pieces
from jaxmodels.report.pieces import COLORS
from jaxmodels.train import metrics

Series = tuple[list[float], list[float]]
Panel = tuple[str, Sequence[str]]
"""A title, and the names of the metrics in that panel."""

COLUMNS = 3
IN_TABLES = ("/precision", "/recall", "_micro")
"""Metrics whose curve only repeats that of another."""


def draw(run: Path, out: Path, lines: Mapping[str, float] | None = None) -> None:
    """Draw a run's curves as a PNG; `lines` are horizontal references in the loss panel, such as a baseline's."""
    figure = overlay({run.name: run}, lines or {})
    figure.suptitle(run.name, fontsize=12, parse_math=False)
    figure.savefig(out, dpi=110)


def overlay(runs: Mapping[str, Path], lines: Mapping[str, float] | None = None) -> Figure:
    """Draw losses, metrics, learning rate, throughput and gradient norm over steps, all runs in one figure.

    Thin lines are training; thick lines with markers are held-out data. Each run has a color.
    """
    rows = {name: metrics.read(run) for name, run in runs.items()}
    panels = chosen({name for each in rows.values() for row in each for name in row})
    count = max(len(panels), 1)
    columns = COLUMNS if count > 4 else min(2, count)
    height = -(-count // columns)
    figure = pieces.figure(3.8 * columns, 2.9 * height + 0.5)
    engine: Any = figure.get_layout_engine()
    engine.set(w_pad=0.1, h_pad=0.12)
    axes: Any = figure.subplots(height, columns, squeeze=False)
    for axis, (title, names) in zip(axes.flat, panels, strict=False):
        for index, each in enumerate(rows.values()):
            for name in names:
                steps, values = series(each, name)
                held_out = name.startswith("eval/")
                look = {"marker": "o", "markersize": 3.5, "linewidth": 1.8} if held_out else {"linewidth": 0.9}
                if len(values) == 1 and not held_out:  # a single point makes no line
                    look |= {"marker": ".", "markersize": 5}
                axis.plot(steps, values, color=COLORS[index % len(COLORS)], alpha=1 if held_out else 0.75, **look)
        finish(axis, title)
        if title.startswith("loss") and lines:
            for label, value in lines.items():
                axis.axhline(value, color="0.5", linestyle="--", linewidth=1, label=label)
            axis.legend(frameon=False, fontsize=8)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    colors = [COLORS[i % len(COLORS)] for i in range(len(runs))]
    handles = [Line2D([], [], color=color, linewidth=4) for color in colors] if len(runs) > 1 else []
    labels = [*(runs if len(runs) > 1 else ()), "training", "held out"]
    gray = "0.35" if len(runs) > 1 else COLORS[0]
    handles += [
        Line2D([], [], color=gray, linewidth=0.9),
        Line2D([], [], color=gray, linewidth=1.8, marker="o", markersize=4),
    ]
    legend = figure.legend(
        handles, [""] * len(labels), loc="outside lower center", ncols=min(len(handles), 5), frameon=False, fontsize=9
    )
    for text, label in zip(legend.get_texts(), labels, strict=True):
        # escaped: a legend leaves out labels that begin with _, and $ begins a formula
        text.set_parse_math(False)
        text.set_text(label)
    return figure


def chosen(names: set[str]) -> list[Panel]:
    """Choose the panels for these metrics: losses first, the engine's own metrics last."""
    panels: list[Panel] = []
    if "train/loss" in names or ("eval/loss" in names and "train/discriminator/loss" not in names):
        panels.append(("loss", [name for name in ("train/loss", "eval/loss") if name in names]))
    held_out = {"discriminator": "eval/loss", "generator": "eval/generator"}
    for name in sorted(name for name in names if name.startswith("train/") and name.endswith("/loss")):
        if name == "train/loss":
            continue
        network = name.split("/")[1]
        panels.append((f"loss of the {network}", [name, *({held_out.get(network, "")} & names)]))
    shown = {name for _, panel in panels for name in panel}
    # metrics of single classes or groups belong in a table
    for name in sorted(name for name in names if name.startswith("eval/") and name.count("/") == 1):
        if name not in shown and not name.endswith(IN_TABLES):
            pair = name.replace("eval/", "train/")
            panels.append((name.removeprefix("eval/").replace("_", " "), [pair, name] if pair in names else [name]))
    if "train/learning_rate" in names:
        panels.append(("learning rate", ["train/learning_rate"]))
    for name in sorted(name for name in names if name.startswith("perf/") and name.endswith("s_per_second")):
        panels.append((name.removeprefix("perf/").replace("_", " "), [name]))
    for name in sorted(name for name in names if name.endswith("grad_norm")):
        whose = name.removeprefix("train/").removesuffix("grad_norm").rstrip("/")
        panels.append((f"norm of the {whose}'s gradient" if whose else "norm of the gradient", [name]))
    return panels


def series(rows: Sequence[Mapping[str, float]], name: str) -> Series:
    """Return steps and values of a metric."""
    found = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
    return [step for step, _ in found], [value for _, value in found]


def finish(axis: Any, title: str) -> None:
    """Set title, grid and limits of a panel."""
    axis.set_title(title, fontsize=11)
    axis.set_xlabel("step", fontsize=9)
    axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if title.endswith("per second") or title == "learning rate":
        axis.set_ylim(bottom=0)


def last(run: Path) -> dict[str, float]:
    """Return the last evaluation in a run's metrics."""
    rows = [{k: v for k, v in row.items() if k.startswith("eval/")} for row in metrics.read(run)]
    return next((row for row in reversed(rows) if row), {})
