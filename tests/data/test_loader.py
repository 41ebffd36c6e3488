from __future__ import annotations

import threading
import time
from typing import Any, ClassVar

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxmodels.data import Loader, Order
from jaxmodels.data.source import Windows
from jaxmodels.data.texts import Rows
from jaxmodels.errors import UserError

T = 8


def windows(split: Any = "train", n: int = 1003) -> Windows:
    return Windows([np.arange(n, dtype=np.uint16)], T, split=split, label="numbers")


def shardings(*spec: Any, **sizes: int) -> dict[str, Any]:
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    return dict.fromkeys(("tokens", "targets"), NamedSharding(mesh, PartitionSpec(*spec)))


class OneProcess:
    """A sharding as the process sees it that owns only some of the devices."""

    def __init__(self, whole: Any, process: int, processes: int) -> None:
        devices = list(whole.mesh.devices.flat)
        share = len(devices) // processes
        self.spec, self.mesh, self._whole = whole.spec, whole.mesh, whole
        self._own = devices[process * share : (process + 1) * share]

    def addressable_devices_indices_map(self, shape):
        return {d: i for d, i in self._whole.devices_indices_map(shape).items() if d in self._own}


@pytest.mark.parametrize("processes", [2, 4])
def test_the_rows_of_all_processes_are_the_batch(processes):
    source = windows()
    order = Order(len(source), 16, 0)
    whole = Loader(source, order)
    parts = []
    for p in range(processes):
        views: Any = {k: OneProcess(s, p, processes) for k, s in shardings("data", data=8).items()}
        parts.append(Loader(source, order, views))
        assert len(parts[-1].rows) == 16 // processes
    for step in (0, 7, 100):
        expected = whole.batch(step)
        for name in ("tokens", "targets"):
            rows = np.concatenate([part.local(step)[name] for part in parts])
            assert np.array_equal(rows, expected[name])


def test_a_process_reads_only_its_own_rows():
    class Watched(Windows):
        read: ClassVar[list[np.ndarray]] = []

        def batch(self, indices, epochs):
            self.read.append(indices)
            return super().batch(indices, epochs)

    source = Watched([np.arange(1003, dtype=np.uint16)], T, split="train", label="numbers")
    order = Order(len(source), 16, 0)
    views: Any = {k: OneProcess(s, 1, 4) for k, s in shardings("data", data=8).items()}
    loader = Loader(source, order, views)
    source.read.clear()
    loader.local(3)
    assert [x.tolist() for x in source.read] == [order.indices(3)[4:8].tolist()]


@pytest.mark.parametrize(
    "spec, sizes",
    [
        (("data",), {"data": 8}),
        ((("data", "fsdp"),), {"data": 2, "fsdp": 4}),
        (("data", "context"), {"data": 4, "context": 2}),
        (("data",), {"data": 4, "tensor": 2}),
        ((), {"tensor": 8}),
    ],
)
def test_device_arrays_hold_what_the_host_read(spec, sizes):
    source = windows()
    order = Order(len(source), 16, 0)
    placed = shardings(*spec, **sizes)
    plain, sharded = Loader(source, order).batch(5), Loader(source, order, placed).batch(5)
    for name, x in sharded.items():
        assert isinstance(x, jax.Array) and x.sharding == placed[name]
        assert np.array_equal(x, plain[name])


def test_a_batch_that_the_mesh_does_not_divide_is_refused():
    source = windows()
    with pytest.raises(UserError, match=r"got a batch of 12 over 8 shards \(data\), .* try --data.batch-size 16"):
        Loader(source, Order(len(source), 12, 0), shardings("data", data=8))


@pytest.mark.parametrize("prefetch", [0, 1, 3])
@pytest.mark.parametrize("start", [0, 37])
def test_prefetched_batches_are_the_synchronous_ones(prefetch, start):
    source = windows()
    loader = Loader(source, Order(len(source), 16, 0), prefetch=prefetch)
    seen = list(loader.iterate(start, start + 20))
    assert len(seen) == 20
    fresh = Loader(source, Order(len(source), 16, 0))
    for k, batch in enumerate(seen):
        expected = fresh.batch(start + k)
        assert all(np.array_equal(batch[name], expected[name]) for name in expected)


def threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("jaxmodels-data")]


class Slow(Rows):
    """Counts what was read, and fails at the sixth batch if told to."""

    def __init__(self, fail: bool = False) -> None:
        arrays = {"inputs": np.zeros((100, 2), np.float32), "labels": np.zeros(100, np.int32)}
        super().__init__(arrays, split="train", label="slow")
        self.fail, self.reads, self.by = fail, 0, set()

    def batch(self, indices, epochs):
        self.by.add(threading.current_thread().name)
        self.reads += 1
        if self.fail and self.reads > 6:
            raise OSError("the disk is gone")
        return super().batch(indices, epochs)


@pytest.mark.parametrize("prefetch", [1, 2, 4])
def test_the_thread_is_at_most_prefetch_batches_ahead(prefetch):
    source = Slow()
    loader = Loader(source, Order(100, 10, 0), prefetch=prefetch)
    source.reads = 0
    batches = loader.iterate(0, 50)
    for taken in range(1, 6):
        next(batches)
        deadline = time.monotonic() + 60
        while source.reads < taken + prefetch and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.01)
        assert source.reads == taken + prefetch
    batches.close()


def test_what_the_thread_raises_is_raised_in_the_loop():
    source = Slow(fail=True)
    loader = Loader(source, Order(100, 10, 0))
    taken = 0
    with pytest.raises(OSError, match="the disk is gone"):
        for _ in loader.iterate(0, 50):
            taken += 1
    assert taken == 5  # one read was the loader's own, for the shapes
    assert any(name.startswith("jaxmodels-data") for name in source.by) and not threads()


def test_leaving_the_loop_ends_the_thread():
    loader = Loader(Slow(), Order(100, 10, 0))
    batches = loader.iterate(0, 10**9)
    next(batches)
    (thread,) = threads()
    assert not thread.daemon  # in JAX while the interpreter ends, it would abort the process
    batches.close()
    assert not threads()


def test_an_exception_in_the_loop_ends_the_thread():
    loader = Loader(Slow(), Order(100, 10, 0))
    with pytest.raises(ZeroDivisionError):
        for _ in loader.iterate(0, 10**9):
            _ = 1 / 0
    assert not threads()


@pytest.mark.parametrize("batch_size", [1, 7, 16, 500])
def test_once_gives_each_example_once_in_order_and_padding_has_no_weight(batch_size):
    n = 100
    numbers = np.arange(n, dtype=np.int32)
    source = Rows({"inputs": numbers[:, None], "labels": numbers}, split="eval", label="numbers")
    loader = Loader(source, Order(n, batch_size, 0))
    batches = list(loader.once())
    assert all(len(b["labels"]) == batch_size for b in batches)
    labels = np.concatenate([b["labels"] for b in batches])
    inputs = np.concatenate([b["inputs"][:, 0] for b in batches])
    assert np.array_equal(labels[:n], np.arange(n)) and np.array_equal(inputs[:n], np.arange(n))
    assert np.array_equal(np.concatenate([b["weight"] for b in batches]), np.arange(len(labels)) < n)
    assert np.array_equal(source.arrays["labels"], np.arange(n)), "the source's own are not written to"


def test_once_over_training_data_begins_at_its_beginning():
    source = windows("train")
    first = next(Loader(source, Order(len(source), 16, 0)).once())
    assert np.array_equal(first["tokens"].reshape(-1), np.arange(16 * T))


def test_once_stops_after_the_batches_asked_for():
    loader = Loader(windows("eval"), Order(126, 16, 0))
    assert len(list(loader.once(3))) == 3
    assert len(list(loader.once(10**6))) == len(list(loader.once())) == 8


def test_once_on_devices_is_once_on_the_host():
    source = windows("eval")
    order = Order(len(source), 16, 0)
    for a, b in zip(Loader(source, order).once(), Loader(source, order, shardings("data", data=8)).once(), strict=True):
        assert all(np.array_equal(a[name], b[name]) for name in a)


def test_a_negative_prefetch_is_refused():
    with pytest.raises(UserError, match="got data.prefetch -1"):
        Loader(windows(), Order(10, 2, 0), prefetch=-1)
