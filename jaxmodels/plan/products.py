"""The products that the instructions of a compiled program compute: those of XLA, and those of libraries' kernels.

A kernel is a custom call: what it computes stands nowhere, and is known here by its name, its shapes, and the options
that the compiler or our own code gave it. One that is not known is named (`unknown`), and no time is given.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from jaxmodels.models.kernels.visibility import Mask
from jaxmodels.plan.hlo import Computation, Instruction, arrays

NARROW = {"s8": "int8", "f8e4m3fn": "float8", "f8e5m2": "float8"}
"""Types whose products have a peak of their own in `hardware.TABLE`, and its name there."""
NO_PRODUCTS = re.compile(
    r"AllocateBuffer|AssumeGatherIndicesInBound|AsyncCollective|ConcatBitcast|GatherScatterIndices|PrepareAsyncCall|"
    r"PadToStatic|SliceId|SliceToDynamic|ZeroCrop|Sharding|SPMD|annotate|X64|callback|"
    r"[Ss]ort|[Tt]op_?[Kk]|threefry|Rng|MoveTo|LayoutConstraint"
)
"""Targets of custom calls that compute no products."""
ATTENTION = {"dq": 3, "dkv": 4, "fwd": 2}
"""Products of a splash kernel: forward two; backward, the gradients of queries, and those of keys and values."""


class Product(NamedTuple):
    """Products that an instruction computes."""

    peak: str
    """Whose peak binds them: int8 or float8 if both factors are; "": the compute dtype's."""
    flops: float
    attention: bool = False
    """Whether a fused kernel of attention computes them."""


def products(computations: Mapping[str, Computation], computation: Computation, each: Instruction) -> Iterator[Product]:
    """The products that an instruction computes, inside a fusion too."""
    if each.opcode == "fusion" and (called := each.called().get("calls")):
        inside = computations[called]
        for inner in inside.instructions.values():
            yield from products(computations, inside, inner)
    elif each.opcode in ("dot", "convolution"):
        count = _dot(computation, each) if each.opcode == "dot" else _convolution(computation, each)
        yield Product(_peak(computation, each), count)
    elif each.opcode == "reduce" and each.label.endswith(("dot_general", "conv_general_dilated")):
        # a product so thin that the compiler multiplies and adds up without its matrix units
        yield Product("", 2.0 * math.prod(_dims(computation, each)[0]))
    elif each.opcode == "custom-call" and (found := _custom(computation, each)) is not None and found.flops:
        yield found


def unknown(computations: Mapping[str, Computation], computation: Computation, each: Instruction) -> str | None:
    """The name of a kernel of which nobody knows what it computes; None: it is known, or no kernel."""
    if each.opcode.endswith("-start") and each.runs is not None:
        return None if each.runs in computations else each.name
    if each.opcode != "custom-call" or _custom(computation, each) is not None:
        return None
    return f"{each.name} ({each.target})"


def attention(label: str) -> str | None:
    """The kernel of attention that an instruction of this label is a part of; None: it is of none."""
    found = re.search(r"attend\[[^\]]*\]/(\w+)", label)
    return found and found.group(1)


def _dims(computation: Computation, each: Instruction) -> list[tuple[int, ...]]:
    """Dimensions of each operand."""
    shapes = (computation.instructions[name].shape for name in each.operands)
    return [found[0][1] if (found := arrays(shape)) else () for shape in shapes]


def _peak(computation: Computation, each: Instruction) -> str:
    factors = (arrays(computation.instructions[name].shape) for name in each.operands[:2])
    kinds = {NARROW.get(found[0][0], "") if found else "" for found in factors}
    return kinds.pop() if len(kinds) == 1 else ""


def _dot(computation: Computation, each: Instruction) -> float:
    left = _dims(computation, each)[0]
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", each.attributes)
    inner = math.prod(left[int(i)] for i in contracted.group(1).split(",") if i) if contracted else 1
    return 2.0 * math.prod(arrays(each.shape)[0][1]) * inner


