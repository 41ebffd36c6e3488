"""Metrics from outside, added to those of a task."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.data.source import Source
from jaxmodels.errors import UserError
from jaxmodels.tasks.task import METRICS, Batch, Better, Params, Sums, Task, Totals, Whole, divide, rows

Metric = TypeVar("Metric", bound=Callable[..., Any])


def better(direction: Better) -> Callable[[Metric], Metric]:
    """Say of a metric from outside whether a lower ("min") or a higher ("max") value is better, as its decorator."""

    def named(metric: Metric) -> Metric:
        metric.better = direction  # pyright: ignore[reportFunctionMemberAccess]
        return metric

    return named


def measured(task: Task, names: Sequence[str]) -> Task:
    """Return the task with metrics from outside, each named by the last part of its address.

    Raises:
        UserError: the task does not expose its outputs, or two metrics would have one name.
    """
    outputs = task.outputs
    own: dict[str, Any] = {}
    for name in names:
        short = name.rpartition(":")[2]
        if short in own:
            same = [each for each in names if each.rpartition(":")[2] == short]
            raise UserError(
                f"got eval.metrics {' and '.join(same)}, all of which would be named {short}, expected names that "
                "differ, try one of them"
            )
        own[short] = METRICS.find(name)
    if not own:
        return task
    if outputs is None:
        raise UserError(
            f"got eval.metrics {' '.join(names)} for a task that does not give its model's outputs, expected none, "
            "try --task classification"
        )

    def check_free(found: Any) -> None:
        if taken := sorted(set(found) & set(own)):
            raise UserError(f"got a metric {taken[0]!r}, which the task has already, expected another name")

    def each_row(params: Params, stats: Params, batch: Batch) -> Sums:
        out = outputs(params, stats, batch)
        return {name: sums_of_rows(name, metric(out, batch), batch) for name, metric in own.items()}

    def metrics(params: Params, stats: Params, batch: Batch) -> Sums:
        found = task.metrics(params, stats, batch)
        check_free(found)
        added = each_row(params, stats, batch)
        return {**found, **{name: (total.sum(), weight.sum()) for name, (total, weight) in added.items()}}

    def summarize(totals: Totals, classes: Sequence[str]) -> dict[str, float]:
        theirs = {name: total for name, total in totals.items() if name not in own}
        found = task.summarize(theirs, classes)
        check_free(found)
        return {**found, **divide({name: totals[name] for name in own if name in totals})}

    directions = {name: metric.better for name, metric in own.items() if hasattr(metric, "better")}
    whole = None if task.whole is None else _also_kept(task.whole, each_row, check_free)
    return dataclasses.replace(
        task, metrics=metrics, summarize=summarize, whole=whole, better={**task.better, **directions}
    )


_ADDED = "eval.metrics "
"""Prefix of the names under which the sums and weights of each row are kept; no other name has a space."""


def _also_kept(whole: Whole, each_row: Callable[..., Sums], check_free: Callable[[Any], None]) -> Whole:
    """Return how a whole set is measured, with the sums of each row's own metrics kept beside the rest."""

    def keep(params: Params, stats: Params, batch: Batch) -> dict[str, jax.Array]:
        added = each_row(params, stats, batch)
        pairs = {f"{_ADDED}{name}": jnp.stack(jnp.broadcast_arrays(*pair), -1) for name, pair in added.items()}
        return {**whole.keep(params, stats, batch), **pairs}

    def sums(kept: Mapping[str, np.ndarray], source: Source) -> dict[str, tuple[Any, float]]:
        found = whole.sums({name: x for name, x in kept.items() if not name.startswith(_ADDED)}, source)
        check_free(found)
        for name, x in kept.items():
            if name.startswith(_ADDED):
                total, weight = x.astype(np.float64).sum(0)
                found = {**found, name.removeprefix(_ADDED): (total, float(weight))}
        return found

    return whole._replace(keep=keep, sums=sums)


def sums_of_rows(name: str, found: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Sum and count values (B, …) of a metric, or values and their weights, in each example that counts: both (B,)."""
    parts: Sequence[Any] = found if isinstance(found, tuple) else (found,)
    counts = rows(batch)
    shapes: list[Any] = [getattr(part, "shape", None) for part in parts]
    if not 1 <= len(parts) <= 2 or None in shapes or shapes[0] != shapes[-1] or shapes[0][:1] != counts.shape:
        given = [
            type(part).__name__ if shape is None else f"shape {shape}"
            for part, shape in zip(parts, shapes, strict=True)
        ]
        raise UserError(
            f"got {' and '.join(given) or '()'} from metric {name!r}, expected a value for each of the {len(counts)} "
            "examples, or values and their weights, try a function of outputs and batch that returns an array of them"
        )
    values, weights = parts if len(parts) == 2 else (parts[0], jnp.ones(shapes[0]))
    weights = weights * counts.reshape(-1, *(1,) * (values.ndim - 1))
    within = tuple(range(1, values.ndim))
    return (jnp.where(weights > 0, values, 0) * weights).sum(within), weights.sum(within)
