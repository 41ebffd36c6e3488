"""FLOPs of the matrix products in a compiled program: XLA's own instructions and the kernels of libraries.

A kernel is a custom call, whose FLOPs the program does not state. They follow from its name, its shapes, and the
options that the compiler or our own code gave it. A kernel that is not known here is reported (`unknown`), and the plan
gives no time.
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
"""Element types whose products have their own peak in `hardware.TABLE`, and the name of that peak."""
NO_PRODUCTS = re.compile(
    r"AllocateBuffer|AssumeGatherIndicesInBound|AsyncCollective|ConcatBitcast|GatherScatterIndices|PrepareAsyncCall|"
    r"PadToStatic|SliceId|SliceToDynamic|ZeroCrop|Sharding|SPMD|annotate|X64|callback|"
    r"[Ss]ort|[Tt]op_?[Kk]|threefry|Rng|MoveTo|LayoutConstraint"
)
"""Custom calls that compute no products."""
ATTENTION = {"dq": 3, "dkv": 4, "fwd": 2}
"""Products that a splash kernel computes: in the forward pass, for queries' gradients, for those of keys and values."""


class Product(NamedTuple):
    """FLOPs that an instruction computes, and the peak that limits them."""

    peak: str
    """The peak that applies: int8 or float8 if both factors have that type, "" for the compute dtype's."""
    flops: float
    attention: bool = False
    """Whether a fused attention kernel computes them."""


def products(computations: Mapping[str, Computation], computation: Computation, each: Instruction) -> Iterator[Product]:
    """The products that an instruction computes, including those inside a fusion."""
    if each.opcode == "fusion" and (called := each.called().get("calls")):
        inside = computations[called]
        for inner in inside.instructions.values():
            yield from products(computations, inside, inner)
    elif each.opcode in ("dot", "convolution"):
        count = _dot(computation, each) if each.opcode == "dot" else _convolution(computation, each)
        yield Product(_peak(computation, each), count)
    elif each.opcode == "reduce" and each.label.endswith(("dot_general", "conv_general_dilated")):
        # a product so thin that the compiler computes it without the matrix units
        yield Product("", 2.0 * math.prod(_dims(computation, each)[0]))
    elif each.opcode == "custom-call" and (found := _custom(computation, each)) is not None and found.flops:
        yield found


def unknown(computations: Mapping[str, Computation], computation: Computation, each: Instruction) -> str | None:
    """The name of a kernel whose FLOPs are not known; None if they are, or if the instruction is no kernel."""
    if each.opcode.endswith("-start") and each.runs is not None:
        return None if each.runs in computations else each.name
    if each.opcode != "custom-call" or _custom(computation, each) is not None:
        return None
    return f"{each.name} ({each.target})"


def attention(label: str) -> str | None:
    """The attention kernel that an instruction with this label belongs to; None if it belongs to none."""
    found = re.search(r"attend\[[^\]]*\]/(\w+)", label)
    return found and found.group(1)


def _dims(computation: Computation, each: Instruction) -> list[tuple[int, ...]]:
    """The dimensions of each operand."""
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
    """FLOPs of a convolution: two for each pair of output and tap, except where dilation puts a zero.

    Taps on padding count. They do not count in a matrix product that a TPU's compiler writes as a convolution, since
    the TPU skips them there. A cuDNN kernel has the dimension labels and the window of the forward convolution, whether
    it computes its output or the gradient of its input or weights.
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
    """The products of a library's kernel; None if it is not known."""
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
        # each row of the left factor meets one group of the right, or both are contracted group by group
        left = _dims(computation, each)[-2]
        return Product("", 2.0 * math.prod(left) * arrays(each.shape)[0][1][-1])
    return _splash(computation, each) if "splash" in each.name else None


def _cudnn_attention(computation: Computation, each: Instruction) -> Product:
    """cuDNN's attention: two products forward and five backward, of the pairs that its mask shows.

    Source: Dao et al. 2022.
    """
    (B, T, H, K), (_, S, *_) = _dims(computation, each)[:2]
    window = re.search(r'"sliding_window_length":\s*"?(\d+)', each.attributes)
    kind = re.search(r'"mask_type":\s*"(\w+)"', each.attributes)
    # the kernel computes every pair of a mask that is given as an array
    mask = Mask(T, S, kind is not None and "CAUSAL" in kind.group(1), int(window.group(1)) or None if window else None)
    products = 5 if "Backward" in each.target else 2
    return Product("", 2.0 * products * B * H * K * mask.pairs(), attention=True)


def _splash(computation: Computation, each: Instruction) -> Product | None:
    """Splash attention, which computes each block in which its mask shows a pair; its name scope states the mask."""
    mask = Mask.of(each.label)
    kind = next((kind for kind in ATTENTION if kind in each.name), None)
    block = re.search(r'block_q\w*\\*": (\d+), \\*"block_kv\w*\\*": (\d+)', each.attributes)
    if mask is None or kind is None or block is None:
        return None
    # queries and keys come after the block masks, which are arrays of bytes
    shapes = (arrays(computation.instructions[name].shape) for name in each.operands)
    floats = [found[0][1] for found in shapes if found and found[0][0] in ("bf16", "f32")]
    queries, keys = [dims for dims in floats if len(dims) > 2][:2]
    mask = mask._replace(queries=queries[-2], keys=keys[-2])
    pairs = mask.pairs((int(block.group(1)), int(block.group(2))))
    return Product("", 2.0 * ATTENTION[kind] * math.prod(queries) / queries[-2] * pairs, attention=True)
