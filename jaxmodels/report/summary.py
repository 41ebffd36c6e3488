"""Tables of what was run and what came out, with a column for each run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxmodels import config as configs
from jaxmodels import tasks
from jaxmodels.config import Config
from jaxmodels.errors import UserError
from jaxmodels.models.families import family_of
from jaxmodels.report.pieces import Piece, Table
from jaxmodels.train import metrics
from jaxmodels.train.saved import Evaluation, Kept, imported, read_kept

BY_CLASS = ("precision", "recall", "f1")
ELSEWHERE = ("data.dir", "data.prefetch", "metrics.", "profile.")
"""Fields whose differences are not worth a row."""


@dataclass(frozen=True)
class Column:
    """What the tables show of one run."""

    name: str
    run: Path
    cfg: Config
    origin: Mapping[str, Any]
    rows: Sequence[Mapping[str, float]]
    evaluation: Evaluation | None
    """The run with its evaluation data; None if its checkpoint or data are missing."""
    kept: Kept
    """Facts about the data that the run keeps, since the data may be gone."""
    values: Mapping[str, float]
    """Metrics of the evaluation."""


def column(name: str, run: Path, evaluation: Evaluation | None, values: Mapping[str, float]) -> Column:
    """Collect the column of a run."""
    cfg, origin = configs.read(run)
    try:
        kept = read_kept(run)
    except UserError:  # damaged: the page does without it
        kept = Kept()
    return Column(name, run, cfg, origin, metrics.read(run), evaluation, kept, values)


def facts(columns: Sequence[Column]) -> list[Piece]:
    """Tabulate what was run, and in which config fields several runs differ."""
    each = [described(c) for c in columns]
    found: list[Piece] = [Table(("", *(c.name for c in columns)), [(key, *(e[key] for e in each)) for key in each[0]])]
    fields = [configs.flatten(c.cfg) for c in columns]
    names = list(dict.fromkeys(name for values in fields for name in values))
    differ = [name for name in names if len({repr(v.get(name)) for v in fields}) > 1 and not name.startswith(ELSEWHERE)]
    if differ:
        rows = [(name, *(str(v.get(name, "")) for v in fields)) for name in differ]
        found.append(Table(("field", *(c.name for c in columns)), rows, "Where the configs differ."))
    return found


def described(c: Column) -> dict[str, str]:
    """Describe one run in a few rows."""
    networks = tasks.build(c.cfg.task, c.cfg.model, c.cfg.data).networks
    sizes = [f"{model.count():,}" + (f" ({name})" if len(networks) > 1 else "") for name, model in networks.items()]
    done = int(c.rows[-1]["step"]) if c.rows else c.evaluation.run.step if c.evaluation else None
    steps = f"{'' if done is None else f'{done:,} of '}{c.cfg.train.steps:,}"
    minutes = training_minutes(c.rows)
    versions = ", ".join(f"{name} {version}" for name, version in c.origin.get("versions", {}).items())
    source = f"{c.cfg.data.kind} {c.cfg.data.name}".strip()
    about = {
        "model": family_of(c.cfg.model).name,
        "parameters": ", ".join(sizes),
        "task": c.cfg.task.kind,
        "trained on": c.kept.train or source,
        "evaluated on": c.evaluation.source.describe() if c.evaluation else c.kept.eval or source,
        "steps": f"{steps}, batches of {c.cfg.data.batch_size}",
        "training": "not known" if minutes is None else f"{minutes:.1f} minutes of steps",
        "checkpoint": f"step {c.evaluation.run.step:,}"
        if c.evaluation
        else "none that can be opened here with its data",
        "config": str(c.origin.get("file") or "not known"),
        "versions": versions or "not known",
        "commit": str(c.origin.get("commit") or "not known"),
    }
    if imported(c.run, c.kept):
        about |= dict.fromkeys(("trained on", "evaluated on", "steps", "training"), "–")
        about |= {"trained on": "not here: imported", "checkpoint": "the weights as they were imported"}
    return about


def training_minutes(rows: Sequence[Mapping[str, float]]) -> float | None:
    """Sum the minutes of steps alone, without compiling and evaluating; None if their speed was not measured."""
    timed = [(row["step"], row["perf/step_seconds"]) for row in rows if "perf/step_seconds" in row]
    if not timed:
        return None
    before = [0, *(step for step, _ in timed)]
    return sum((step - last) * seconds for (step, seconds), last in zip(timed, before, strict=False)) / 60


def results(columns: Sequence[Column]) -> list[Piece]:
    """Tabulate the metrics, then those of each class and of each group."""
    names = dict.fromkeys(name for c in columns for name in c.values)
    plain = [name for name in names if name.count("/") == 1]
    rows = [(name.removeprefix("eval/"), *(number(c.values.get(name)) for c in columns)) for name in plain]
    found: list[Piece] = [Table(("metric", *(c.name for c in columns)), rows)] if rows else []
    for c in columns:
        whose = f" of {c.name}" if len(columns) > 1 else ""
        if classes := by_class(c.values):
            head = ("class", *BY_CLASS)
            lines = [(name, *(number(values.get(kind)) for kind in BY_CLASS)) for name, values in classes.items()]
            found.append(Table(head, lines, f"By class{whose}."))
        if groups := by_group(c.values):
            kinds = list(dict.fromkeys(kind for values in groups.values() for kind in values))
            lines = [(name, *(number(values.get(kind)) for kind in kinds)) for name, values in groups.items()]
            found.append(Table(("group", *kinds), lines, f"By group{whose}, and the largest difference."))
    return found


def by_class(values: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Collect class -> precision, recall and F1, from names such as eval/f1/CLASS."""
    found: dict[str, dict[str, float]] = {}
    for name, value in values.items():
        parts = name.split("/", 2)
        if len(parts) == 3 and parts[1] in BY_CLASS:
            found.setdefault(parts[2], {})[parts[1]] = value
    return found


def by_group(values: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Collect group -> metrics, from names such as eval/group/GROUP/METRIC, with the gaps between groups last."""
    found: dict[str, dict[str, float]] = {}
    gaps = {name.removeprefix("eval/gap/"): value for name, value in values.items() if name.startswith("eval/gap/")}
    for name, value in values.items():
        group, _, metric = name.removeprefix("eval/group/").partition("/")
        if name.startswith("eval/group/") and "/" not in metric:  # too many for single classes of each group
            found.setdefault(group, {})[metric] = value
    if gaps and found:
        found["largest difference"] = {name: value for name, value in gaps.items() if "/" not in name}
    return found


def number(value: float | None) -> str:
    """Format a metric."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
