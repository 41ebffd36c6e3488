"""A compiled program read from its HLO text: what each instruction computes, moves and sends, and how often."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2, "bf16": 2,
    "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "token": 0,
}  # fmt: skip
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
HOST = "host copy"
SLICES = {
    "ALL_GATHER": "all-gather", "ALL_REDUCE": "all-reduce", "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all", "ONE_TO_ONE": "collective-permute",
}  # fmt: skip
"""Collectives between slices of TPUs, as their programs call them."""
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "add-dependency", "opt-barrier", "async-done", "async-update", "send",
}  # fmt: skip
"""Instructions that move nothing."""
NARROW = {"s8": "int8", "f8e4m3fn": "float8", "f8e5m2": "float8"}
"""Types whose products have a peak of their own in `hardware.TABLE`, and its name there."""

_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\](\{[^}]*\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition)=%?([\w.\-]+)")


@dataclass
class Instruction:
    """One line of a computation; shapes as text."""

    name: str
    shape: str
    opcode: str
    operands: list[str]
    attributes: str

    @property
    def kind(self) -> str | None:
        """Which collective this is or begins; None: none. Between slices of TPUs it is a pair of send and recv.

        A copy from or to the host's memory is taken for one, as it is under way beside all else.
        """
        base = self.opcode.removesuffix("-start")
        if self.opcode in ("copy", "copy-start") and "S(5)" in self.shape:
            return HOST
        if self.opcode == "recv" and (found := re.search(r'megascale_transfer_type="(\w+)"', self.attributes)):
            base = SLICES[found.group(1)]
        return base if base in COLLECTIVES else None

    @property
    def begins(self) -> bool:
        """Whether what it does is done at another instruction only."""
        return self.opcode == "recv" or self.opcode.endswith("-start")

    @property
    def channel(self) -> str | None:
        found = re.search(r"channel_id=(\d+)", self.attributes)
        return found.group(1) if found and self.opcode != "recv" else None

    @property
    def label(self) -> str:
        """Where in the model it comes from."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found.group(1) if found else self.name

    def called(self) -> dict[str, str]:
        return dict(_CALLED.findall(self.attributes))


@dataclass
class Computation:
    """Instructions in the order in which they are issued."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)


@dataclass
class Program:
    """All computations of a module."""

    entry: str
    computations: dict[str, Computation]

    def trips(self, loop: Instruction) -> int:
        """How often the body of a `while` runs: as the compiler notes it, or the bound in its condition."""
        noted = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if noted:
            return int(noted.group(1))
        condition = self.computations[loop.called()["condition"]]
        bounds = [
            int(found.group(1))
            for each in condition.instructions.values()
            if each.opcode == "constant" and (found := re.match(r"(\d+)", ",".join(each.operands)))
        ]
        return math.ceil(max(bounds, default=1) / self._stride(loop))

    def _stride(self, loop: Instruction) -> int:
        """By how much the body of a `while` counts on: products in windows take two at a time."""
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

    def walk(self, name: str | None = None, times: int = 1) -> Iterator[tuple[Computation, Instruction, int]]:
        """Every instruction that is issued by itself, and how often: of a fusion it, of branches the dearest."""
        computation = self.computations[name or self.entry]
        for each in computation.instructions.values():
            yield computation, each, times
            called = each.called()
            if each.opcode == "while":
                yield from self.walk(called["body"], times * self.trips(each))
            elif each.opcode == "call":
                yield from self.walk(called["to_apply"], times)
            elif each.opcode == "conditional":
                yield from self.walk(self.dearest(each), times)

    def dearest(self, choice: Instruction) -> str:
        """The branch of a `conditional` that moves and computes most: what a device may have to do."""
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
    """A program from the text of a compiled module."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            if head := _HEAD.match(line):
                current = computations[head.group(2)] = Computation(head.group(2))
                entry = head.group(2) if head.group(1) else entry
        elif line.rstrip() == "}":
            _scattered(current)
            current = None
        elif found := _LINE.match(line):
            instruction = _instruction(found.group(2), found.group(3))
            current.instructions[instruction.name] = instruction
    return Program(entry, computations)


def _scattered(computation: Computation) -> None:
    """Name a TPU's fusion of an all-reduce with the cut of its result for what it is carried out as."""
    if computation.name.startswith("all-reduce-scatter"):
        *_, root = computation.instructions.values()
        for each in computation.instructions.values():
            if each.kind == "all-reduce":
                each.opcode, each.shape = "reduce-scatter", root.shape


