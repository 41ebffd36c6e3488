"""Step time of a compiled program: its schedule is replayed against compute, memory and links.

The compiler has fixed the order of instructions. Each instruction takes the longer of two times: its products at the
peak of their type, and its bytes at the memory's bandwidth, both scaled by the share that programs reach. A collective
occupies its link from the instruction that starts it, and the step waits where it must be complete. Nothing here was
measured on the hardware in question: `SHARE` and `OWN` are assumptions, and every plan prints them.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxmodels.parallel.hardware import Hardware
from jaxmodels.plan import hlo, products
from jaxmodels.plan import program as programs
from jaxmodels.plan.groups import groups_of, slices_of
from jaxmodels.plan.hlo import Computation, Instruction
from jaxmodels.plan.program import Program
from jaxmodels.plan.topology import Topology

SHARE = {
    "cuda": {"products": 0.72, "attention": 0.6, "memory": 0.88, "link": 0.8, "launch": 2e-6, "latency": 12e-6},
    "tpu": {"products": 0.88, "attention": 0.55, "memory": 0.88, "link": 0.9, "launch": 0.3e-6, "latency": 2e-6},
}
"""Assumptions by platform: the shares of the peaks that large products, fused attention, memory-bound fusions and
collectives reach; the seconds that launching an instruction takes; and a collective's latency in seconds."""
OWN = {
    "h100": {"products": 0.62},
    "h200": {"products": 0.62},
    "v6e": {"products": 0.7, "attention": 0.45},
}
"""Assumptions for one kind of hardware, where more is known: an H100 lowers its clock under large products.

They were fitted to the published throughput of Llama-2-7B on 8 H100s and of Llama-3.1-8B on 8 v6e chips
(benchmarks/results/plan_vs_published.md).
"""


BESIDE = ("call-start", "custom-call-start")
"""Instructions that start a computation on another core."""
OTHER = "another core"
"""The lane that a TPU's SparseCore occupies."""


@dataclass(frozen=True)
class Transfer:
    """All occurrences of a collective in a step."""

    kind: str
    axes: tuple[str, ...]
    """Mesh axes along which it communicates."""
    link: str
    devices: int
    """Devices in a group."""
    bytes: float = 0.0
    """Bytes of the whole result (of a reduce-scatter: of the whole input) on a device, summed over a step."""
    count: int = 0
    seconds: float = 0.0


@dataclass
class Estimate:
    """Seconds of a step, and what they are spent on."""

    seconds: float = 0.0
    products: float = 0.0
    """Seconds of instructions that are bound by compute."""
    memory: float = 0.0
    """Seconds of instructions that are bound by memory."""
    waiting: float = 0.0
    """Seconds spent waiting for a collective or for another core."""
    launching: float = 0.0
    """Seconds spent launching instructions."""
    flops: float = 0.0
    """FLOPs of a device, including recomputation."""
    moved: float = 0.0
    """Bytes between a device's memory and its compute."""
    transfers: list[Transfer] = field(default_factory=list)

    @property
    def binds(self) -> str:
        """The resource that takes most of the time."""
        parts = {
            "compute": self.products,
            "memory": self.memory,
            "links": self.waiting,
            "launches": self.launching,
        }
        return max(parts, key=lambda name: parts[name])


@dataclass(frozen=True)
class Places:
    """The position of each device of a mesh in the topology."""

    topology: Topology
    sizes: dict[str, int]
    """Sizes of the mesh's axes."""
    coordinates: np.ndarray
    """The rows of `Topology.coordinates` in the order of the mesh, (devices, numbers)."""

    def axes(self, groups: list[list[int]]) -> tuple[str, ...]:
        """Mesh axes along which the devices of a group differ."""
        group = max(groups, key=len)
        where = np.stack(np.unravel_index(np.array(group), tuple(self.sizes.values())))
        return tuple(axis for axis, row in zip(self.sizes, where, strict=True) if len(set(row.tolist())) > 1)

    def link(self, groups: list[list[int]]) -> tuple[str, float]:
        """The link that limits a group's traffic, and the bytes a second that a device sends through it."""
        row, where = self.topology.hardware, self.coordinates[np.array(groups[0])]
        name, rate = ("switch", row.link) if row.platform == "cuda" else self._torus(where)
        _, counts = np.unique(self.islands[np.array(groups[0])], return_counts=True)
        # a ring enters each node or slice once, so all of the group's adapters there share that traffic
        through = int(counts.min()) * row.network
        return ("network", through) if len(counts) > 1 and through < rate else (name, rate)

    def groups(self, attributes: str) -> list[list[int]]:
        """The groups of devices that take part in a collective; a device is its position in the mesh."""
        slices = [np.flatnonzero(self.islands == number) for number in range(self.topology.slices)]
        among = slices_of(attributes)
        if among:
            return np.stack([slices[number] for number in among], 1).tolist()
        if len(slices) == 1:
            return groups_of(attributes, len(self.coordinates))
        # a program for several slices names the devices of one slice
        return [slices[0][group].tolist() for group in groups_of(attributes, len(slices[0]))]

    @property
    def islands(self) -> np.ndarray:
        """Index of each device's node or slice, (devices,)."""
        return self.coordinates[:, 0 if self.topology.hardware.platform == "cuda" else -1]

    def _torus(self, where: np.ndarray) -> tuple[str, float]:
        row = self.topology.hardware
        spans = [len(set(column.tolist())) for column in where.T[: row.dimensions]]
        rates = [
            row.link * (2 if size == whole and whole >= row.wraps and whole % row.wraps == 0 else 1)
            for size, whole in zip(spans, self.topology.shape, strict=True)
            if size > 1
        ]
        return f"torus, {len(rates)}D", sum(rates) or row.link


