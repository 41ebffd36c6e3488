"""A picture of how a step scales."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from jaxmodels.report import pieces
from jaxmodels.report.pieces import COLORS

MARKS = "osD^vP"
LINES = ("-", (0, (4, 2)))


def draw(
    out: Path, title: str, unit: str, first: tuple[int, float], pays: float, points: Sequence[dict[str, Any]]
) -> None:
    """Draw throughput and efficiency over devices, weak scaling on the left and strong on the right, as a PNG.

    `first`: devices and throughput of the first size; `points`: `mode`, `axis`, `devices`, `per_second` and
    `efficiency` of the sizes that fit; `pays`: the efficiency to mark.
    """
    axes = list(dict.fromkeys(point["axis"] for point in points))
    ends = [first[0], max([point["devices"] for point in points], default=2 * first[0])]
    figure = pieces.figure(10, 7)
    panels: Any = figure.subplots(2, 2, sharex=True)
    for column, mode in enumerate(("weak", "strong")):
        above, below = panels[:, column]
        above.plot(ends, [first[1], first[1] * ends[1] / ends[0]], "--", color="0.5", linewidth=1.2, label="ideal")
        below.axhline(1, linestyle="--", color="0.5", linewidth=1.2)
        below.axhline(pays, linestyle=":", color="0.5", linewidth=1.2, label=f"{pays:g}: below it an axis does not pay")
        for index, axis in enumerate(axes):
            some = sorted((p for p in points if (p["mode"], p["axis"]) == (mode, axis)), key=lambda p: p["devices"])
            where = [first[0], *(point["devices"] for point in some)]
            # coinciding curves are visible through each other
            size = max(4.0, 11 - 2.0 * index)
            look = {"color": COLORS[index % len(COLORS)], "marker": MARKS[index % len(MARKS)], "markersize": size}
            look |= {"fillstyle": "none" if index % 2 == 0 else "full", "linestyle": LINES[index % len(LINES)]}
            label = axis if some else f"{axis} (no larger size runs)"
            above.plot(where, [first[1], *(point["per_second"] for point in some)], label=label, alpha=0.85, **look)
            below.plot(where, [1, *(point["efficiency"] for point in some)], alpha=0.85, **look)
        kept = "each device keeps its share of the batch" if mode == "weak" else "the batch stays the same"
        above.set_title(f"{mode} scaling: {kept}", fontsize=11)
        above.set_yscale("log")
        above.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        above.yaxis.set_major_formatter(EngFormatter(sep=""))
        above.yaxis.set_minor_formatter(NullFormatter())
        above.set_ylabel(f"{unit} / s")
        above.legend(frameon=False, fontsize=8, title="growth along", title_fontsize=8)
        below.set_ylabel("efficiency relative to the first size")
        below.set_ylim(bottom=0)
        below.legend(frameon=False, fontsize=8, loc="lower left")
        below.set_xlabel("devices")
        below.set_xscale("log", base=2)
        below.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        sizes = sorted({first[0], *(point["devices"] for point in points)})
        below.set_xticks(sizes)
        below.minorticks_off()
        for panel in (above, below):
            panel.grid(alpha=0.25)
            panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=12)
    figure.savefig(out, format="png", dpi=110)
