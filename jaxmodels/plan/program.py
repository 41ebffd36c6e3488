"""A compiled program: what its instructions compute, move and send, and how often they run."""

from __future__ import annotations

import collections
import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from jaxmodels.plan import hlo, products
from jaxmodels.plan.hlo import FREE, Computation, Instruction, size

SLICES = ("dynamic-slice", "slice", "gather")
"""Instructions that read a slice of their first operand."""
EMPTY = ("AllocateBuffer", "AssumeGatherIndicesInBound", "ConcatBitcast")
"""Custom calls that name a buffer without reading or writing it."""
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
"""Instructions that write a slice of their first operand in place, and the index of the operand that is written."""


@dataclass
class Program:
    """The computations of a compiled module."""

    entry: str
    computations: dict[str, Computation]

    def trips(self, loop: Instruction) -> float:
        """How often the body of a `while` runs; 1 if that is not known (see `uncounted`)."""
        return 1.0 if (turns := self._told(loop)) is None else turns

    def _told(self, loop: Instruction) -> float | None:
        """Trips that the compiler notes, that the loop's name states (`kernel.loop`), or that its condition bounds."""
        noted = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if noted:
            return float(noted.group(1))
        if named := re.search(r"trips\[([\d.e+-]+)\]/while$", loop.label):
            return float(named.group(1))
        condition = self.computations[loop.called()["condition"]]
        bounds = [
            int(found.group(1))
            for each in condition.instructions.values()
            if each.opcode == "constant" and (found := re.match(r"(\d+)", ",".join(each.operands)))
        ]
        return math.ceil(max(bounds) / self._stride(loop)) if bounds else None

    def taken(self, choice: Instruction) -> float:
        """The share of a `conditional`'s runs in which the dearest branch is taken: 1, or as its name states.

        See `kernel.branch`.
        """
        named = re.search(r"share\[([\d.e+-]+)\]/cond$", choice.label)
        return float(named.group(1)) if named else 1.0

    def uncounted(self) -> list[str]:
        """Names of kernels whose FLOPs are not known, and of loops of unknown length that contain products."""
        found: dict[str, None] = {}
        for where, each, _ in self.walk():
            inside = [(where, each)]
            if each.opcode == "fusion" and (called := self.computations.get(each.called().get("calls", ""))):
                inside += [(called, inner) for inner in called.instructions.values()]
            names = [products.unknown(self.computations, *one) for one in inside]
            if each.opcode == "while" and self._told(each) is None:
                body = self.walk(each.called()["body"])
                names += [f"the loop {each.label}"] * any(flops(self, inside, one) for inside, one, _ in body)
            found |= dict.fromkeys(name for name in names if name)
        return list(found)

    def uses_host(self) -> bool:
        """Whether the program keeps arrays in host memory."""
        return any(hlo.HOST_MEMORY in each.shape for _, each, _ in self.walk())

    def kernels(self) -> list[str]:
        """The attention kernels that the program uses."""
        found = (products.attention(each.label) for _, each, _ in self.walk())
        return sorted({name for name in found if name})

    def parts(self) -> dict[str, float]:
        """FLOPs of a step by the label of the instruction: its function and name scopes."""
        found: dict[str, float] = collections.defaultdict(float)
        for where, each, times in self.walk():
            if computed := flops(self, where, each):
                found[each.label] += times * computed
        return dict(found)

    def _stride(self, loop: Instruction) -> int:
        """The increment of a loop's counter: a windowed product handles two windows per trip."""
        condition, body = (self.computations[loop.called()[name]].instructions for name in ("condition", "body"))
        compared = next((each for each in condition.values() if each.opcode == "compare"), None)
        counter = condition.get(compared.operands[0]) if compared else None
        place = re.search(r"index=(\d+)", counter.attributes) if counter else None
        last = [each for each in body.values() if each.opcode == "tuple"]
        if place is None or not last:
            return 1
        name, stride = last[-1].operands[int(place.group(1))], 0
        while (each := body.get(name)) is not None and each.opcode in ("add", "copy", "bitcast"):
            constants = [other for other in each.operands if body[other].opcode == "constant"]
            stride += sum(int(",".join(body[other].operands)) for other in constants)
            rest = [other for other in each.operands if other not in constants]
            if not rest:
                break
            name = rest[0]
        return max(stride, 1)

    def walk(self, name: str | None = None, times: float = 1) -> Iterator[tuple[Computation, Instruction, float]]:
        """Every issued instruction with the number of times that it runs.

        A fusion is one instruction. Of the branches of a conditional the most expensive one is walked.
        """
        computation = self.computations[name or self.entry]
        for each in computation.instructions.values():
            yield computation, each, times
            called = each.called()
            if each.opcode == "while":
                yield from self.walk(called["body"], times * self.trips(each))
            elif (inside := each.runs) in self.computations:
                yield from self.walk(inside, times)
            elif each.opcode == "conditional":
                yield from self.walk(self.dearest(each), times * self.taken(each))

    def dearest(self, choice: Instruction) -> str:
        """The branch of a `conditional` that moves and computes most, which a device may have to run."""
        branches = re.search(r"branch_computations=\{([^}]*)\}", choice.attributes)
        if branches:
            names = [name.strip().lstrip("%") for name in branches.group(1).split(",")]
        else:
            names = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", choice.attributes)

        def cost(name: str) -> float:
            issued = self.walk(name)
            return sum(
                times * (flops(self, inside, each) + moved(self, inside, each)) for inside, each, times in issued
            )

        return max(names, key=cost)


