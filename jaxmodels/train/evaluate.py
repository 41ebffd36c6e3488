"""Metrics over a held-out set: sums on the device, divided once at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.sharding import Mesh

from jaxmodels.tasks.task import Batch, Sums, Task, divide

Evaluate = Callable[[Any, Any, Iterable[Batch]], dict[str, float] | None]


def build(task: Task, mesh: Mesh, stop: Callable[[], bool] = lambda: False) -> Evaluate:
    """`evaluate(params, stats, batches) -> metrics`; None if `stop` said so before the end.

    The result depends on the examples alone, not on batch size or device count: rows that pad the last batch are
    ignored, and sums are divided once.
    """

    add = jax.jit(task.metrics)

    def evaluate(params: Any, stats: Any, batches: Iterable[Batch]) -> dict[str, float] | None:
        totals: dict[str, tuple[float, float]] = {}

        def take(sums: Sums) -> None:
            # on the host, in double precision: a float32 count stops counting at 2^24
            for name, (total, count) in jax.device_get(sums).items():
                before = totals.get(name, (0.0, 0.0))
                totals[name] = (before[0] + float(total), before[1] + float(count))

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
        return task.summarise(divide(totals)) if totals else {}

    return evaluate