def _convolution(computation: Computation, each: Instruction) -> float:
    """2 x what is multiplied: pairs of output and tap that meet an input or its padding, but not dilation's zeros.

    A product that a TPU's program writes as a convolution slides over padding which it does not compute. A kernel of
    cuDNN has the labels and the window of the convolution whose output, input or weights it computes.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", each.attributes)
    if labels is None:
        return 0.0
    left, kernel, out = labels.groups()
    first, second = _dims(computation, each)[:2]
    result = arrays(each.shape)[0][1]
    left_dims, kernel_dims, out_dims = first, second, result
    if "BackwardInput" in each.target:
        left_dims, kernel_dims, out_dims = result, second, first
    elif "BackwardFilter" in each.target:
        left_dims, kernel_dims, out_dims = first, result, second
    padded = each.target or each.label.endswith("conv_general_dilated")
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
        if padded:
            total *= outs * taps / holes
            continue
        low = int(given["pad"].split("x")[axis].split("_")[0]) if "pad" in given else 0
        places = np.arange(outs)[:, None] * stride + np.arange(taps) * spread - low
        total *= int(((places >= 0) & (places <= (ins - 1) * holes) & (places % holes == 0)).sum())
    return total


def _custom(computation: Computation, each: Instruction) -> Product | None:
    """The products of a library's kernel; None: it is not known."""
    if "fmha" in each.target:
        return _cudnn_attention(computation, each)
    if each.target.startswith("__cudnn$conv"):
        return Product(_peak(computation, each), _convolution(computation, each))
    if "gemm" in each.target or "cublas" in each.target:
        contracted = re.search(r'"lhs_contracting_dimensions":\s*\[([^\]]*)\]', each.attributes)
        left = _dims(computation, each)[0]
        inner = [left[int(i)] for i in re.findall(r"\d+", contracted.group(1))] if contracted else []
        made = arrays(each.shape)[0][1]
        return Product(_peak(computation, each), 2.0 * math.prod(made) * math.prod(inner)) if inner else None
    if each.name.startswith("ragged-dot-metadata") or NO_PRODUCTS.search(each.target):
        return Product("", 0.0)
    if each.name.startswith("ragged-dot"):
        # each row of the left with one group of the right, or both added up group by group
        left = _dims(computation, each)[-2]
        return Product("", 2.0 * math.prod(left) * arrays(each.shape)[0][1][-1])
    return _splash(computation, each) if "splash" in each.name else None


def _cudnn_attention(computation: Computation, each: Instruction) -> Product:
    """cuDNN's attention: two products forward, five backward, of what its mask shows (Dao et al. 2022)."""
    (B, T, H, K), (_, S, *_) = _dims(computation, each)[:2]
    window = re.search(r'"sliding_window_length":\s*"?(\d+)', each.attributes)
    kind = re.search(r'"mask_type":\s*"(\w+)"', each.attributes)
    # a mask that is given as an array hides nothing from the kernel
    mask = Mask(T, S, kind is not None and "CAUSAL" in kind.group(1), int(window.group(1)) or None if window else None)
    products = 5 if "Backward" in each.target else 2
    return Product("", 2.0 * products * B * H * K * mask.pairs(), attention=True)


def _splash(computation: Computation, each: Instruction) -> Product | None:
    """Splash attention, which computes all blocks of which its mask shows any; the mask is in its name's scope."""
    mask = Mask.of(each.label)
    kind = next((kind for kind in ATTENTION if kind in each.name), None)
    block = re.search(r'block_q\w*\\*": (\d+), \\*"block_kv\w*\\*": (\d+)', each.attributes)
    if mask is None or kind is None or block is None:
        return None
    # queries and keys come after the block masks, of bytes
    shapes = (arrays(computation.instructions[name].shape) for name in each.operands)
    floats = [found[0][1] for found in shapes if found and found[0][0] in ("bf16", "f32")]
    queries, keys = [dims for dims in floats if len(dims) > 2][:2]
    mask = mask._replace(queries=queries[-2], keys=keys[-2])
    pairs = mask.pairs((int(block.group(1)), int(block.group(2))))
    return Product("", 2.0 * ATTENTION[kind] * math.prod(queries) / queries[-2] * pairs, attention=True)