def _instruction(name: str, rest: str) -> Instruction:
    shape, rest = _balanced(rest) if rest.startswith("(") else rest.split(" ", 1)
    opcode, _, rest = rest.strip().partition("(")
    inside, attributes = _balanced("(" + rest)
    operands = [part.split()[-1].lstrip("%") for part in _split(inside[1:-1]) if part.strip()]
    return Instruction(name, shape, opcode.strip(), operands, attributes)


def _balanced(text: str) -> tuple[str, str]:
    """A parenthesis with all in it, and what follows."""
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
    """Element type, dimensions and layout of each array in a shape."""
    found = _ARRAY.findall(re.sub(r"/\*.*?\*/", "", shape))
    return [(kind, tuple(int(n) for n in dims.split(",") if n), layout) for kind, dims, layout in found]


def size(shape: str, memory_only: bool = False) -> float:
    """Bytes of a shape; with `memory_only` without what lies in the fast memory of a TPU core."""
    return sum(
        math.prod(dims) * BYTES.get(kind, 4)
        for kind, dims, layout in arrays(shape)
        if not (memory_only and "S(1)" in layout)
    )


def flops(program: Program, computation: Computation, each: Instruction) -> float:
    """FLOPs of the products that an instruction computes, inside a fusion too."""
    return sum(count for _, count in products(program, computation, each))


def products(program: Program, computation: Computation, each: Instruction) -> Iterator[tuple[str, float]]:
    """The products that an instruction computes, inside a fusion too: whose peak binds each, and its FLOPs.

    The peak is that of int8 or float8 if both factors are; "": of the compute dtype.
    """
    if each.opcode == "fusion" and (called := each.called().get("calls")):
        inside = program.computations[called]
        for inner in inside.instructions.values():
            yield from products(program, inside, inner)
    elif count := _product(computation, each):
        factors = (arrays(computation.instructions[name].shape) for name in each.operands[:2])
        kinds = {NARROW.get(found[0][0], "") if found else "" for found in factors}
        # a kernel of attention may take its masks first, as bytes
        matrices = each.opcode != "custom-call" or "gemm" in each.attributes or "cublas" in each.attributes
        yield kinds.pop() if matrices and len(kinds) == 1 else "", count


def _product(computation: Computation, each: Instruction) -> float:
    """FLOPs of an instruction that is a product by itself."""
    if each.opcode == "dot":
        left = arrays(computation.instructions[each.operands[0]].shape)[0][1]
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", each.attributes)
        inner = math.prod(left[int(i)] for i in contracted.group(1).split(",") if i) if contracted else 1
        return 2 * math.prod(arrays(each.shape)[0][1]) * inner
    if each.opcode == "convolution":
        return _convolution(computation, each)
    return _custom(computation, each) if each.opcode == "custom-call" else 0.0