def parse(text: str) -> Program:
    """Parse the text of a compiled module."""
    return Program(*hlo.read(text))


def flops(program: Program, computation: Computation, each: Instruction) -> float:
    """FLOPs of the products that an instruction computes, including those inside a fusion."""
    return sum(product.flops for product in products.products(program.computations, computation, each))


def waits(each: Instruction) -> bool:
    """Whether an instruction moves nothing itself, because other instructions do it before, inside or beside it."""
    beside = each.opcode.endswith(("-start", "-update", "-done")) or each.kind is not None
    return beside or each.opcode in FREE or each.opcode in ("while", "call", "conditional") or each.target in EMPTY


def moved(program: Program, computation: Computation, each: Instruction) -> float:
    """Bytes that an instruction reads from memory and writes to it; of an array that it slices, only the slice."""
    if waits(each):
        return 0.0
    names = [name for name in dict.fromkeys(each.operands) if name in computation.instructions]
    read = sum(_read(program, each, name, computation.instructions[name].shape) for name in names)
    return read + _written(program, computation, each)


def _read(program: Program, each: Instruction, name: str, shape: str) -> float:
    """Bytes of an operand that an instruction reads."""
    whole, inside = size(shape, memory_only=True), program.computations.get(each.called().get("calls", ""))
    if each.opcode == "fusion" and inside is not None:
        total = 0.0
        for inner in inside.instructions.values():
            place = int(inner.operands[0]) if inner.opcode == "parameter" else -1
            if place >= 0 and each.operands[place] == name:
                total += _used(program, inside, inner)
        return min(whole, total)
    if each.operands[0] == name and each.opcode in SLICES:
        return min(whole, size(each.shape))
    return 0.0 if each.operands[0] == name and each.opcode in UPDATES else whole


def _used(program: Program, inside: Computation, each: Instruction) -> float:
    """Bytes of a value that its users inside a fusion read; an update in place reads none."""
    total = 0.0
    for user in inside.users[each.name]:
        if user.opcode in ("bitcast", "reshape"):
            total += _used(program, inside, user)
        elif user.opcode not in ("tuple", "get-tuple-element"):
            total += _read(program, user, each.name, each.shape)
    return total if inside.users[each.name] else size(each.shape)


def _written(program: Program, computation: Computation, each: Instruction) -> float:
    """Bytes that an instruction writes; an update in place writes only the slice."""
    while each.opcode in ("bitcast", "reshape"):
        source = computation.instructions[each.operands[0]]
        if source.opcode == "parameter":
            break
        each = source
    if each.opcode in UPDATES:
        piece = computation.instructions[each.operands[UPDATES[each.opcode]]]
        whole = size(each.shape, memory_only=True)
        # a scatter adds to the slice, so it reads it as well
        return min(whole, (2 if each.opcode == "scatter" else 1) * size(piece.shape))
    inside = program.computations.get(each.called().get("calls", ""))
    if each.opcode != "fusion" or inside is None:
        return size(each.shape, memory_only=True)
    root, whole = inside.root, size(each.shape, memory_only=True)
    made = [inside.instructions[name] for name in root.operands] if root.opcode == "tuple" else [root]
    return min(whole, sum(_written(program, inside, one) for one in made))


def hosted(computation: Computation, each: Instruction) -> float:
    """Bytes of host memory that an instruction reads or writes directly, without a separate copy."""
    if waits(each):
        return 0.0
    total = size(each.shape) if hlo.HOST_MEMORY in each.shape else 0.0
    for name in each.operands:
        source = computation.instructions.get(name)
        while source is not None and source.opcode == "bitcast":
            source = computation.instructions.get(source.operands[0])
        total += size(source.shape) if source is not None and hlo.HOST_MEMORY in source.shape else 0.0
    return total


def inner_collectives(program: Program, each: Instruction) -> list[tuple[Computation, Instruction]]:
    """Collectives inside a fusion: TPU programs fuse them with other work."""
    called = each.called().get("calls")
    if called is None or called not in program.computations:
        return []
    inside = program.computations[called]
    own = [(inside, inner) for inner in inside.instructions.values() if inner.kind is not None]
    deeper = (inner_collectives(program, inner) for inner in inside.instructions.values())
    return own + list(itertools.chain.from_iterable(deeper))
