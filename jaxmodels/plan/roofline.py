"""How long a compiled step takes: its schedule played against compute, memory and links.

The compiler has decided what runs when. Each instruction takes the longer of two times: that of its products at the
peak that the hardware has for their type, and that of its bytes at the bandwidth of the memory, both as far as programs
reach them. A collective occupies its link from where it begins, and is waited for where it must be done. Nothing here
was measured on the hardware that is planned for: `SHARE` and `OWN` are the assumptions, and a plan prints them.
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
"""Shares of the peaks that large products, fused attention, memory-bound fusions and collectives reach, seconds that it
takes to begin an instruction, and seconds that a collective takes beside its bytes; by platform."""
OWN = {
    "h100": {"products": 0.62},
    "h200": {"products": 0.62},
    "v6e": {"products": 0.7, "attention": 0.45},
}
"""Shares of one kind of hardware, where they are known better: an H100's clock falls under large products.

Chosen by what was published of Llama-2-7B on 8 H100s and of Llama-3.1-8B on 8 v6e chips
(benchmarks/results/plan_vs_published.md).
"""


BESIDE = ("call-start", "custom-call-start")
"""Instructions that begin a computation of another core."""
OTHER = "another core"
"""The lane of a TPU's SparseCore."""


@dataclass(frozen=True)
class Transfer:
    """A collective of the program, all its occurrences in a step together."""

    kind: str
    axes: tuple[str, ...]
    """Mesh axes that it goes along."""
    link: str
    devices: int
    """Devices in a group."""
    bytes: float = 0.0
    """What a device holds of the whole result (or, of a reduce-scatter, of the whole input), in a step."""
    count: int = 0
    seconds: float = 0.0


@dataclass
class Estimate:
    """Seconds of a step, and where they go."""

    seconds: float = 0.0
    products: float = 0.0
    """Seconds of instructions that compute binds."""
    memory: float = 0.0
    """Seconds of instructions that memory binds."""
    waiting: float = 0.0
    """Seconds in which a collective, or what another core does, is waited for."""
    launching: float = 0.0
    """Seconds that it takes to begin instructions."""
    flops: float = 0.0
    """FLOPs of a device, recomputation included."""
    moved: float = 0.0
    """Bytes between a device's memory and its compute."""
    transfers: list[Transfer] = field(default_factory=list)

    @property
    def binds(self) -> str:
        """What takes most of the time."""
        parts = {
            "compute": self.products,
            "memory": self.memory,
            "links": self.waiting,
            "launches": self.launching,
        }
        return max(parts, key=lambda name: parts[name])


@dataclass(frozen=True)
class Places:
    """Where each device of a mesh lies."""

    topology: Topology
    sizes: dict[str, int]
    """Of the mesh's axes."""
    coordinates: np.ndarray
    """(devices, numbers), as `Topology.coordinates`, in the order of the mesh."""

    def axes(self, groups: list[list[int]]) -> tuple[str, ...]:
        """Mesh axes along which the devices of a group differ."""
        group = max(groups, key=len)
        where = np.stack(np.unravel_index(np.array(group), tuple(self.sizes.values())))
        return tuple(axis for axis, row in zip(self.sizes, where, strict=True) if len(set(row.tolist())) > 1)

    def link(self, groups: list[list[int]]) -> tuple[str, float]:
        """The link that a group's traffic is bound by, and bytes a second of a device one way through it."""
        row, where = self.topology.hardware, self.coordinates[np.array(groups[0])]
        name, rate = ("switch", row.link) if row.platform == "cuda" else self._torus(where)
        _, counts = np.unique(self.islands[np.array(groups[0])], return_counts=True)
        # a ring goes through each node or slice once: all of the group's adapters there share what enters
        through = int(counts.min()) * row.network
        return ("network", through) if len(counts) > 1 and through < rate else (name, rate)

    def groups(self, attributes: str) -> list[list[int]]:
        """The devices that take part in a collective, group by group, by their places in the mesh."""
        slices = [np.flatnonzero(self.islands == number) for number in range(self.topology.slices)]
        among = slices_of(attributes)
        if among:
            return np.stack([slices[number] for number in among], 1).tolist()
        if len(slices) == 1:
            return groups_of(attributes, len(self.coordinates))
        # a program of several slices is written for the devices of one
        return [slices[0][group].tolist() for group in groups_of(attributes, len(slices[0]))]

    @property
    def islands(self) -> np.ndarray:
        """The node or slice of each device, (devices,)."""
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
    """The assumptions of a kind of hardware."""
    return {**SHARE[hardware.platform], **OWN.get(hardware.name, {})}