def _convolution(computation: Computation, each: Instruction) -> float:
    """2 x what is multiplied: pairs of output and tap that meet an input, not padding or dilation's zeros."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", each.attributes)
    if labels is None:
        return 0.0
    left, kernel, out = labels.groups()
    left_dims, kernel_dims = (arrays(computation.instructions[name].shape)[0][1] for name in each.operands[:2])
    out_dims = arrays(each.shape)[0][1]
    total = 2.0 * out_dims[out.index("b")] * out_dims[out.index("f")] * kernel_dims[kernel.index("i")]
    window = re.search(r"window=\{([^}]*)\}", each.attributes)
    given = dict(part.split("=") for part in window.group(1).split()) if window else {}
    for axis in range(len(out_dims) - 2):
        taps, outs, ins = (
            dims[names.index(str(axis))] for names, dims in ((kernel, kernel_dims), (out, out_dims), (left, left_dims))
        )
        stride, spread, holes = (
            int(given[name].split("x")[axis]) if name in given else 1 for name in ("stride", "rhs_dilate", "lhs_dilate")
        )
        low = int(given["pad"].split("x")[axis].split("_")[0]) if "pad" in given else 0
        places = np.arange(outs)[:, None] * stride + np.arange(taps) * spread - low
        total *= int(((places >= 0) & (places <= (ins - 1) * holes) & (places % holes == 0)).sum())
    return total


def _custom(computation: Computation, each: Instruction) -> float:
    """Products of libraries' kernels: cuBLAS by its shapes, fused attention by those of queries and keys.

    Attention that is causal computes half of the scores. Forward two products, backward five (Dao et al. 2022): a
    kernel that gives the gradients of queries alone three, of keys and values four.
    """
    shapes = [arrays(computation.instructions[name].shape) for name in each.operands]
    dims: list[tuple[int, ...]] = [found[0][1] if found else () for found in shapes]
    if "fmha" in each.attributes:
        products = 5 if "Backward" in each.attributes else 2
        B, T, H, K = dims[0]
        half = 0.5 if "CAUSAL" in each.attributes else 1.0
        return products * 2 * B * H * T * dims[1][1] * K * half
    if "gemm" in each.attributes or "cublas" in each.attributes:
        contracted = re.search(r'"lhs_contracting_dimensions":\["(\d+)"', each.attributes)
        out = arrays(each.shape)[0][1]
        return 2 * math.prod(out) * dims[0][int(contracted.group(1))] if contracted else 0.0
    if "splash" in each.name or "flash" in each.name:
        # queries and keys come after the block masks, of bytes
        floats = [found[0][1] for found in shapes if found and found[0][0] in ("bf16", "f32")]
        queries, keys = [d for d in floats if len(d) > 2][:2]
        products = 3 if "dq" in each.name else 4 if "dkv" in each.name else 2
        return products * 2 * math.prod(queries) * keys[-2] * 0.5
    return 0.0


def moved(program: Program, computation: Computation, each: Instruction) -> float:
    """Bytes that an instruction reads from memory and writes to it; of an array that it cuts, the piece."""
    if each.opcode in FREE or each.kind is not None or each.opcode in ("while", "call", "conditional"):
        return 0.0
    if each.opcode.endswith(("-start", "-done")):
        return 0.0
    shapes = [computation.instructions[name].shape for name in each.operands if name in computation.instructions]
    called = each.called().get("calls")
    if each.opcode != "fusion" or called is None:
        if each.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * size(each.shape, memory_only=True)
        if each.opcode == "dynamic-update-slice":
            return 2 * size(shapes[1], memory_only=True)
        return size(each.shape, memory_only=True) + sum(size(shape, memory_only=True) for shape in shapes)
    inside = program.computations[called].instructions
    total = 0.0
    parameters = [inner for inner in inside.values() if inner.opcode == "parameter"]
    written = size(each.shape, memory_only=True)
    for inner in parameters:
        whole = size(inner.shape, memory_only=True)
        users = [user for user in inside.values() if inner.name in user.operands]
        if users and all(user.opcode in ("dynamic-slice", "slice", "gather") for user in users):
            whole = min(whole, sum(size(user.shape) for user in users))
        elif users and all(u.opcode == "dynamic-update-slice" and u.operands[0] == inner.name for u in users):
            # updated in place: what is written is the piece
            pieces = sum(size(inside[user.operands[1]].shape) for user in users)
            written += pieces - min(written, whole)
            whole = 0.0
        total += whole
    return total + max(written, 0.0)


def hosted(computation: Computation, each: Instruction) -> float:
    """Bytes in the host's memory that an instruction reads or writes itself, without a copy of their own."""
    if each.opcode in FREE or each.kind is not None or each.opcode in ("while", "call", "conditional"):
        return 0.0
    if each.opcode.endswith(("-start", "-done")):
        return 0.0
    total = size(each.shape) if "S(5)" in each.shape else 0.0
    for name in each.operands:
        source = computation.instructions.get(name)
        while source is not None and source.opcode == "bitcast":
            source = computation.instructions.get(source.operands[0])
        total += size(source.shape) if source is not None and "S(5)" in source.shape else 0.0
    return total


def inner_collectives(program: Program, each: Instruction) -> list[tuple[Computation, Instruction]]:
    """Collectives that an instruction is, begins, or holds: TPU programs carry them inside fusions."""
    called = each.called().get("calls")
    if called is None or called not in program.computations:
        return []
    inside = program.computations[called]
    own = [(inside, inner) for inner in inside.instructions.values() if inner.kind is not None]
    deeper = (inner_collectives(program, inner) for inner in inside.instructions.values())
    return own + list(itertools.chain.from_iterable(deeper))
