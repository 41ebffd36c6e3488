"""Metrics over a held-out set: sums on the device, divided once at the end."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxmodels.config import Eval
from jaxmodels.data.source import Source
from jaxmodels.errors import UserError, nearest
from jaxmodels.parallel import progress, rules
from jaxmodels.tasks.checks import check_padding
from jaxmodels.tasks.metrics import unique
from jaxmodels.tasks.task import Batch, Better, Sums, Task, Whole

Evaluate = Callable[[Any, Any, Iterable[Batch]], dict[str, float] | None]


def _never() -> bool:
    """Let a supervisor know that the loop has come round; go on."""
    progress.poll()
    return False


def build_evaluate(
    task: Task,
    mesh: Mesh,
    stop: Callable[[], bool] = _never,
    *,
    classes: Sequence[str] = (),
    groups: Sequence[str] = (),
    source: Source | None = None,
) -> Evaluate:
    """Build `evaluate(params, stats, batches) -> metrics`, which returns None if `stop` became true before the end.

    The result depends only on the examples, not on batch size or device count: rows of weight 0, which pad the last
    batch, are ignored, and sums are divided once. If batches have a `group` (B,), each metric is also reported for each
    of `groups`, with the largest difference between them (`gap/…`). `source` gives the batches, for metrics that are
    not of arrays alone.

    `evaluate` raises UserError if nothing in any batch counts, since a mean over nothing is not a number.
    """
    groups = unique(groups)

    @jax.jit
    def add(params: Any, stats: Any, batch: Batch) -> dict[str, Sums]:
        def of(group: jax.Array) -> Sums:
            return task.metrics(params, stats, mask_rows(batch, batch["group"] == group))

        found = {"": task.metrics(params, stats, batch)}
        if groups and "group" in batch:
            # only weights differ between groups, so the network runs once
            found["group"] = jax.vmap(of)(jnp.arange(len(groups)))
        return found

    # every process measures the set as a whole, so each needs all of it
    @functools.partial(jax.jit, out_shardings=rules.sharding(mesh, ()))
    def keep(params: Any, stats: Any, batch: Batch) -> dict[str, jax.Array]:
        assert task.whole is not None
        return {**task.whole.keep(params, stats, batch), **({"group": batch["group"]} if "group" in batch else {})}

    def evaluate(params: Any, stats: Any, batches: Iterable[Batch]) -> dict[str, float] | None:
        totals: dict[str, Any] = {}
        kept: list[dict[str, np.ndarray]] = []

        def take(found: Any) -> None:
            nonlocal totals
            found = jax.device_get(found)
            if task.whole is not None:
                kept.append({name: x[found["weight"] > 0] for name, x in found.items()})
                return
            # on the host in double precision, because a float32 count stops at 2^24
            new = jax.tree.map(lambda x: np.asarray(x, np.float64), found)
            totals = jax.tree.map(np.add, totals, new) if totals else new

        with jax.set_mesh(mesh):
            ahead = None
            for batch in batches:
                found = (add if task.whole is None else keep)(params, stats, batch)
                if ahead is not None:
                    take(ahead)  # while the device works on the batch just dispatched
                ahead = found
                if stop():
                    return None
            if ahead is not None:
                take(ahead)
        if task.whole is not None and kept:
            progress.phase("idle")  # batches do not say how long this takes
            every = {name: np.concatenate([x[name] for x in kept]) for name in kept[0]}
            totals = sum_pairs(task.whole, every, groups, source)
        if not totals or not totals[""]["loss"][1] > 0:
            raise UserError(
                f"got nothing to evaluate, expected {task.needs} in the data, try jaxmodels data inspect to see it"
            )
        found = task.summarize(totals[""], classes)
        if "group" in totals:
            found |= compare_groups(task, totals["group"], classes, groups)
        return {name: found[name] for name in _first(found)}

    return evaluate


def _first(names: Iterable[str]) -> list[str]:
    """Sort names: loss and accuracy first, then the order that jax sorted the others into."""
    return sorted(names, key=lambda name: ("loss", "accuracy", name).index(name))


def mask_rows(batch: Batch, rows: jax.Array) -> Batch:
    """Return the batch with weight 0 for all except these rows (B,)."""
    return {**batch, "weight": jnp.where(rows, batch.get("weight", 1.0), 0.0)}


def sum_pairs(
    whole: Whole, kept: Mapping[str, np.ndarray], groups: Sequence[str], source: Source | None
) -> dict[str, Any]:
    """Sum metrics that compare examples with each other: over all examples, and over each group's own."""
    sums: Any = whole.sums
    found: dict[str, Any] = {"": sums(kept, source)}
    if groups and "group" in kept:
        each = [sums({name: x[kept["group"] == g] for name, x in kept.items()}, source) for g in range(len(groups))]
        found["group"] = jax.tree.map(lambda *x: np.stack(x), *each)
    return found


