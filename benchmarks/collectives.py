"""The collectives of a step: those that its compiled program holds, and those that a profiler's trace saw run.

An event of a trace names the instruction that ran. The program says which instructions are collectives, how many bytes
each has, and by its groups of devices along which mesh axes it goes.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jaxmodels.plan import hlo, roofline
from jaxmodels.plan import program as programs
from jaxmodels.plan.hlo import Computation, Instruction
from jaxmodels.plan.program import Program

Groups = Callable[[str], list[list[int]]]
"""Reads the groups of devices, by their places in the mesh, from a collective's attributes."""
Key = tuple[str, str]
"""Kind of a collective, and the mesh axes along which it goes (`data*fsdp`)."""
Spans = list[tuple[float, float]]
"""Begin and end of what ran, in nanoseconds."""
AROUND = ("while", "call", "conditional")
"""Instructions whose events last as long as those of what they run."""


@dataclass(frozen=True)
class Collective:
    """A collective of a program."""

    kind: str
    axes: str
    bytes: float
    """As in a plan: of the whole result, or of a reduce-scatter's whole input."""
    times: float
    """How often it runs in a step."""
    fused: bool = False
    """It runs inside a fusion, beside other work, so that no trace tells how long it takes."""


@dataclass
class Seen:
    """What a trace saw of one device."""

    counts: Counter[str] = field(default_factory=Counter)
    """How often each collective ran, by the name of the instruction."""
    spans: dict[str, Spans] = field(default_factory=lambda: defaultdict(list))
    """When collectives ran, by their mesh axes."""
    others: Spans = field(default_factory=list)
    """When anything else ran."""


def held(program: Program, sizes: Mapping[str, int], groups: Groups) -> dict[str, Collective]:
    """Return the collectives of a program by the names of their instructions, inside a fusion behind the fusion's name.

    `sizes` are those of the mesh's axes.
    """
    found: dict[str, Collective] = {}

    def note(name: str, each: Instruction, times: float, fused: bool) -> None:
        among = max(groups(each.attributes), key=len)
        before = found[name].times if name in found else 0.0
        size = roofline.payload(each, len(among))
        found[name] = Collective(each.kind or "", axes(among, sizes), size, before + times, fused)

    channels: set[str] = set()
    for _, each, times in program.walk():
        if each.kind is not None and each.kind != hlo.HOST:
            note(each.name, each, times, fused=False)
        for _, inner in programs.inner_collectives(program, each):
            if inner.channel is None or inner.channel not in channels:  # one may be spread over several fusions
                channels |= {inner.channel} if inner.channel else set()
                note(f"{each.name} {inner.name}", inner, times, fused=True)
    return found


def axes(group: Sequence[int], sizes: Mapping[str, int]) -> str:
    """Return the mesh axes along which the devices of a group differ; `-` where it is a single device."""
    where = np.stack(np.unravel_index(np.array(group), tuple(sizes.values())))
    return "*".join(axis for axis, row in zip(sizes, where, strict=True) if len(set(row.tolist())) > 1) or "-"


def planned(collectives: Mapping[str, Collective]) -> dict[Key, dict[str, float]]:
    """Return count and bytes of a step by kind and axes, as the program states them."""
    return _totals(collectives, {name: each.times for name, each in collectives.items()})


def ran(collectives: Mapping[str, Collective], counts: Mapping[str, float], steps: int) -> dict[Key, dict[str, float]]:
    """Return count and bytes of a step by kind and axes, as a trace of so many steps saw them on a device."""
    return _totals(collectives, {name: count / steps for name, count in counts.items()})


def _totals(collectives: Mapping[str, Collective], times: Mapping[str, float]) -> dict[Key, dict[str, float]]:
    found: dict[Key, dict[str, float]] = {}
    for name, count in times.items():
        each = collectives[name]
        row = found.setdefault((each.kind, each.axes), {"count": 0.0, "bytes": 0.0})
        row["count"] += count
        row["bytes"] += count * each.bytes
    return dict(sorted(found.items()))


def read(folder: Path, program: Program, collectives: Mapping[str, Collective]) -> dict[int, Seen]:
    """Return what the newest trace in a folder saw of each device, by the device's number in the trace.

    On CPUs all devices are threads of the host; on others each has a plane of its own. Streams of GPUs name the
    instruction of each kernel; TPUs have lines of instructions, and of transfers that run beside them.
    """
    import jax

    instructions, inside = _named(program.computations)
    named: dict[str, list[str]] = defaultdict(list)
    for name in collectives:
        named[name.partition(" ")[0]].append(name)
    seen: dict[int, Seen] = defaultdict(Seen)
    for path in folder.rglob("*.xplane.pb"):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            of = re.fullmatch(r"/device:(?:GPU|TPU):(\d+).*", plane.name)
            if of is None and plane.name != "/host:CPU":
                continue
            lines = list(plane.lines)
            if streams := [line for line in lines if line.name.startswith("Stream")]:
                lines = streams  # the other lines of a GPU are made of these
            elif of:
                lines = [line for line in lines if line.name in ("XLA Ops", "Async XLA Ops")]
            for line in lines:
                for event in line.events:
                    if event.name.startswith("end: "):
                        continue
                    stats = dict(event.stats)
                    if of is None and "hlo_op" not in stats:
                        continue
                    name = str(stats.get("hlo_op") or event.name.partition(" ")[0].lstrip("%"))
                    if (each := instructions.get(name)) is None:
                        continue
                    device = seen[int(of[1]) if of else int(stats.get("device_ordinal", 0))]  # pyright: ignore
                    span = (event.start_ns, event.start_ns + event.duration_ns)
                    whose = _begun(each, inside[name])
                    if whose in collectives:
                        device.spans[collectives[whose].axes].append(span)
                    elif each.opcode not in AROUND:
                        device.others.append(span)
                    if line.name != "Async XLA Ops":
                        device.counts.update(named.get(name, ()))
    return dict(seen)


def _named(computations: Mapping[str, Computation]) -> tuple[dict[str, Instruction], dict[str, Computation]]:
    pairs = [(each, where) for where in computations.values() for each in where.instructions.values()]
    return {each.name: each for each, _ in pairs}, {each.name: where for each, where in pairs}


def _begun(each: Instruction, where: Computation) -> str:
    """Return the name of the instruction that started what this one completes, or its own."""
    while each.opcode.endswith(("-done", "-update")) and each.operands and each.operands[0] in where.instructions:
        each = where.instructions[each.operands[0]]
    return each.name


def union(spans: Iterable[tuple[float, float]]) -> Spans:
    """Return spans that do not overlap and cover the same time, in order."""
    found: Spans = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((begin, end))
    return found


def length(spans: Iterable[tuple[float, float]]) -> float:
    """Return the time that spans cover, in nanoseconds."""
    return sum(end - begin for begin, end in union(spans))


def times(seen: Seen, steps: int) -> dict[str, Any]:
    """Return seconds of a step on a device: in collectives by axes, in them while nothing else ran, and in the rest."""
    sent = [span for spans in seen.spans.values() for span in spans]
    work = length(seen.others)
    return {
        "collectives": {name: length(spans) / steps / 1e9 for name, spans in sorted(seen.spans.items())},
        "alone": (length([*sent, *seen.others]) - work) / steps / 1e9,
        "work": work / steps / 1e9,
    }
