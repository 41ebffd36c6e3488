"""Examines machines before a job: each rank checks itself, then all check each other, and rank 0 reports the faults.

Ranks exchange results through the coordinator, not through the links under test. A rank that does not answer is a
fault too.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from jaxmodels.errors import ExitCode
from jaxmodels.launch import checks, collectives
from jaxmodels.parallel import distributed, hardware
from jaxmodels.parallel.mesh import Mesh, make_mesh

LOCAL_SECONDS, TOGETHER_SECONDS = 60.0, 45.0
"""How long a rank may take for the checks of itself, and for those with all others."""
SLOW = {"cpu": 0.4}
"""Fraction of the ranks' median below which a rank is slow; 0.8 for accelerators, which no other process uses."""
FAR = 0.5
"""Fraction of the hardware table's figure below which an accelerator is slow, whatever the others reach."""
SHORT = 0.75
"""Fraction of the ranks' median below which a device has too little memory; also what JAX preallocates by default."""
SKEW_SECONDS = 1.0
ROOM = 5e9
"""Free bytes below which a disk is nearly full."""
DISK = 20e6
"""Bytes per second below which a disk is slow."""


def examine(run_dir: Path, cfg: Mesh, say: Callable[[str], Any] = print) -> int:
    """Examine the machines of all ranks, and report on rank 0; return the exit code.

    Raises:
        UserError: the mesh does not fit the devices.
    """
    import jax

    rank, count = jax.process_index(), jax.process_count()
    mesh = make_mesh(cfg)
    began = time.monotonic()
    own = checks.local(run_dir, rank)
    try:
        with _no_longer_than(TOGETHER_SECONDS + LOCAL_SECONDS, rank):
            distributed.publish("doctor/alone", json.dumps(own))
            alone = distributed.collect("doctor/alone", LOCAL_SECONDS) if rank == 0 else {}
            silent = [other for other in range(count) if rank == 0 and other not in alone]
            if rank == 0:
                distributed.announce("doctor/go", "" if silent else "on")
            together: dict[int, Any] = {}
            if distributed.heard("doctor/go", 2 * LOCAL_SECONDS) == "on":
                mine = {
                    "clock": _clock(),
                    "ports": _ports(rank, count),
                    "collectives": collectives.measure(mesh),
                }
                distributed.publish("doctor/together", json.dumps(mine))
                together = distributed.collect("doctor/together", TOGETHER_SECONDS) if rank == 0 else {}
                silent += [other for other in range(count) if rank == 0 and other not in together]
        if rank != 0:
            return int(distributed.heard("doctor/end", 2 * TOGETHER_SECONDS) or ExitCode.FAILED)
        ranks = {other: {**json.loads(text), **json.loads(together.get(other, "{}"))} for other, text in alone.items()}
        places = [(device.process_index, str(device)) for device in mesh.devices.flat]
        found = [f"rank {other}: did not answer" for other in silent] + judge(ranks, places)
        notes = described(ranks, {axis: size for axis, size in mesh.shape.items() if size > 1})
        say("\n".join([*notes, f"examined in {time.monotonic() - began:.0f} s", ""]))
        say("\n".join([f"OFF: {line}" for line in found] or ["nothing is off"]))
        code = ExitCode.FAILED if found else ExitCode.DONE
        distributed.announce("doctor/end", str(int(code)))
        if count > 1 and found:
            time.sleep(1.0)  # the others end before the coordinator does
        return code
    finally:
        checks.forget(own["disk"])


@contextlib.contextmanager
def _no_longer_than(seconds: float, rank: int) -> Any:
    """End this process if the checks with all ranks hang; the others end by themselves."""

    def end() -> None:
        print(f"doctor: rank {rank} hangs in the checks that all ranks make together", file=sys.stderr, flush=True)
        os._exit(ExitCode.FAILED)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _clock() -> list[float]:
    """Return the times at which this process leaves some barriers, which all processes leave at once."""
    times = []
    for _ in range(3):
        distributed.barrier("doctor clock")
        times.append(time.time())
    return times


def _ports(rank: int, count: int) -> list[str]:
    """Check that this rank reaches the next one and rank 0 by TCP; return the problems."""
    if count == 1:
        return []
    host = distributed.own_address()
    with socket.create_server((host, 0)) as server:
        distributed.publish("doctor/port", f"{host}:{server.getsockname()[1]}")
        others = {(rank + 1) % count, 0} - {rank}
        problems = []
        for other in sorted(others):
            address = distributed.heard(f"doctor/port/{other}", LOCAL_SECONDS) or "an unknown address"
            name, _, port = address.rpartition(":")
            try:
                socket.create_connection((name, int(port)), timeout=5).close()
            except (OSError, ValueError) as error:
                problems.append(f"cannot reach rank {other} at {address}: {error}")
        distributed.barrier("doctor ports")
    return problems