def compare_groups(
    task: Task, totals: Mapping[str, Any], classes: Sequence[str], groups: Sequence[str]
) -> dict[str, float]:
    """Return each metric of each group that has examples, and the largest difference between two groups."""
    each = {}
    for index, name in enumerate(groups):
        own = {metric: (total[index], count[index]) for metric, (total, count) in totals.items()}
        if any(count > 0 for _, count in own.values()):
            each[name] = task.summarize(own, classes)
    found = {f"group/{name}/{metric}": value for name, values in each.items() for metric, value in values.items()}
    for metric in dict.fromkeys(metric for values in each.values() for metric in values):
        values = [value[metric] for value in each.values() if math.isfinite(value.get(metric, math.nan))]
        if len(values) > 1:
            found[f"gap/{metric}"] = max(values) - min(values)
    return found


def metric_sums(task: Task, mesh: Mesh, batch: Mapping[str, jax.ShapeDtypeStruct]) -> Sums:
    """Return the shapes of the metrics' sums, from the shapes of a batch alone.

    Raises:
        UserError: the task's metrics are no sums with their counts.
    """
    params = {network: model.shapes() for network, model in task.networks.items()}
    with jax.set_mesh(mesh):
        return jax.eval_shape(task.metrics, params, jax.eval_shape(task.stats), dict(batch))


def metric_names(
    task: Task,
    mesh: Mesh,
    batch: Mapping[str, jax.ShapeDtypeStruct],
    *,
    classes: Sequence[str] = (),
    groups: Sequence[str] = (),
) -> list[str]:
    """Return the names of the metrics that an evaluation may report, from the shapes of its batches alone."""
    ones = {name: (np.ones(total.shape), 1.0) for name, (total, _) in metric_sums(task, mesh, batch).items()}
    found = _first([*task.summarize(ones, classes), *(() if task.whole is None else task.whole.names)])
    if "group" in batch:
        each = [f"group/{group}/{name}" for group in unique(groups) for name in found]
        found += [*each, *(f"gap/{name}" for name in found)]
    return found


def check_metric(
    cfg: Eval,
    task: Task,
    mesh: Mesh,
    batch: Callable[[], Mapping[str, jax.ShapeDtypeStruct]],
    *,
    classes: Sequence[str] = (),
    groups: Sequence[str] = (),
    outside: bool = False,
) -> None:
    """Refuse an `eval.metric` that evaluations do not report, an `eval.mode` of the wrong direction, and metrics from
    outside that are no sums.

    `batch` returns the shapes of a batch; it is not called for the loss of our own tasks (`outside` is false), which
    all have it.

    Raises:
        UserError: the metric or the mode is wrong, or what the task measures.
    """
    metric = cfg.metric
    if metric == "eval/loss":
        check_mode(cfg, "min")
    if outside:
        metric_sums(task, mesh, batch())
        if task.whole is None:
            with jax.set_mesh(mesh):
                check_padding(task, batch())
    if metric == "eval/loss" and outside:
        return  # without their summary: a task's own may not take numbers that are made up
    if metric == "eval/loss" and not cfg.metrics:
        return
    found = metric_names(task, mesh, batch(), classes=classes, groups=groups)
    whole = [f"eval/{name}" for name in found]
    if metric in whole:
        check_mode(cfg, better_of(task, metric.removeprefix("eval/"), groups))
        return
    short = [name for name in whole if name.count("/") == 1]
    near = f", did you mean 'eval/{metric}'?" if metric in found else nearest(metric, whole)
    raise UserError(f"got eval.metric {metric!r}, expected one of {', '.join(short)}{near}")


def better_of(task: Task, metric: str, groups: Sequence[str] = ()) -> Better | None:
    """Return whether a lower or a higher value of a reported metric is better; None if its task does not say."""
    if metric.startswith("gap/"):
        return "min"
    own = (f"group/{group}/" for group in unique(groups))
    return task.better_of(next((metric.removeprefix(each) for each in own if metric.startswith(each)), metric))


def check_mode(cfg: Eval, right: Better | None) -> None:
    """Refuse an `eval.mode` of the wrong direction, or the default where the right one is unknown."""
    if right is None and cfg.mode is None:
        raise UserError(
            f"got eval.metric {cfg.metric}, which may be better lower or higher, expected a metric that says so by "
            "Task.better or, of eval.metrics, by the decorator jaxmodels.tasks.better, try --eval.mode min or max"
        )
    mode = cfg.mode or "min"
    if right not in (None, mode):
        raise UserError(f"got eval.mode {mode} for eval.metric {cfg.metric}, expected {right}, try --eval.mode {right}")
