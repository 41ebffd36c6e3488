"""Loads batches onto devices, from a source and an order."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxmodels.data.order import Order
from jaxmodels.data.source import Source, spec
from jaxmodels.errors import UserError

Batch = dict[str, Any]


class Loader:
    """The batches of an order. Each process reads only the rows that its own devices hold.

    With `shardings` (one for each array of a batch) batches are global `jax.Array`s; with None they are NumPy arrays of
    the whole batch.
    """

    def __init__(
        self, source: Source, order: Order, shardings: Mapping[str, NamedSharding] | None = None, *, prefetch: int = 2
    ) -> None:
        if prefetch < 0:
            raise UserError(f"got data.prefetch {prefetch}, expected 0 or more, try --data.prefetch 2")
        self.source, self.order, self.shardings, self.prefetch = source, order, shardings, prefetch
        self.spec = spec(source, order.batch_size)
        self.rows = np.arange(order.batch_size)
        if shardings is not None:
            if missing := self.spec.keys() - shardings.keys():
                raise ValueError(f"got shardings for {sorted(shardings)}, expected {sorted(missing)} too")
            held = [rows_held(shardings[name], x.shape) for name, x in self.spec.items()]
            self.rows = np.unique(np.concatenate(held))

    def abstract(self) -> dict[str, jax.ShapeDtypeStruct]:
        """A global batch as shapes, dtypes and shardings."""
        where = self.shardings or {}
        return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where.get(name)) for name, x in self.spec.items()}

    def batch(self, step: int) -> Batch:
        """Make batch `step` now."""
        return self._place(self.local(step))

    def local(self, step: int) -> dict[str, np.ndarray]:
        """Return the rows of batch `step` that this process holds (`self.rows`), in host memory."""
        return self.source.batch(self.order.indices(step)[self.rows], self.order.epochs(step)[self.rows])

    def iterate(self, start: int, stop: int) -> Generator[Batch, None, None]:
        """Yield batches `start ... stop - 1`, of which one thread prepares up to `prefetch` in advance."""
        return ahead(self.batch, range(start, stop), self.prefetch)

    def once(self, batches: int | None = None) -> Generator[Batch, None, None]:
        """Yield each example once and in order; the last batch is padded with rows of `weight` (B,) 0."""
        total = -(-len(self.source) // self.order.batch_size)
        count = total if batches is None else min(batches, total)
        return ahead(self._in_order, range(count), self.prefetch)

    def _in_order(self, k: int) -> Batch:
        indices = k * self.order.batch_size + self.rows
        missing = indices >= len(self.source)
        local = self.source.batch(np.where(missing, 0, indices), np.zeros_like(indices))
        return self._place({**local, "weight": (~missing).astype(np.float32)})

    def _place(self, local: dict[str, np.ndarray]) -> Batch:
        if self.shardings is None:
            return dict(local)
        return {
            name: self._array(x, (self.order.batch_size, *x.shape[1:]), self._sharding(name))
            for name, x in local.items()
        }

    def _sharding(self, name: str) -> NamedSharding:
        """Return the sharding of an array of a batch; the weight, which no source has, is sharded as the other rows."""
        shardings = self.shardings or {}
        if name in shardings:
            return shardings[name]
        other = next(iter(shardings.values()))
        return NamedSharding(other.mesh, PartitionSpec(*other.spec[:1]))

    def _array(self, local: np.ndarray, shape: tuple[int, ...], sharding: NamedSharding) -> jax.Array:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            first, *others = index or (slice(None),)
            begin, end, _ = first.indices(shape[0])
            at = int(np.searchsorted(self.rows, begin))
            return local[(slice(at, at + end - begin), *others)]

        return jax.make_array_from_callback(shape, sharding, part)


def rows_held(sharding: NamedSharding, shape: tuple[int, ...]) -> np.ndarray:
    """Return which rows (indices along the first dimension) this process's devices hold.

    Raises: UserError if the sharding does not divide the batch.
    """
    first = sharding.spec[0] if len(sharding.spec) else None
    names = (first,) if isinstance(first, str) else tuple(first or ())
    shards = int(np.prod([sharding.mesh.shape[name] for name in names], dtype=np.int64))
    if shape[0] % shards:
        near = -(-shape[0] // shards) * shards
        raise UserError(
            f"got a batch of {shape[0]} over {shards} shards ({' x '.join(names)}), expected a multiple of {shards}, "
            f"try --data.batch-size {near}"
        )
    held = {
        index[0].indices(shape[0])[:2] for index in sharding.addressable_devices_indices_map(shape).values() if index
    }
    return np.unique(np.concatenate([np.arange(*ends) for ends in held]))


def ahead(make: Callable[[int], Batch], steps: range, depth: int) -> Generator[Batch, None, None]:
    """Yield `make(step)` for each step, made by one thread at most `depth` results ahead; 0: without a thread.

    Exceptions of the thread are raised here; closing the iterator ends the thread.
    """
    if depth == 0:
        yield from map(make, steps)
        return
    # not a daemon thread: one inside JAX when the interpreter exits aborts the process, and the exit code is lost
    pool = ThreadPoolExecutor(1, thread_name_prefix="jaxmodels-data")
    made: collections.deque[Future[Batch]] = collections.deque()
    waiting = iter(steps)
    try:
        for step in itertools.islice(waiting, depth):
            made.append(pool.submit(make, step))
        while made:
            batch = made.popleft().result()
            for step in itertools.islice(waiting, 1):
                made.append(pool.submit(make, step))
            yield batch
    finally:
        pool.shutdown(cancel_futures=True)