def shares(hardware: Hardware) -> dict[str, float]:
    """The assumptions about a kind of hardware."""
    return {**SHARE[hardware.platform], **OWN.get(hardware.name, {})}


def payload(each: Instruction, devices: int) -> float:
    """Bytes of a collective's whole result, or of a reduce-scatter's whole input."""
    total = hlo.size(each.shape)
    if each.kind == hlo.HOST:  # the array that is on the device, which may be a slice of the one on the host
        near = [one for one in hlo.arrays(each.shape) if hlo.HOST_MEMORY not in one[2]]
        here = [math.prod(dims) * hlo.BYTES[kind] for kind, dims, _ in near]
        return max(here, default=total)
    begins = each.opcode.endswith("-start")
    if each.kind in ("all-gather", "reduce-scatter") and begins:  # inputs and outputs, one of which is a part
        return total * devices / (devices + 1)
    if each.kind == "reduce-scatter":
        return total * devices
    # the shape of an all-reduce includes its inputs only since the XLA of jax 0.12
    both = begins and (each.kind != "all-reduce" or each.shape.startswith("(("))
    return total / 2 if both else total


def passes(kind: str, devices: int) -> float:
    """Return how many times the whole payload passes through a device's link in a ring."""
    if kind in ("collective-permute", hlo.HOST):
        return 1.0
    return (2.0 if kind == "all-reduce" else 1.0) * (devices - 1) / devices


def estimate(program: Program, places: Places, dtype: str) -> Estimate:
    """Replay a compiled program on these devices; `dtype` is the compute dtype."""
    return _Player(program, places, dtype).play()


