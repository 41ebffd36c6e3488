"""Parser for the text of a compiled module (HLO): computations, instructions and shapes."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2, "bf16": 2,
    "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "token": 0,
}  # fmt: skip
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
HOST = "host copy"
HOST_MEMORY = "S(5)"
"""What the layout of an array in host memory has in it."""
COPIES = ("copy", "copy-start", "dynamic-slice-start", "dynamic-update-slice-start", "fusion-start")
"""Instructions that copy an array or a slice of one. They transfer it if one of their arrays is in host memory."""
SLICES = {
    "ALL_GATHER": "all-gather", "ALL_REDUCE": "all-reduce", "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all", "ONE_TO_ONE": "collective-permute",
}  # fmt: skip
"""Names of the collectives between TPU slices in compiled programs."""
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "add-dependency", "opt-barrier", "async-done", "async-update", "send",
}  # fmt: skip
"""Instructions that move no bytes."""

_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\](\{[^}]*\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_END = re.compile(r"^\}(?:, execution_thread=\"\w+\")?\s*$")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|called_computations)=\{?%?([\w.\-]+)")


@dataclass
class Instruction:
    """One instruction of a computation. Shapes are kept as text."""

    name: str
    shape: str
    opcode: str
    operands: list[str]
    attributes: str
    root: bool = False
    """Whether this is the result of its computation."""

    @property
    def kind(self) -> str | None:
        """The collective that this instruction performs or starts; None if there is none.

        Between TPU slices a collective is a pair of send and recv. A copy from or to host memory counts as a
        collective, because it runs beside the other instructions.
        """
        base = self.opcode.removesuffix("-start")
        if self.opcode in COPIES and HOST_MEMORY in self.shape:
            return HOST
        if self.opcode == "recv" and (found := re.search(r'megascale_transfer_type="(\w+)"', self.attributes)):
            base = SLICES[found.group(1)]
        return base if base in COLLECTIVES else None

    @property
    def begins(self) -> bool:
        """Whether another instruction completes what this one starts."""
        return self.opcode == "recv" or self.opcode.endswith("-start")

    @property
    def channel(self) -> str | None:
        found = re.search(r"channel_id=(\d+)", self.attributes)
        return found.group(1) if found and self.opcode != "recv" else None

    @property
    def label(self) -> str:
        """The part of the model that the instruction comes from."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found.group(1) if found else self.name

    def called(self) -> dict[str, str]:
        return dict(_CALLED.findall(self.attributes))

    @property
    def target(self) -> str:
        """The target of a custom call; empty for other instructions."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found.group(1) if found else ""

    @property
    def runs(self) -> str | None:
        """The computation that a call runs once, in place or on another core."""
        if self.opcode not in ("call", "call-start", "custom-call-start"):
            return None
        called = self.called()
        return called.get("to_apply") or called.get("called_computations")


@dataclass
class Computation:
    """A computation's instructions, in the order in which they are issued."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """For each instruction, the instructions that use its result."""
        found: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for each in self.instructions.values():
            for name in dict.fromkeys(each.operands):
                found.setdefault(name, []).append(each)
        return found

    @property
    def root(self) -> Instruction:
        """The instruction whose result the computation returns."""
        return next((each for each in self.instructions.values() if each.root), [*self.instructions.values()][-1])


def read(text: str) -> tuple[str, dict[str, Computation]]:
    """The name of a module's entry computation, and all its computations by name."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in _lines(text):
        if current is None:
            if head := _HEAD.match(line):
                current = computations[head.group(2)] = Computation(head.group(2))
                entry = head.group(2) if head.group(1) else entry
        elif _END.match(line):
            _scattered(current)
            current = None
        elif found := _LINE.match(line):
            instruction = _instruction(found.group(2), found.group(3), root=found.group(1) is not None)
            current.instructions[instruction.name] = instruction
    return entry, computations


def _lines(text: str) -> Iterator[str]:
    """Lines of a program; the metadata of a kernel may span several lines, which are joined."""
    begun = ""
    for line in text.splitlines():
        alone = _HEAD.match(line) or _END.match(line) or _LINE.match(line) or not line.strip()
        if alone and begun:
            yield begun
            begun = ""
        begun += line
        if alone and not _LINE.match(line):
            yield begun
            begun = ""
    if begun:
        yield begun


def _scattered(computation: Computation) -> None:
    """Turn an all-reduce that a TPU fuses with a slice of its result into the reduce-scatter that it runs."""
    if computation.name.startswith("all-reduce-scatter"):
        root = computation.root
        for each in computation.instructions.values():
            if each.kind == "all-reduce":
                each.opcode, each.shape = "reduce-scatter", root.shape


def _instruction(name: str, rest: str, root: bool = False) -> Instruction:
    shape, rest = _balanced(rest) if rest.startswith("(") else rest.split(" ", 1)
    opcode, _, rest = rest.strip().partition("(")
    inside, attributes = _balanced("(" + rest)
    operands = [part.split()[-1].lstrip("%") for part in _split(inside[1:-1]) if part.strip()]
    return Instruction(name, shape, opcode.strip(), operands, attributes, root)


def _balanced(text: str) -> tuple[str, str]:
    """Split text after the parenthesis that it begins with."""
    depth = 0
    for index, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[: index + 1], text[index + 1 :]
    return text, ""


def _split(text: str) -> list[str]:
    text = re.sub(r"/\*.*?\*/", "", text)
    parts, depth, begin = [], 0, 0
    for index, letter in enumerate(text):
        depth += (letter in "({[") - (letter in ")}]")
        if letter == "," and depth == 0:
            parts.append(text[begin:index])
            begin = index + 1
    return [*parts, text[begin:]]


def arrays(shape: str) -> list[tuple[str, tuple[int, ...], str]]:
    """The element type, dimensions and layout of each array in a shape."""
    found = _ARRAY.findall(re.sub(r"/\*.*?\*/", "", shape))
    return [(kind, tuple(int(n) for n in dims.split(",") if n), layout) for kind, dims, layout in found]


def size(shape: str, memory_only: bool = False) -> float:
    """Bytes of a shape; `memory_only` leaves out arrays in the fast memory of a TPU core."""
    return sum(
        math.prod(dims) * BYTES.get(kind, 4)
        for kind, dims, layout in arrays(shape)
        if not (memory_only and "S(1)" in layout)
    )