# ---- faults


def judge(ranks: dict[int, dict[str, Any]], places: list[tuple[int, str]]) -> list[str]:
    """Describe each fault in a line, with rank, host and device; `places` has rank and device by mesh position."""
    found = [*_differences(ranks), *_devices(ranks), *_machines(ranks), *_together(ranks, places)]
    return [f"rank {rank} on {ranks[rank]['host']}{where}: {what}" for rank, where, what in found]


Finding = tuple[int, str, str]


def _differences(ranks: dict[int, dict[str, Any]]) -> Iterable[Finding]:
    """Find versions and variables that differ from those of most ranks."""
    for kind, word in (("versions", "has"), ("environment", "has variable")):
        names = {name for each in ranks.values() for name in each[kind]}
        for name in sorted(names):
            values = {rank: each[kind].get(name) for rank, each in ranks.items()}
            usual = statistics.mode(values.values())
            for rank, value in values.items():
                if value != usual:
                    yield rank, "", f"{word} {name} {value or 'not at all'}, the others {usual or 'not at all'}"


def _devices(ranks: dict[int, dict[str, Any]]) -> Iterable[Finding]:
    """Find devices that compute wrong results, are slow, or have little memory."""
    every = [(rank, name, each) for rank, found in ranks.items() for name, each in found["devices"].items()]
    yield from ((rank, f" ({name})", each["problem"]) for rank, name, each in every if "problem" in each)
    every = [(rank, name, each) for rank, name, each in every if "problem" not in each]
    if len({each["kind"] for _, _, each in every}) > 1:
        usual = statistics.mode(each["kind"] for _, _, each in every)
        yield from (
            (rank, f" ({name})", f"is {each['kind']}, the others {usual}")
            for rank, name, each in every
            if each["kind"] != usual
        )
    for rank, name, each in every:
        where = f" ({name})"
        if each["product"]["wrong"] or each["product"]["changing"]:
            rows = f"{each['product']['wrong']} row(s)" if each["product"]["wrong"] else "it changes between runs"
            yield rank, where, f"computes matrix products wrong: {rows}"
        for check, what in (("stream", "memory loses additions"), ("copies", "copies from the host come back changed")):
            if each[check]["wrong"]:
                yield rank, where, f"{what}: {each[check]['wrong']:,} wrong"
        if not each["memory"]["given"]:
            yield rank, where, f"cannot have {0.8 * each['memory']['free'] / 2**30:.1f} GiB that are said to be free"
    for label, value, table, unit in MEASURES:
        values = [value(each) for _, _, each in every]
        median = statistics.median(values or [0.0])
        for (rank, name, each), reached in zip(every, values, strict=True):
            row = hardware.of_device(each["kind"])
            least = SHORT if label == "memory" else SLOW.get(each["platform"], 0.8)
            if reached < least * median:
                yield (
                    rank,
                    f" ({name})",
                    f"{label} {reached / unit[0]:,.4g} {unit[1]}, the median is {median / unit[0]:,.4g}",
                )
            elif row and (known := table(row)) and reached < FAR * known:
                yield (
                    rank,
                    f" ({name})",
                    f"{label} {reached / unit[0]:,.4g} {unit[1]}, {row.name} should have {known / unit[0]:,.4g}",
                )


def _machines(ranks: dict[int, dict[str, Any]]) -> Iterable[Finding]:
    """Find faults of disks and clocks."""
    for rank, each in ranks.items():
        disk = each["disk"]
        if disk["problem"]:
            yield rank, "", f"disk at {Path(disk['path']).parent}: {disk['problem']}"
            continue
        if disk["free"] < ROOM:
            yield rank, "", f"disk at {Path(disk['path']).parent} has {disk['free'] / 1e9:.1f} GB left"
        if disk["write"] < DISK:
            yield rank, "", f"disk at {Path(disk['path']).parent} takes {disk['write'] / 1e6:.1f} MB/s"
        if not Path(disk["path"]).exists():
            yield rank, "", f"writes to {Path(disk['path']).parent}, which rank 0 does not see: it is another disk"
    clocks = {rank: each["clock"] for rank, each in ranks.items() if "clock" in each}
    if clocks:
        usual = [statistics.median(times) for times in zip(*clocks.values(), strict=True)]
        for rank, times in clocks.items():
            skew = statistics.median(a - b for a, b in zip(times, usual, strict=True))
            if abs(skew) > SKEW_SECONDS:
                yield rank, "", f"its clock is {abs(skew):.1f} s {'ahead' if skew > 0 else 'behind'}"