class _Player:
    """Replays a program's schedule, computation by computation."""

    def __init__(self, program: Program, places: Places, dtype: str) -> None:
        self.program, self.places = program, places
        row = places.topology.hardware
        self.share = shares(row)
        self.peaks = {**row.flops, "": row.flops.get(dtype, row.flops["bfloat16"])}
        self.bandwidth = row.bandwidth * self.share["memory"]
        self.result = Estimate()
        self.transfers: dict[tuple[Any, ...], list[float]] = defaultdict(lambda: [0.0, 0, 0.0])
        self.groups: dict[str, tuple[tuple[str, ...], str, float, int]] = {}

    def play(self) -> Estimate:
        self.result.seconds = self.run(self.program.entry, 1)
        found = [
            Transfer(kind, axes, link, devices, size, int(count), seconds)
            for (kind, axes, link, devices), (size, count, seconds) in self.transfers.items()
        ]
        self.result.transfers = sorted(found, key=lambda each: -each.seconds)
        return self.result

    def run(self, name: str, times: float) -> float:
        """Seconds of one pass of a computation that runs `times` times; adds to the totals of the result."""
        computation = self.program.computations[name]
        clock, lanes, done = 0.0, defaultdict(float), {}
        started: dict[str, str] = {}
        held = {each.name: self.held(each) for each in computation.instructions.values()}
        last = {key: each for each, found in held.items() for key in found}
        # a computation on another core receives its arrays when it starts, or later
        waits_for = {name: each.runs for name, each in computation.instructions.items() if each.opcode in BESIDE}
        for each in computation.instructions.values():
            if each.operands and each.opcode.endswith("-update") and each.operands[0] in started:
                started[each.name] = started[each.operands[0]]
            begun = each.name if each.operands else ""
            if each.opcode.endswith("-update") and each.operands[0] not in started:
                begun = each.operands[0]
            if inside := waits_for.pop(begun, None):
                lanes[OTHER] = max(clock, lanes[OTHER]) + self.beside(inside, times)
                done[begun], started[each.name] = lanes[OTHER], begun
            for key, collective in held[each.name].items():
                if key not in done:
                    link, seconds = self.send(key, collective, times)
                    lanes[link] = max(clock, lanes[link]) + seconds
                    done[key] = lanes[link]
                started[each.name] = key
            clock += self.work(computation, each, times)
            ends = [key for key in held[each.name] if last[key] == each.name and not each.begins]
            if each.opcode.endswith("-done") and each.operands and each.operands[0] in started:
                ends.append(started[each.operands[0]])
            for key in ends:
                self.result.waiting += times * max(0.0, done[key] - clock)
                clock = max(clock, done[key])
        return max([clock, *done.values()])

    def beside(self, name: str, times: float) -> float:
        """Seconds of a computation on another core; it costs this core only the time spent waiting for it."""
        before = dataclasses.replace(self.result)
        seconds = self.run(name, times)
        for part in ("products", "memory", "waiting", "launching"):
            setattr(self.result, part, getattr(before, part))
        return seconds

    def held(self, each: Instruction) -> dict[str, Instruction]:
        """Collectives of an instruction by key: on TPUs one collective may be spread over several fusions."""
        found = [each] if each.kind is not None else []
        found += [inner for _, inner in programs.inner_collectives(self.program, each)]
        tpu = self.places.topology.hardware.platform == "tpu"
        # in a GPU program all collectives of a shard_map may share one channel
        return {f"{one.kind} {one.channel}" if tpu and one.channel else one.name: one for one in found}

    def send(self, key: str, each: Instruction, times: float) -> tuple[str, float]:
        """The lane of a collective and its seconds; records the transfer."""
        if key not in self.groups and each.kind == hlo.HOST:
            self.groups[key] = ((), "host", self.places.topology.hardware.host, 1)
        elif key not in self.groups:
            groups = self.places.groups(each.attributes)
            link, rate = self.places.link(groups)
            if each.kind == "collective-permute" and link.startswith("torus"):
                rate = self.places.topology.hardware.link  # in one direction along one dimension
            self.groups[key] = (self.places.axes(groups), link, rate, max(len(group) for group in groups))
        axes, link, rate, devices = self.groups[key]
        size, kind = payload(each, devices), each.kind or ""
        seconds = size * passes(kind, devices) / (rate * self.share["link"])
        seconds += self.share["latency"] * (1 + math.log2(max(devices, 2)) / 4)
        note = self.transfers[kind, axes, link, devices]
        note[0] += times * size
        note[1] += times
        note[2] += times * seconds
        return self.lane(each, link), seconds

    def lane(self, each: Instruction, link: str) -> str:
        """The resource that a collective occupies: its link, or one direction of it on a torus."""
        if each.kind != "collective-permute" or not link.startswith("torus"):
            return link
        steps = [target - source for source, target in groups_of(each.attributes, 0)]
        return f"{link}, {'up' if sum(step > 0 for step in steps) * 2 >= len(steps) else 'down'}"

    def work(self, computation: Computation, each: Instruction, times: float) -> float:
        """Seconds of one instruction, without collectives."""
        called = each.called()
        if each.opcode == "while":
            trips = self.program.trips(each)
            return trips * self.run(called["body"], times * trips) if trips else 0.0
        if each.opcode == "call":
            return self.run(called["to_apply"], times)
        if each.opcode == "conditional":
            share = self.program.taken(each)
            return share * self.run(self.program.dearest(each), times * share)
        computed = list(products.products(self.program.computations, computation, each))
        flops = sum(one.flops for one in computed)
        moved = programs.moved(self.program, computation, each)
        if not flops and not moved:
            return 0.0
        # at the peak of the product's type, where the hardware has one
        busy = sum(
            one.flops
            / self.peaks.get(one.peak, self.peaks[""])
            / self.share["attention" if one.attention else "products"]
            for one in computed
        )
        memory = moved / self.bandwidth
        if outside := programs.hosted(computation, each):
            memory += outside / (self.places.topology.hardware.host * self.share["link"])
        self.result.flops += times * flops
        self.result.moved += times * moved
        if busy > memory:
            self.result.products += times * busy
        else:
            self.result.memory += times * memory
        self.result.launching += times * self.share["launch"]
        return max(busy, memory) + self.share["launch"]
