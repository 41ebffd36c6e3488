"""The safetensors format: a header of JSON that says where each tensor lies, then the tensors.

Read and written here tensor by tensor, each at its place in the file, which neither maps files into the address space
nor holds a second copy of the model.
Source: https://huggingface.co/docs/safetensors (the format).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {name: jnp.dtype(kind) for name, kind in {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
}.items()}  # fmt: skip
"""Types that become float32."""
_CHUNK = 1 << 24


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def read(self) -> np.ndarray:
        """The tensor."""
        return self._elements(0, self.size).reshape(self.shape)

    def read_into(self, out: np.ndarray) -> None:
        """A float32 tensor, into an array without gaps."""
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start)
            rest = out.reshape(-1).view(np.uint8).data
            while len(rest):
                if not (count := file.readinto(rest)):
                    raise OSError(f"{self.file} ended early")
                rest = rest[count:]

    def equals(self, other: Tensor) -> bool:
        """Whether two tensors hold the same numbers; little of them is in memory at once."""
        if self.shape != other.shape:
            return False
        for at in range(0, self.size, _CHUNK):
            count = min(_CHUNK, self.size - at)
            a, b = self._elements(at, count), other._elements(at, count)
            if not np.array_equal(a, b, equal_nan=True):
                return False
        return True

    def _elements(self, at: int, count: int) -> np.ndarray:
        kind = DTYPES[self.dtype]
        found = np.fromfile(self.file, kind, count, offset=self.start + at * kind.itemsize)
        if len(found) != count:
            raise OSError(f"{self.file} ended early")
        return found


def header(path: Path) -> dict[str, Tensor]:
    """The tensors of a file.

    Raises:
        ValueError: it is no safetensors file, or part of it is missing.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= size - 8:
            raise ValueError(f"{path.name} is no safetensors file, or part of it is missing")
        try:
            entries = json.loads(file.read(length))
            entries.pop("__metadata__", None)
            tensors = {
                name: Tensor(path, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
                for name, entry in entries.items()
            }
            end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path.name} has a header that cannot be read") from error
    if 8 + length + end > size:
        raise ValueError(f"{path.name} is cut short: {size:,} bytes of {8 + length + end:,}")
    for name, tensor in tensors.items():
        if tensor.dtype in DTYPES:
            begin, stop = entries[name]["data_offsets"]
            if stop - begin != tensor.size * DTYPES[tensor.dtype].itemsize:
                raise ValueError(f"{path.name} has {name} of {stop - begin} bytes, which are not those of its shape")
    return tensors


def scan(directory: Path) -> tuple[list[tuple[str, Tensor]], list[str]]:
    """All tensors of a directory, from the headers alone, and what is wrong with its files."""
    index, problems, found = directory / INDEX, [], []
    where: dict[str, str] | None = None
    if index.is_file() and not (directory / WEIGHTS).is_file():
        try:
            where = dict(json.loads(index.read_text())["weight_map"])
        except (ValueError, KeyError, TypeError):
            return [], [f"{INDEX} cannot be read"]
        names = list(dict.fromkeys(where.values()))
    else:
        names = [WEIGHTS]
    for name in names:
        if not (directory / name).is_file():
            others = sorted(path.name for path in directory.glob("*.bin")) if where is None else []
            hint = f" (there is {others[0]}, which transformers' save_pretrained turns into one)" if others else ""
            problems.append(f"no file {name}{hint}")
            continue
        try:
            found += header(directory / name).items()
        except ValueError as error:
            problems.append(str(error))
    if where is not None and not problems:
        for name, tensor in found:
            if where.get(name) != tensor.file.name:
                said = f"says {where[name]}" if name in where else "does not name it"
                problems.append(f"{name} is in {tensor.file.name}, but {INDEX} {said}")
        here = {name for name, _ in found}
        problems += [
            f"{name} is not in {file}, where {INDEX} says it is" for name, file in where.items() if name not in here
        ]
    return found, problems


def write(path: Path, shapes: Mapping[str, tuple[int, ...]], tensors: Iterable[np.ndarray]) -> Iterator[int]:
    """Write float32 tensors in the order of `shapes`, taking one at a time; gives the bytes of each once written."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor, shape in zip(tensors, shapes.values(), strict=True):
            if tensor.shape != shape:
                raise ValueError(f"got a tensor of shape {tensor.shape}, expected {shape}")
            data = np.ascontiguousarray(tensor, "<f4")
            file.write(data.reshape(-1).view(np.uint8).data)
            yield data.nbytes
        file.flush()
        os.fsync(file.fileno())


def sharded(shapes: Mapping[str, tuple[int, ...]], limit: int) -> dict[str, dict[str, tuple[int, ...]]]:
    """Tensors by the file they go to, each of at most `limit` bytes or of one tensor alone."""
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    room = limit
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        if size > room and groups[-1]:
            groups.append({})
            room = limit
        groups[-1][name] = shape
        room -= size
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}
