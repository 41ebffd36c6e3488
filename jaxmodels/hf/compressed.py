"""compressed-tensors, Hugging Face's format of quantized weights, read as codes or numbers; see `compressed_save`.

Each Linear has codes (out, in), scales (out, groups) and, where they are not symmetric, zero points of that shape.
Codes of four bits are packed eight to an int32 along the inputs, zero points along the outputs, each 8 higher.
Source: https://github.com/vllm-project/compressed-tensors, compressors pack_quantized and naive_quantized, 0.20.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.compress import coding
from jaxmodels.compress.codes import layout
from jaxmodels.errors import UserError
from jaxmodels.hf import files
from jaxmodels.hf.table import Settings, Slot, moved
from jaxmodels.models.coded import Coded, Kind, pack
from jaxmodels.models.model import Model

METHOD = "compressed-tensors"
FORMATS = {"int4": "pack-quantized", "int8": "int-quantized", "float8": "float-quantized"}
"""The format that holds each kind of our codes."""
NUMPY = {"I8": "<i1", "I32": "<i4", "I64": "<i8", "U8": "<u1"}
PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight")


def unpacked(words: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """Unpack signed codes of four or eight bits from int32."""
    found = np.ascontiguousarray(words).view(np.uint8)
    if bits == 4:
        found = np.stack([found & 15, found >> 4], -1).reshape(len(found), -1)
    return (found[:, :columns].astype(np.int16) - (1 << (bits - 1))).astype(np.int8)


@dataclass(frozen=True)
class Quantized:
    """A weight of a file in the format, which reads as numbers or as codes; it has the fields of `files.Tensor`."""

    parts: Mapping[str, files.Tensor]
    bits: int
    group: int | None

    dtype = "F32"

    @property
    def file(self) -> Path:
        return next(iter(self.parts.values())).file

    @property
    def shape(self) -> tuple[int, ...]:
        if "weight" in self.parts:
            return self.parts["weight"].shape
        return tuple(int(n) for n in raw(self.parts["weight_shape"]))

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    @property
    def kind(self) -> Kind:
        """What its codes are."""
        if self.bits == 4:
            return "int4"
        return "float8" if "weight" in self.parts and self.parts["weight"].dtype == "F8_E4M3" else "int8"

    @property
    def symmetric(self) -> bool:
        """Whether it has no zero points."""
        return "weight_zero_point" not in self.parts

    @property
    def grid(self) -> tuple[int, int]:
        """The shape of its scales, and of its zero points."""
        rows, columns = self.shape
        return rows, 1 if self.group is None else columns // self.group

    def codes(self) -> np.ndarray:
        """Read the codes: signed integers, or float8."""
        if "weight" in self.parts:
            return raw(self.parts["weight"])
        return unpacked(raw(self.parts["weight_packed"]), self.bits, self.shape[1])

    def scales(self) -> np.ndarray:
        """Read the scales as float32."""
        return self.parts["weight_scale"].read().astype(np.float32).reshape(self.grid)

    def zeros(self) -> np.ndarray | None:
        """Read the zero points, if it has any."""
        if self.symmetric:
            return None
        zeros = self.parts["weight_zero_point"]
        points = raw(zeros)
        return (points if zeros.dtype == "I8" else unpacked(points.T, self.bits, self.shape[0]).T).reshape(self.grid)

    def read(self) -> np.ndarray:
        """Read the weight and multiply its codes by their scales."""
        blocks = self.codes().astype(np.float32).reshape(*self.grid, -1)
        if (zeros := self.zeros()) is not None:
            blocks = blocks - zeros[..., None].astype(np.float32)
        return (blocks * self.scales()[..., None]).reshape(self.shape)

    def fits(self, slot: Slot, like: Coded) -> bool:
        """Say whether a leaf of such codes can hold those of the file as they are."""
        same = self.kind == like.kind and self.symmetric == (like.zeros is None) and like.factors is like.step is None
        return same and len(slot.weight.paths) == 1 and moved(slot, like.scales.shape).shape == self.grid

    def coded(self, slot: Slot, like: Coded) -> Coded:
        """Read the codes as the part of a leaf that the slot says, in host memory."""
        place, zeros = moved(slot, like.scales.shape), self.zeros()
        (codes,), (scales,) = slot.ours(self.codes()), place.ours(self.scales())
        held = codes if like.packed is None else jax.device_get(pack(jnp.asarray(codes), like.packed))
        points = None if zeros is None else place.ours(zeros)[0]
        return Coded(held, scales, points, kind=like.kind, packed=like.packed, activations=like.activations)

    def read_into(self, out: np.ndarray) -> None:
        """Read the weight into an array."""
        out[...] = self.read()

    def equals(self, other: Any) -> bool:
        """Say whether two weights are the same numbers."""
        return self.shape == other.shape and np.array_equal(self.read(), other.read())


def raw(tensor: files.Tensor) -> np.ndarray:
    """Read a tensor whose numbers are codes."""
    if tensor.dtype in files.DTYPES:
        return tensor.read()
    kind = files.FLOAT8 if tensor.dtype == "F8_E4M3" else np.dtype(NUMPY[tensor.dtype])
    found = np.fromfile(tensor.file, kind, tensor.size, offset=tensor.start)
    if len(found) != tensor.size:
        raise OSError(f"{tensor.file} ended early")
    return found.reshape(tensor.shape)


def check(s: Settings) -> None:
    """Refuse a `quantization_config` that is not computed here, and remark on one whose activations are quantized."""
    found = s.values.get("quantization_config")
    if found is None:
        return
    if not isinstance(found, dict) or found.get("quant_method") != METHOD:
        method = found.get("quant_method") if isinstance(found, dict) else None
        s.refused.append(f"a quantization_config of {method!r} (computed here: {METHOD})")
        return
    groups = found.get("config_groups")
    groups = [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []
    weights = [group["weights"] for group in groups if isinstance(group.get("weights"), dict)]
    if len(weights) != 1 or found.get("format") not in FORMATS.values():
        s.refused.append(
            f"quantization_config with the format {found.get('format')!r} and {len(weights)} groups (computed here: "
            f"one group in {', '.join(FORMATS.values())})"
        )
        return
    each = weights[0]
    if each.get("strategy") == "group" and type(each.get("group_size")) is not int:
        s.refused.append(f"groups of {each.get('group_size')!r} (computed here: a whole number)")
    if each.get("num_bits") not in (4, 8) or each.get("strategy") not in ("channel", "group") or each.get("actorder"):
        s.refused.append(
            f"weights of {each.get('num_bits')} bits by {each.get('strategy')}, actorder {each.get('actorder')!r} "
            "(computed here: 4 or 8 bits by channel or group, in order)"
        )
    if any(group.get("input_activations") for group in groups):
        s.remarks.append("quantized activations, which stay as they are here")


def section(model: Model, rows: Sequence[Sequence[Slot]], found: Mapping[str, Any]) -> coding.Quantized | None:
    """Return how a model holds the parameters whose tensors are codes in the files; None: there are none.

    A parameter that is made of other tensors too, or whose groups are none of its own inputs, is read as numbers.
    """
    first = next((each for each in found.values() if isinstance(each, Quantized)), None)
    if first is None:
        return None
    made = coding.Quantized(codes=first.kind, group=first.group, symmetric=first.symmetric)
    names, shapes = coding.named({"": model}), dict(jax.tree_util.tree_leaves_with_path(model.shapes()))
    sizes = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in shapes.items()}
    chosen: dict[str, list[str]] = {"matrix": [], "embedding": []}
    for row in rows:
        path = row[0].weight.paths[0]
        kind = names[f"/{path}"].kind if path in sizes else ""
        tensors = [(slot, found[slot.name]) for slot in row]
        if kind not in chosen or not all(isinstance(each, Quantized) for _, each in tensors):
            continue
        try:
            like = layout(sizes[path], names[f"/{path}"], made.spec)
        except UserError:
            continue
        if all(each.fits(slot, like) for slot, each in tensors):
            chosen[kind].append(path)
    if not chosen["matrix"]:
        return None
    every = {name[1:] for name, axes in names.items() if axes.kind == "matrix"}
    targets = ("*",) if every == {*chosen["matrix"]} else tuple(sorted(chosen["matrix"]))
    return dataclasses.replace(made, targets=targets, embeddings=tuple(sorted(chosen["embedding"])))


def joined(s: Settings, found: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Return the tensors of files with the parts of each quantized weight joined under the weight's name."""
    section = s.values.get("quantization_config")
    if section is None:
        return found
    weights = next(iter(section["config_groups"].values()))["weights"]
    group = weights.get("group_size") if weights["strategy"] == "group" else None
    parts: dict[str, dict[str, Any]] = {}
    for name, tensor in found:
        stem, _, last = name.rpartition(".")
        if last in PARTS:
            parts.setdefault(stem, {})[last] = tensor
    quantized = {stem: each for stem, each in parts.items() if "weight_scale" in each}
    wrong = [f"{stem}.weight" for stem, each in quantized.items() if not fits(each, weights["num_bits"], group)]
    if wrong:
        raise UserError(
            f"got {s.where} with codes of {wrong[0]} that do not fit their scales or bits, expected them as "
            f"{section['format']} has them, try a complete copy"
        )
    rest = [
        (name, each)
        for name, each in found
        if name.rpartition(".")[0] not in quantized or name.rpartition(".")[2] not in PARTS
    ]
    return rest + [(f"{stem}.weight", Quantized(each, weights["num_bits"], group)) for stem, each in quantized.items()]


def fits(parts: Mapping[str, files.Tensor], bits: int, group: int | None) -> bool:
    """Say whether the parts of a weight have the types and shapes that belong together."""
    if "weight" in parts:
        if parts["weight"].dtype not in ("I8", "F8_E4M3") or bits != 8 or len(parts["weight"].shape) != 2:
            return False
        rows, columns = parts["weight"].shape
    else:
        if not {"weight_packed", "weight_shape"} <= {*parts} or parts["weight_packed"].dtype != "I32":
            return False
        if parts["weight_shape"].shape != (2,) or parts["weight_shape"].dtype != "I64":
            return False
        rows, columns = (int(n) for n in raw(parts["weight_shape"]))
        if parts["weight_packed"].shape != (rows, -(-columns * bits // 32)):
            return False
    if group is not None and (group < 1 or columns % group):
        return False
    groups = 1 if group is None else columns // group
    zeros = parts.get("weight_zero_point")
    points = {"I8": (rows, groups), "I32": (-(-rows * bits // 32), groups)}
    return (
        parts["weight_scale"].dtype in files.DTYPES
        and parts["weight_scale"].size == rows * groups
        and (zeros is None or zeros.shape == points.get(zeros.dtype))
    )
