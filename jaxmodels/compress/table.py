"""Compare runs: the bytes of their weights, peak memory, speed on this hardware, and quality."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxmodels.compress.runs import count, zeros
from jaxmodels.errors import UserError
from jaxmodels.parallel.hardware import needed
from jaxmodels.parallel.mesh import Mesh, make_mesh
from jaxmodels.train import evaluate
from jaxmodels.train.saved import load_run

ROUNDS = 9
FASTER = 1.05
"""How much faster a run must be to be called so: timings of one program differ by as much."""


class Row(NamedTuple):
    """What is known of a run."""

    run: str
    bytes: int
    """Of parameters and batch statistics as they are stored."""
    parameters: int
    zeros: int
    speed: float
    """Tokens or examples a second through its evaluation, the median of rounds in which all runs take turns."""
    faster: float
    """Its speed divided by that of the first run."""
    quality: float
    """The value of `metric`."""
    peak: int
    """Bytes of the memory of its evaluation of a batch on a device at their peak, by the compiler."""


class Table(NamedTuple):
    """Rows of runs of one task on the same examples."""

    unit: str
    metric: str
    better: str | None
    """Whether a lower ("min") or a higher ("max") value of it is better; None: the task does not say."""
    device: str
    rows: list[Row]


def compare(directories: Sequence[Path], batches: int) -> Table:
    """Measure runs on the first batches that the first one is evaluated on.

    Raises:
        UserError: a directory is no run, or the runs are not of one task and kind of data.
    """
    runs = [load_run(each) for each in directories]
    first = runs[0]
    for run, each in zip(runs, directories, strict=True):
        if run.config.task != first.config.task or run.config.data != first.config.data:
            raise UserError(
                f"got {each}, which has another task or other data than {directories[0]}, expected runs of one task on "
                "the same data, try each with jaxmodels eval"
            )
    mesh, evaluation = make_mesh(Mesh()), first.evaluation()
    given = list(evaluation.loader(mesh).once(batches))
    times: list[list[float]] = [[] for _ in runs]
    found, programs, peaks = [], [], []
    for run in runs:
        task = run.task
        source = evaluation.source
        measure = evaluate.build_evaluate(task, mesh, classes=source.class_names, source=source)
        found.append(measure(run.params, run.stats, given) or {})
        program = jax.jit(task.metrics)
        with jax.set_mesh(mesh):
            compiled = program.lower(run.params, run.stats, given[0]).compile()
            jax.block_until_ready(compiled(run.params, run.stats, given[0]))
        programs.append((compiled, run))
        peaks.append(needed(compiled.memory_analysis(), jax.default_backend()))
    for _ in range(ROUNDS):
        for (program, run), own in zip(programs, times, strict=True):
            began = time.perf_counter()
            with jax.set_mesh(mesh):
                jax.block_until_ready(program(run.params, run.stats, given[0]))
            own.append(time.perf_counter() - began)
    units = first.task.units(len(next(iter(given[0].values()))))
    speeds = [units / statistics.median(own) for own in times]
    wanted = first.config.eval.metric.removeprefix("eval/")
    metric = wanted if wanted in found[0] else "loss"
    rows = [
        Row(
            str(each),
            nbytes((run.params, run.stats)),
            count(run.params),
            zeros(run.params),
            speed,
            speed / speeds[0],
            float(values.get(metric, np.nan)),
            highest,
        )
        for each, run, speed, values, highest in zip(directories, runs, speeds, found, peaks, strict=True)
    ]
    better = first.task.better_of(metric)
    return Table(first.task.unit, metric, better, f"{mesh.size} {mesh.devices.flat[0].device_kind}", rows)


def best(rows: Sequence[Row], better: str | None, cost: Callable[[Row], float]) -> list[Row]:
    """Return the Pareto front, by cost: those that no other one matches at a lower cost."""
    good = lambda row: -row.quality if better == "min" else row.quality  # noqa: E731
    front: list[Row] = []
    for row in sorted(rows, key=lambda row: (cost(row), -good(row))):
        if np.isfinite(row.quality) and (not front or good(row) > good(front[-1])):
            front.append(row)
    return front


def nbytes(tree: Any) -> int:
    """Count the bytes of arrays."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def formatted(table: Table) -> str:
    """Format a table, and say which runs are not faster than the first one."""
    heads = ("run", "MB", "peak MB", "parameters", "zeros", f"{table.unit}/s", "×", table.metric)
    cells = [heads] + [
        (
            row.run,
            f"{row.bytes / 1e6:.2f}",
            f"{row.peak / 1e6:.2f}",
            f"{row.parameters:,}",
            f"{row.zeros / row.parameters:.1%}",
            f"{row.speed:,.0f}",
            f"{row.faster:.2f}",
            f"{row.quality:.6g}",
        )
        for row in table.rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join([f"{row[0]:{widths[0]}}", *(f"{x:>{w}}" for x, w in zip(row[1:], widths[1:], strict=True))])
        for row in cells
    ]
    slow = [row for row in table.rows[1:] if row.faster < FASTER]
    lines += [f"\n{row.run} is not faster than {table.rows[0].run} on {table.device}: {why(row)}" for row in slow]
    return "\n".join(lines)


def why(row: Row) -> str:
    """Say why a smaller model takes as long."""
    if row.bytes < 3 * row.parameters:
        return "codes are turned into numbers before each product; they save memory, and time where that is read"
    if row.zeros > 0.2 * row.parameters:
        return "products with zeros are computed as all others are here; structured pruning removes them"
    return "it computes as much"
