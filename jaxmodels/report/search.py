"""A picture of what a search has found."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")


def draw(
    out: Path, metric: str, lowest: bool, fields: Sequence[tuple[str, bool]], trials: Sequence[dict[str, Any]]
) -> None:
    """Draw the metric over trials with the best so far, and over each field, as a PNG.

    `fields`: names, and whether they were drawn on a logarithmic scale; `trials`: their `number`, `value` (None if it
    failed), `pruned`, and the values of the fields by name.
    """
    from matplotlib import pyplot as plt

    known = [trial for trial in trials if trial["value"] is not None]
    columns = min(len(fields) + 1, 3)
    rows = -(-(len(fields) + 1) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.4 * rows), layout="constrained", squeeze=False)
    first, *others = axes.flat
    groups = (("finished", False, "tab:blue", "o"), ("stopped early", True, "0.6", "x"))

    def scatter(axis: Any, name: str) -> None:
        for label, pruned, color, marker in groups:
            some = [trial for trial in known if trial["pruned"] == pruned]
            places = [trial[name] if isinstance(trial[name], int | float) else str(trial[name]) for trial in some]
            axis.scatter(places, [trial["value"] for trial in some], label=label, color=color, marker=marker, s=26)
        axis.grid(alpha=0.3)

    scatter(first, "number")
    finished = [trial for trial in known if not trial["pruned"]]
    best = list(itertools.accumulate((trial["value"] for trial in finished), min if lowest else max))
    first.step([trial["number"] for trial in finished], best, where="post", color="tab:orange", label="best so far")
    first.set_xlabel("trial")
    first.set_ylabel(metric)
    first.legend(frameon=False, fontsize=8)
    for axis, (name, logarithmic) in zip(others, fields, strict=False):
        scatter(axis, name)
        axis.set_xlabel(name)
        if logarithmic:
            axis.set_xscale("log")
    for axis in others[len(fields) :]:
        axis.set_visible(False)
    figure.suptitle(f"{len(trials)} trials for {'the lowest' if lowest else 'the highest'} {metric}", fontsize=12)
    figure.savefig(out, dpi=110)
    plt.close(figure)
