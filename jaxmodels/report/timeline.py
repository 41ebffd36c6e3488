"""Draw what happened to a run over time, from its events.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from jaxmodels.launch import events
from jaxmodels.report import pieces
from jaxmodels.report.pieces import COLORS, Picture, Piece, Table

PHASES = ("start", "restore", "compile", "step", "data", "evaluation", "save", "idle")
SHADES = ("#b9c2cc", "#8a97a6", "#8f4bb3", "#1f6fb4", "#d9a21e", "#2a9d4e", "#17a0ad", "#e4e7ea")
SAVED = "#1c2024"
UNITS = ((2 * 86400, 86400, "days"), (2 * 3600, 3600, "hours"), (120, 60, "minutes"), (0, 1, "seconds"))
ENDS = ("failed", "preempted", "mistake", "done", "cancelled")
LABELS = 24
"""The most failures that are labeled; the others have only a mark."""

Event = Mapping[str, Any]


def show(runs: Mapping[str, Path]) -> list[Piece]:
    """A picture and a table for each run that has events; of others nothing."""
    found: list[Piece] = []
    for name, run in runs.items():
        ended = (row for row in events.read(run) if row.get("until") is None)  # where a holdup began is enough
        rows = sorted(ended, key=lambda row: row["time"])
        if rows:
            found.append(draw(name if len(runs) > 1 else "", rows))
            if failures := [row for row in rows if row["event"] in ("failed", "slow", "unsaved")]:
                found.append(table(rows[0]["time"], failures))
    return found


def attempts(rows: Sequence[Event]) -> list[list[Event]]:
    """The events of each attempt."""
    found: list[list[Event]] = []
    for row in rows:
        if row["event"] == "start" or not found:
            found.append([])
        found[-1].append(row)
    return found


def draw(name: str, rows: Sequence[Event]) -> Picture:
    """Steps over time, and below them what each attempt was doing, with checkpoints and failures marked."""
    began, parts = rows[0]["time"], attempts(rows)
    length = max(rows[-1]["time"] - began, 1e-3)
    scale, unit = next((scale, unit) for least, scale, unit in UNITS if length >= least)
    figure = pieces.figure(10, 3.6 + 0.32 * min(len(parts), 20))
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2.4, 0.4 + 0.32 * min(len(parts), 20)))

    def at(row: Event) -> float:
        return (row["time"] - began) / scale

    many = sum(row["event"] == "failed" for row in rows) > LABELS
    for index, part in enumerate(parts):
        # before its state is there an attempt is at no step yet
        early = [row for row in part if row["event"] == "phase" and row.get("phase") in ("start", "restore")]
        known = [
            row for row in part if isinstance(row.get("step"), int) and row["event"] != "slow" and row not in early
        ]
        above.plot([at(row) for row in known], [row["step"] for row in known], color=COLORS[0], linewidth=1.3)
        saved = [row for row in part if row["event"] == "saved"]
        above.plot([at(r) for r in saved], [r["step"] for r in saved], "o", color=SAVED, markersize=4)
        phases = [row for row in part if row["event"] in ("start", "phase")]
        for row, behind in zip(phases, [*phases[1:], part[-1]], strict=True):
            phase = row["phase"] if row["phase"] in PHASES else "start"
            color = SHADES[PHASES.index(phase)]
            below.barh(index, max(at(behind) - at(row), 0), left=at(row), height=0.7, color=color)
        for row in part:
            if row["event"] == "failed":
                below.plot(at(row), index, "X", color=COLORS[1], markersize=8, clip_on=False, zorder=3)
                step = row["step"] if isinstance(row.get("step"), int) else max((r["step"] for r in known), default=0)
                above.plot(at(row), step, "X", color=COLORS[1], markersize=8, clip_on=False, zorder=3)
                if not many:
                    label = str(row.get("kind")) + ("" if row["rank"] is None else f", rank {row['rank']}")
                    left = at(row) > 0.8 * length / scale
                    above.annotate(
                        label, (at(row), step), (-6 if left else 6, 4), textcoords="offset points", fontsize=8,
                        ha="right" if left else "left", parse_math=False,
                    )  # fmt: skip
            elif row["event"] == "slow":
                below.plot(at(row), index, "v", color=COLORS[4], markersize=7, clip_on=False, zorder=3)
    sizes = [next((row.get("processes") for row in part if row["event"] == "start"), None) for part in parts]
    labels = [f"{i}" + (f" ({n} processes)" if len(set(sizes)) > 1 and n else "") for i, n in enumerate(sizes)]
    below.set_yticks(range(len(parts)), labels, fontsize=8)
    if len(parts) > 20:
        below.set_yticks([0, len(parts) - 1])
    below.set_ylim(len(parts) - 0.4, -0.6)
    below.set_ylabel("attempt", fontsize=9)
    below.set_xlabel(f"{unit} since the start", fontsize=9)
    above.set_ylabel("step", fontsize=9)
    above.set_ylim(bottom=0)
    for axis in (above, below):
        axis.grid(alpha=0.25, axis="both" if axis is above else "x")
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    seen = {row["phase"] for row in rows if row["event"] == "phase"} | {"start"}
    handles: list[Any] = [Patch(color=SHADES[i], label=phase) for i, phase in enumerate(PHASES) if phase in seen]
    marks = (
        ("saved", "o", SAVED, "checkpoint"),
        ("failed", "X", COLORS[1], "failure"),
        ("slow", "v", COLORS[4], "slow"),
    )
    kinds = {row["event"] for row in rows}
    handles += [
        Line2D([], [], linestyle="", marker=mark, color=color, label=label)
        for event, mark, color, label in marks
        if event in kinds
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 9), frameon=False, fontsize=8)
    end = next((row["event"] for row in reversed(rows) if row["event"] in ENDS), None)
    caption = f"{len(parts)} attempt{'s' if len(parts) > 1 else ''}; " + (
        f"the last event is: {end}." if end else "under way."
    )
    return Picture("timeline", figure, f"{name}: {caption}" if name else caption)


def table(began: float, rows: Sequence[Event]) -> Table:
    """What failed or was slow."""
    head = ("after", "what", "rank", "host", "phase", "step", "said")
    lines = []
    for row in rows[:200]:
        slow = f"{row['factor']} times as long a step" if "factor" in row else str(row.get("message", ""))
        kind = str(row.get("kind", row["event"]))
        where = ["–" if row.get(name) is None else str(row[name]) for name in ("rank", "host", "phase", "step")]
        lines.append((f"{row['time'] - began:,.1f} s", kind, *where, slow[:300]))
    return Table(head, lines, "Failures, what held up steps, and checkpoints that could not be saved.")
