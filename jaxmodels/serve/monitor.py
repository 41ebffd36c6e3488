"""Compare what a classifier sees and says now with what it saw and said before, and draw it on a page."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.report.build import save
from jaxmodels.report.page import Part, Section
from jaxmodels.report.pieces import COLORS, Picture, Table, figure, grid
from jaxmodels.serve import drift
from jaxmodels.serve.drift import Test
from jaxmodels.serve.window import Window

SHOWN = 12
"""The most inputs that are drawn, those that differ most first."""
NAMED = 20
"""With more classes than this, those that differ most are drawn."""
LEAST = 20
"""A group with fewer labeled rows on either side is not tested."""


def compare(reference: Window, current: Window, classes: int) -> list[Test]:
    """All tests of two windows, with their alarms."""
    tests = [
        drift.numbers(f"inputs/{name}", x, current.features[name]) for name, x in sorted(reference.features.items())
    ]
    counts = [np.bincount(window.predicted, minlength=classes) for window in (reference, current)]
    tests.append(drift.categories("predictions/class", *counts))
    tests.append(drift.numbers("predictions/confidence", reference.confidence, current.confidence))
    unread = [(window.unreadable, window.unreadable + len(window)) for window in (reference, current)]
    if any(count for count, _ in unread):
        tests.append(drift.rates("inputs/unreadable", *unread, worse="greater"))
    for name, before, now in _accuracies(reference, current):
        if name == "accuracy" or min(before[1], now[1]) >= LEAST:
            tests.append(drift.rates(name, before, now, worse="less"))
    return drift.decided(tests)


Rate = tuple[int, int]
"""How many, of how many."""


def _accuracies(reference: Window, current: Window) -> list[tuple[str, Rate, Rate]]:
    """Right predictions of the labeled rows of both windows, in all and by group."""
    if reference.labels is None or current.labels is None:
        return []

    def rate(window: Window, own: Any = True) -> Rate:
        counts = (np.asarray(window.labels) >= 0) & own
        return int((window.right & counts).sum()), int(counts.sum())

    found = [("accuracy", rate(reference), rate(current))]
    if reference.groups is not None and current.groups is not None:
        for name in sorted({*reference.groups.tolist()} & {*current.groups.tolist()}):
            found.append(
                (f"accuracy/{name}", rate(reference, reference.groups == name), rate(current, current.groups == name))
            )
    return found


def measured(window: Window) -> dict[str, Any]:
    """The numbers of one window: rows, confidence, and with labels accuracy, by group too, and calibration."""
    found: dict[str, Any] = {"rows": len(window), "unreadable": window.unreadable}
    found["confidence"] = float(window.confidence.mean())
    if window.labels is not None:
        there = window.labels >= 0
        found["labeled"] = int(there.sum())
        found["accuracy"] = float(window.right[there].mean())
        found["calibration_error"] = drift.calibration_error(window.confidence[there], window.right[there])
        if window.groups is not None:
            names = sorted({*window.groups[there].tolist()})
            found["group"] = {name: float(window.right[there & (window.groups == name)].mean()) for name in names}
    return found


def line(tests: Sequence[Test], reference: Window, current: Window, **facts: Any) -> str:
    """Everything that was found, as one line of JSON."""
    alarms = [test.name for test in tests if test.alarm]
    found = {**facts, "alarm": bool(alarms), "alarms": alarms}
    found |= {"reference": measured(reference), "current": measured(current)}
    found["tests"] = [dataclasses.asdict(test) for test in tests]
    return json.dumps(found)


def page(
    folder: Path, run: str, tests: Sequence[Test], reference: Window, current: Window, names: Sequence[str]
) -> Path:
    """Write the page with its pictures; return its path."""
    alarms = [test.name for test in tests if test.alarm]
    said = f"Alarms: {', '.join(alarms)}." if alarms else "No alarm."
    sections = [
        Section("Summary", [Part([_facts(reference, current)], note=said)]),
        Section("Tests", [Part([_table(tests)])]),
        Section("Inputs", [Part([_inputs(tests, reference, current)])]),
        Section("Predictions", [Part([_predictions(reference, current, names)])]),
    ]
    labeled = [w for w in (reference, current) if w.labels is not None]
    if labeled:
        sections.append(Section("Calibration", [Part([_calibration(reference, current)])]))
    rates = _accuracies(reference, current)
    if len(rates) > 1:
        sections.append(Section("Groups", [Part([_groups(rates)])]))
    return save(folder, f"Monitor: {run}", sections)


def _facts(reference: Window, current: Window) -> Table:
    columns = [measured(window) for window in (reference, current)]
    keys = [key for key in dict.fromkeys([*columns[0], *columns[1]]) if key != "group"]
    text = lambda x: "–" if x is None else f"{x:,}" if isinstance(x, int) else f"{x:.4f}"  # noqa: E731
    rows = [(key.replace("_", " "), *(text(column.get(key)) for column in columns)) for key in keys]
    return Table(("", "reference", "current"), rows)


def _table(tests: Sequence[Test]) -> Table:
    def row(t: Test) -> tuple[str, ...]:
        psi = "–" if t.psi is None else f"{t.psi:.3f}"
        return t.name, t.test, f"{t.value:.4f}", f"{t.p:.2g}", f"{t.corrected:.2g}", psi, "alarm" if t.alarm else ""

    head = ("what", "test", "value", "p", "p, corrected", "stability index", "")
    ordered = sorted(tests, key=lambda t: (not t.alarm, t.p))
    return Table(head, [row(test) for test in ordered], drift_caption(tests))


def drift_caption(tests: Sequence[Test]) -> str:
    """What decides an alarm, in words."""
    far = any(t.test in ("Wasserstein", "Jensen-Shannon") for t in tests)
    return (
        f"An alarm is a p-value below {drift.LEVEL} after the correction for {len(tests)} tests (Holm)"
        + (f", and of distances one of {drift.FAR} or more." if far else ".")
        + f" A stability index (PSI) from {drift.FAR} on is worth a look."
    )


def _pair(axis: Any, reference: np.ndarray, current: np.ndarray) -> None:
    """Draw two samples of numbers as shares of their rows, over the same bins."""
    both = np.concatenate([reference, current])
    low, high = np.quantile(both, [0.002, 0.998])
    edges = np.linspace(low, high if high > low else low + 1, 31)
    for x, color, name in ((reference, COLORS[0], "reference"), (current, COLORS[1], "current")):
        counts, _ = np.histogram(np.clip(x, edges[0], edges[-1]), edges)
        axis.stairs(counts / len(x), edges, color=color, fill=True, alpha=0.25)
        axis.stairs(counts / len(x), edges, color=color, linewidth=1.4, label=name)
    axis.set_ylim(bottom=0)
    axis.tick_params(labelsize=7)


def _inputs(tests: Sequence[Test], reference: Window, current: Window) -> Picture:
    own = [t for t in tests if t.name.removeprefix("inputs/") in reference.features]
    own = sorted(own, key=lambda t: (not t.alarm, t.p))[:SHOWN]
    columns = min(3, len(own))
    rows = -(-len(own) // columns)
    whole, axes = grid(rows, columns, 3.1, 2.1)
    for axis in axes.flat[len(own) :]:
        axis.set_axis_off()
    for axis, test in zip(axes.flat, own, strict=False):
        name = test.name.removeprefix("inputs/")
        _pair(axis, reference.features[name], current.features[name])
        mark = "  (alarm)" if test.alarm else ""
        axis.set_title(f"{name}{mark}", fontsize=9, parse_math=False, color="#b3261e" if test.alarm else "0.15")
    axes.flat[0].legend(fontsize=7)
    caption = "What the inputs are like: shares of the rows, the largest differences first."
    return Picture("inputs", whole, caption)


def _predictions(reference: Window, current: Window, names: Sequence[str]) -> Picture:
    classes = len(names)
    parts = [np.bincount(w.predicted, minlength=classes) / len(w) for w in (reference, current)]
    chosen = np.arange(classes)
    if classes > NAMED:
        chosen = np.sort(np.argsort(-np.abs(parts[1] - parts[0]), kind="stable")[:NAMED])
    whole = figure(max(7.0, 3.6 + 0.32 * len(chosen)), 3.0)
    first, second = whole.subplots(1, 2, width_ratios=(max(1.0, len(chosen) / 10), 1))
    for shift, share, color, name in ((-0.2, parts[0], COLORS[0], "reference"), (0.2, parts[1], COLORS[1], "current")):
        first.bar(np.arange(len(chosen)) + shift, share[chosen], 0.4, color=color, label=name)
    shown = [names[i] for i in chosen.tolist()]
    long = max(map(len, shown)) > 2
    ticks = {"rotation": 45 if long else 0, "ha": "right" if long else "center", "fontsize": 8}
    first.set_xticks(range(len(chosen)), shown, parse_math=False, **ticks)
    first.set_ylim(0, 1.25 * max(share[chosen].max() for share in parts))  # room for the legend
    first.set_title("predicted class", fontsize=9)
    first.legend(fontsize=7)
    _pair(second, reference.confidence, current.confidence)
    second.set_title("confidence", fontsize=9)
    more = f" The {NAMED} classes that differ most." if classes > NAMED else ""
    return Picture("predictions", whole, f"What the model says: shares of the rows.{more}")


def _calibration(reference: Window, current: Window) -> Picture:
    whole = figure(4.4, 4.2)
    axis: Any = whole.subplots()
    axis.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle="--")
    for window, color, name in ((reference, COLORS[0], "reference"), (current, COLORS[1], "current")):
        if window.labels is None:
            continue
        there = window.labels >= 0
        _, rows, sure, share = drift.reliability(window.confidence[there], window.right[there])
        error = drift.calibration_error(window.confidence[there], window.right[there])
        axis.plot(sure, share, color=color, linewidth=1.2, label=f"{name}, error {error:.3f}")
        axis.scatter(sure, share, 12 + 160 * rows / rows.sum(), color=color, alpha=0.7, linewidths=0)
    axis.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel="confidence", ylabel="share that is right")
    axis.legend(fontsize=8)
    caption = "Confidence and what came true, in ten bins; the area of a point is its share of the rows."
    return Picture("calibration", whole, caption)


def _groups(rates: Sequence[tuple[str, Rate, Rate]]) -> Picture:
    shown = rates[: NAMED + 1]
    whole = figure(6.4, 0.9 + 0.36 * len(shown))
    axis: Any = whole.subplots()
    pairs = [each[1:] for each in shown]
    for shift, side, color, name in ((-0.2, 0, COLORS[0], "reference"), (0.2, 1, COLORS[1], "current")):
        shares = [pair[side][0] / max(pair[side][1], 1) for pair in pairs]
        axis.barh(np.arange(len(shown)) + shift, shares, 0.4, color=color, label=name)
    axis.set_yticks(range(len(shown)), ["all", *(name.partition("/")[2] for name, _, _ in shown[1:])], parse_math=False)
    axis.invert_yaxis()
    axis.set(xlim=(0, 1), xlabel="accuracy")
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    return Picture("groups", whole, "Accuracy of the labeled rows, in all and by group.")
