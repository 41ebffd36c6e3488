"""A picture of runs of one task: how good they are for what they take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.ticker import EngFormatter, MaxNLocator

from jaxmodels.compress.table import Row, Table, best
from jaxmodels.report import pieces
from jaxmodels.report.pieces import COLORS


def draw(out: Path, table: Table) -> None:
    """Draw quality over the bytes of the weights, over peak memory and over speed, as a PNG.

    A line joins the runs than which no other is as good and takes less: the Pareto front.
    """
    figure = pieces.figure(13, 4.6)
    panels: Any = figure.subplots(1, 3, sharey=True)
    shown = (
        ("bytes of weights", lambda row: row.bytes, 1),
        ("bytes of an evaluation at its peak", lambda row: row.peak, 1),
        (f"{table.unit} / s on {table.device}", lambda row: row.speed, -1),
    )
    for panel, (label, at, sign) in zip(panels, shown, strict=True):
        front = best(table.rows, table.better, lambda row, at=at, sign=sign: sign * at(row))
        panel.plot([at(row) for row in front], [row.quality for row in front], "-", color="0.6", linewidth=1.2)
        for index, row in enumerate(table.rows):
            panel.plot(at(row), row.quality, "o", color=COLORS[index % len(COLORS)], label=_name(row))
        panel.set_xlabel(label)
        panel.set_xlim(0, 1.08 * max(at(row) for row in table.rows))
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        panel.xaxis.set_major_locator(MaxNLocator(5))
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    arrow = {"min": "lower is better", "max": "higher is better"}.get(table.better or "", "")
    panels[0].yaxis.get_major_formatter().set_useOffset(False)
    panels[0].set_ylabel(f"{table.metric}{f' ({arrow})' if arrow else ''}")
    panels[-1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(out, format="png", dpi=110, bbox_inches="tight")


def _name(row: Row) -> str:
    return Path(row.run).name