def payload(each: Instruction, devices: int) -> float:
    """Bytes of the whole that a collective makes or takes on a device."""
    total = hlo.size(each.shape)
    begins = each.opcode.endswith("-start")
    if each.kind in ("all-gather", "reduce-scatter") and begins:  # inputs and outputs, one of them the n-th part
        return total * devices / (devices + 1)
    if each.kind == "reduce-scatter":
        return total * devices
    # what an all-reduce takes stands in its shape since XLA of jax 0.12 only
    both = begins and (each.kind != "all-reduce" or each.shape.startswith("(("))
    return total / 2 if both else total


def passes(kind: str, devices: int) -> float:
    """How often the whole goes through a device's link, in a ring."""
    if kind in ("collective-permute", hlo.HOST):
        return 1.0
    return (2.0 if kind == "all-reduce" else 1.0) * (devices - 1) / devices


def estimate(program: Program, places: Places, dtype: str) -> Estimate:
    """Seconds of one step, from the program that the compiler made for these places."""
    return _Player(program, places, dtype).play()


class _Player:
    """Plays a program's schedule, computation by computation."""

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
        """Seconds of one pass of a computation that is run so often; adds to the result's sums."""
        computation = self.program.computations[name]
        clock, lanes, done = 0.0, defaultdict(float), {}
        started: dict[str, str] = {}
        held = {each.name: self.held(each) for each in computation.instructions.values()}
        last = {key: each for each, found in held.items() for key in found}
        # a computation of another core is handed its arrays as it is begun, or later
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
        """Seconds of a computation that another core runs: of this one's time it takes what is waited for."""
        before = dataclasses.replace(self.result)
        seconds = self.run(name, times)
        for part in ("products", "memory", "waiting", "launching"):
            setattr(self.result, part, getattr(before, part))
        return seconds

    def held(self, each: Instruction) -> dict[str, Instruction]:
        """Collectives of an instruction, by a key: on TPUs the same one may be in several fusions, a piece in each."""
        found = [each] if each.kind is not None else []
        found += [inner for _, inner in programs.inner_collectives(self.program, each)]
        tpu = self.places.topology.hardware.platform == "tpu"
        # of a GPU's program all collectives that a shard_map makes may have one channel
        return {f"{one.kind} {one.channel}" if tpu and one.channel else one.name: one for one in found}

    def send(self, key: str, each: Instruction, times: float) -> tuple[str, float]:
        """The lane of a collective, and its seconds; notes it."""
        if key not in self.groups and each.kind == hlo.HOST:
            self.groups[key] = ((), "host", self.places.topology.hardware.host, 1)
        elif key not in self.groups:
            groups = self.places.groups(each.attributes)
            link, rate = self.places.link(groups)
            if each.kind == "collective-permute" and link.startswith("torus"):
                rate = self.places.topology.hardware.link  # one way along one dimension
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
        """What a collective has to itself: a link; of a torus, one way along it, beside what goes the other way."""
        if each.kind != "collective-permute" or not link.startswith("torus"):
            return link
        steps = [target - source for source, target in groups_of(each.attributes, 0)]
        return f"{link}, {'up' if sum(step > 0 for step in steps) * 2 >= len(steps) else 'down'}"

    def work(self, computation: Computation, each: Instruction, times: float) -> float:
        """Seconds of an instruction by itself."""
        called = each.called()
        if each.opcode == "while":
            trips = self.program.trips(each)
            return trips * self.run(called["body"], times * trips) if trips else 0.0
        if each.opcode == "call":
            return self.run(called["to_apply"], times)
        if each.opcode == "conditional":
            return self.run(self.program.dearest(each), times)
        computed = list(products.products(self.program.computations, computation, each))
        flops = sum(one.flops for one in computed)
        moved = programs.moved(self.program, computation, each)
        if not flops and not moved:
            return 0.0
        # at the peak of their own type, as far as this hardware has one
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