def _together(ranks: dict[int, dict[str, Any]], places: list[tuple[int, str]]) -> Iterable[Finding]:
    """Find faults of ports and collectives: a part that is wrong for all its receivers is its sender's fault."""
    for rank, each in ranks.items():
        yield from ((rank, "", problem) for problem in each.get("ports", ()))
    wrong: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for each in ranks.values():
        for one in each.get("collectives", ()):
            wrong.setdefault((one["axis"], one["kind"]), []).extend(map(tuple, one["wrong"]))
    blamed: dict[int, list[str]] = {}
    sums: list[str] = []
    for (axis, kind), pairs in wrong.items():
        senders = {sender for _, sender in pairs if sender >= 0}
        sums += [f"{kind} along {axis}"] * bool(pairs and not senders)
        for sender in senders:
            to = {receiver for receiver, other in pairs if other == sender}
            # a receiver that gets wrong parts from several senders is at fault itself
            lone = next((place for place in to if sum(place == r for r, _ in pairs) > 1), None)
            blamed.setdefault(sender if lone is None else lone, []).append(f"{kind} along {axis}")
    for place, what in blamed.items():
        rank, name = places[place]
        yield rank, f" ({name})", f"sends or receives wrong parts in {', '.join(dict.fromkeys(what))}"
    if sums and not blamed:
        where = sorted({place for pairs in wrong.values() for place, _ in pairs})
        rank, name = places[where[0]]
        yield rank, f" ({name})", f"and {len(where) - 1} more get wrong sums in {', '.join(sums)}"


def _measure(check: str, field: str) -> Callable[[dict[str, Any]], float]:
    return lambda each: each[check][field]


TERA, GIGA, GIB = (1e12, "TFLOP/s"), (1e9, "GB/s"), (2**30, "GiB")
MEASURES: tuple[tuple[str, Callable[[dict[str, Any]], float], Callable[[hardware.Hardware], float], Any], ...] = (
    ("matrix product", _measure("product", "flops"), lambda row: row.flops["bfloat16"], TERA),
    ("memory bandwidth", _measure("stream", "bandwidth"), lambda row: row.bandwidth, GIGA),
    ("copy to the device", _measure("copies", "to"), lambda row: row.host / 4, GIGA),
    ("copy to the host", _measure("copies", "back"), lambda row: row.host / 8, GIGA),
    ("memory", _measure("memory", "free"), lambda row: row.memory, GIB),
)
"""What is measured of each device, the hardware table's figure, and the unit. Copies are from memory that is not
pinned, which reaches only a part of the link's speed."""


# ---- measurements


def described(ranks: dict[int, dict[str, Any]], axes: dict[str, int]) -> list[str]:
    """Describe what was measured, as ranges from the lowest to the highest."""
    first = ranks[min(ranks)]
    every = [each for found in ranks.values() for each in found["devices"].values() if "problem" not in each]
    if not every:
        return []
    row = hardware.of_device(every[0]["kind"])
    hosts = len({each["host"] for each in ranks.values()})
    mesh = " ".join(f"{axis}={size}" for axis, size in axes.items()) or "one device"
    lines = [
        f"{len(ranks)} process(es) on {hosts} host(s), {len(every)} device(s) {every[0]['kind']}, mesh {mesh}",
        ", ".join(f"{name} {version}" for name, version in first["versions"].items()),
    ]
    lines += [f"{name}={value} changes what JAX does" for name, value in first["environment"].items()]
    rows = [
        (label, [value(each) for each in every], row and table(row), unit) for label, value, table, unit in MEASURES
    ]
    disks = [each["disk"] for each in ranks.values() if not each["disk"]["problem"]]
    rows += [(f"disk {name}", [each[name] for each in disks], None, GIGA) for name in ("write", "read") if disks]
    rows += [("disk free", [each["free"] for each in disks], None, (1e9, "GB"))] if disks else []
    sent: dict[str, list[float]] = {}
    for each in ranks.values():
        for one in each.get("collectives", ()):
            sent.setdefault(f"{one['kind']} along {one['axis']}={one['devices']}", []).append(one["bandwidth"])
    rows += [(label, values, None, GIGA) for label, values in sent.items()]
    for label, values, known, (size, unit) in rows:
        if not any(values):
            continue
        low, high = min(values) / size, max(values) / size
        shown = f"{low:,.4g}" if f"{low:,.4g}" == f"{high:,.4g}" else f"{low:,.4g} to {high:,.4g}"
        of = f" (table: {known / size:,.4g})" if known else ""
        lines.append(f"  {label:28} {shown} {unit}{of}")
    return lines
