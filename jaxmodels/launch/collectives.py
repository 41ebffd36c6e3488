"""Checks of each collective along each axis of a mesh: whether every device receives the right data, and how fast."""

from __future__ import annotations

from typing import Any

import numpy as np

from jaxmodels.launch.checks import best_of

SENT = {
    "all_gather": lambda size: size - 1,
    "all_reduce": lambda size: 2 * (size - 1) / size,
    "reduce_scatter": lambda size: (size - 1) / size,
    "all_to_all": lambda size: (size - 1) / size,
    "permute": lambda size: 1,
}
"""The least that a device must send, as a multiple of the data that it holds."""
_LEAST = 2**16
"""The least count of numbers per device."""


def contribution(place: int, count: int) -> np.ndarray:
    """Make the data of a device: integers that identify it, and whose sums are exact."""
    return ((np.arange(count) * 7 + place * 31) % 257).astype(np.float32)


def measure(mesh: Any) -> list[dict[str, Any]]:
    """Measure each collective along each axis of more than one device, and check what this process's devices received.

    `wrong` holds pairs of positions in the mesh: the device with a wrong part, and the device that sent it (-1 if it
    cannot be known, since the result is a sum).
    """
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    flat = [str(device) for device in mesh.devices.flat]
    at = {name: place for place, name in enumerate(flat)}
    count = 2**22 if mesh.devices.flat[0].platform != "cpu" else _LEAST
    spec = PartitionSpec(mesh.axis_names)
    found = []
    for axis, size in mesh.shape.items():
        if size == 1:
            continue
        each = max(_LEAST, count // size)
        each += -each % size

        def piece(index: Any, each: int = each) -> np.ndarray:
            return contribution((index[0].start or 0) // each, each)

        given = jax.make_array_from_callback((each * len(flat),), NamedSharding(mesh, spec), piece)
        for kind in SENT:
            body = _body(kind, axis, size)
            work = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
            out = work(given).block_until_ready()
            seconds = best_of(3, lambda work=work, given=given: work(given).block_until_ready())
            wrong = []
            for shard in out.addressable_shards:
                place = at[str(shard.device)]
                wrong += _wrong(kind, np.asarray(shard.data), place, _group(mesh, axis, place), each)
            share = (
                (size - 1) / size * {"all_reduce": 2.0, "permute": size / (size - 1), "all_gather": size}.get(kind, 1)
            )
            found.append(
                {"axis": axis, "kind": kind, "devices": size, "bandwidth": 4 * each * share / seconds, "wrong": wrong}
            )
    return found


def _body(kind: str, axis: str, size: int) -> Any:
    import jax

    def body(x: Any) -> Any:
        if kind == "all_reduce":
            return jax.lax.psum(x, axis)
        if kind == "all_gather":
            return jax.lax.all_gather(x, axis, tiled=True)
        if kind == "reduce_scatter":
            return jax.lax.psum_scatter(x, axis, tiled=True)
        if kind == "all_to_all":
            return jax.lax.all_to_all(x, axis, 0, 0, tiled=True)
        return jax.lax.ppermute(x, axis, [(i, (i + 1) % size) for i in range(size)])

    return body


def _group(mesh: Any, axis: str, place: int) -> list[int]:
    """Return the positions of the devices that a device communicates with along an axis, in order."""
    places = np.arange(mesh.devices.size).reshape(mesh.devices.shape)
    number = mesh.axis_names.index(axis)
    lines = np.moveaxis(places, number, -1).reshape(-1, places.shape[number])
    return next(line.tolist() for line in lines if place in line)


def _wrong(kind: str, got: np.ndarray, place: int, group: list[int], each: int) -> list[tuple[int, int]]:
    """Compare a device's result with what it should be: pairs of its position and that of a wrong part's sender."""
    mine, size = group.index(place), len(group)
    parts = {other: contribution(other, each) for other in group}
    piece = slice(mine * each // size, (mine + 1) * each // size)
    if kind in ("all_reduce", "reduce_scatter"):
        total = np.sum([parts[other] for other in group], 0)
        wanted = total if kind == "all_reduce" else total[piece]
        return [] if np.array_equal(got, wanted) else [(place, -1)]
    senders = group if kind in ("all_gather", "all_to_all") else [group[mine - 1]]
    wanted = [parts[other][piece] if kind == "all_to_all" else parts[other] for other in senders]
    received = np.split(got, len(senders))
    return [(place, other) for other, a, b in zip(senders, received, wanted, strict=True) if not np.array_equal(a, b)]
