"""Metrics over a held-out set: sums on the device, divided once at the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxmodels.tasks.task import Batch, Sums, Task

Evaluate = Callable[[Any, Any, Iterable[Batch]], dict[str, float] | None]

_IGNORED = ("labels", "targets")


def build(
    task: Task,
    mesh: Mesh,
    stop: Callable[[], bool] = lambda: False,
    *,
    classes: Sequence[str] = (),
    groups: Sequence[str] = (),
) -> Evaluate:
    """`evaluate(params, stats, batches) -> metrics`; None if `stop` said so before the end.

    The result depends on the examples alone, not on batch size or device count: rows that pad the last batch are
    ignored, and sums are divided once. Batches with a `group` (B,) give each metric for each of `groups` too, and the
    largest difference between them (`gap/…`).
    """

    @jax.jit
    def add(params: Any, stats: Any, batch: Batch) -> dict[str, Sums]:
        def of(group: jax.Array) -> Sums:
            return task.metrics(params, stats, only(batch, batch["group"] == group))

        found = {"": task.metrics(params, stats, batch)}
        if groups and "group" in batch:
            # only labels differ from group to group, so the network runs once
            found["group"] = jax.vmap(of)(jnp.arange(len(groups)))
        return found

    def evaluate(params: Any, stats: Any, batches: Iterable[Batch]) -> dict[str, float] | None:
        totals: dict[str, Any] = {}

        def take(sums: Any) -> None:
            # on the host, in double precision: a float32 count stops counting at 2^24
            nonlocal totals
            new = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(sums))
            totals = jax.tree.map(np.add, totals, new) if totals else new

        with jax.set_mesh(mesh):
            ahead = None
            for batch in batches:
                sums = add(params, stats, batch)
                if ahead is not None:
                    take(ahead)  # while the device works on the batch just dispatched
                ahead = sums
                if stop():
                    return None
            if ahead is not None:
                take(ahead)
        if not totals:
            return {}
        found = task.summarise(totals[""], classes)
        if "group" in totals:
            found |= compare(task, totals["group"], classes, groups)
        first = [name for name in ("loss", "accuracy") if name in found]  # jax sorts the names
        return {name: found[name] for name in (*first, *found)}

    return evaluate


def only(batch: Batch, rows: jax.Array) -> Batch:
    """The batch with the labels of other rows (B,) ignored."""
    return {
        name: jnp.where(rows.reshape(-1, *(1,) * (x.ndim - 1)), x, -1) if name in _IGNORED else x
        for name, x in batch.items()
    }


def compare(task: Task, totals: Mapping[str, Any], classes: Sequence[str], groups: Sequence[str]) -> dict[str, float]:
    """Each metric of each group that has examples, and the largest difference between two of them."""
    each = {}
    for index, name in enumerate(groups):
        own = {metric: (total[index], count[index]) for metric, (total, count) in totals.items()}
        if any(count > 0 for _, count in own.values()):
            each[name] = task.summarise(own, classes)
    found = {f"group/{name}/{metric}": value for name, values in each.items() for metric, value in values.items()}
    for metric in next(iter(each.values()), {}):
        values = [value[metric] for value in each.values() if math.isfinite(value.get(metric, math.nan))]
        if len(values) > 1:
            found[f"gap/{metric}"] = max(values) - min(values)
    return found
