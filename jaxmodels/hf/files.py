"""The safetensors format: a JSON header that gives the place of each tensor, followed by the tensors.

Tensors are read and written one by one, so that no file is mapped into memory and no second copy of the model is held.
Source: https://huggingface.co/docs/safetensors (the format).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
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
"""Types that are converted to float32."""
FLOAT8 = jnp.dtype("float8_e4m3fn")
_WRITTEN = {"F32": "<f4", "I8": "<i1", "I32": "<i4", "I64": "<i8", "F8_E4M3": FLOAT8}
BITS = {name: bits for bits, names in {
    4: ("F4",), 8: ("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 16: ("I16", "U16", "F16", "BF16"),
    32: ("I32", "U32", "F32"), 64: ("I64", "U64", "F64", "C64"),
}.items() for name in names}  # fmt: skip
"""Bits per number of each type."""
_CHUNK = 1 << 24
_HEADER = 100_000_000  # the format allows no longer header


@dataclass(frozen=True)
class Tensor:
    """The place of a tensor in a file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def read(self) -> np.ndarray:
        """Read the tensor."""
        return self._elements(0, self.size).reshape(self.shape)

    def read_into(self, out: np.ndarray) -> None:
        """Read a float32 tensor into a contiguous array."""
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start)
            rest = out.reshape(-1).view(np.uint8).data
            while len(rest):
                if not (count := file.readinto(rest)):
                    raise OSError(f"{self.file} ended early")
                rest = rest[count:]

    def equals(self, other: Tensor) -> bool:
        """Say whether two tensors hold the same numbers, comparing them in small pieces."""
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


@dataclass(frozen=True)
class Written:
    """A tensor that is to be written."""

    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]
    dtype: str = "F32"


def metadata(path: Path) -> dict[str, str]:
    """Read what a file says of itself, whose header `header` has found whole."""
    with path.open("rb") as file:
        found = (json_object(file.read(int.from_bytes(file.read(8), "little"))) or {}).get("__metadata__")
    return {name: text for name, text in found.items() if isinstance(text, str)} if isinstance(found, dict) else {}


def header(path: Path) -> dict[str, Tensor]:
    """Read the tensors' places from a file's header; they follow each other without gaps and fill the file.

    Raises:
        ValueError: it is not a safetensors file, or its header is inconsistent.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, _HEADER):
                raise ValueError(f"{path.name} is no safetensors file, or part of it is missing")
            text = file.read(length)
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read ({error.strerror})") from error
    entries = json_object(text)
    if entries is None:
        raise ValueError(f"{path.name} has a header that cannot be read")
    entries.pop("__metadata__", None)
    tensors, spans = {}, {}
    for name, entry in entries.items():
        if (wrong := _wrong(entry)) is not None:
            raise ValueError(f"{path.name} has {_short(name)} with {wrong}")
        start, stop = spans[name] = entry["data_offsets"]
        tensors[name] = Tensor(path, entry["dtype"], tuple(entry["shape"]), 8 + length + start)
        bits = BITS.get(entry["dtype"])
        if bits is not None and 8 * (stop - start) != tensors[name].size * bits:
            raise ValueError(f"{path.name} has {name} of {stop - start} bytes, which are not those of its shape")
    end = max((stop for _, stop in spans.values()), default=0)
    if 8 + length + end > size:
        raise ValueError(f"{path.name} is cut short: {size:,} bytes of {8 + length + end:,}")
    at = 0
    for name, (start, stop) in sorted(spans.items(), key=lambda item: item[1]):
        if start != at:
            raise ValueError(f"{path.name} has {name} from byte {start}, expected {at}, where the one before it ends")
        at = stop
    if 8 + length + at != size:
        raise ValueError(f"{path.name} has {size - 8 - length - at:,} bytes behind its last tensor")
    return tensors


def _wrong(entry: Any) -> str | None:
    """Return what is wrong with a header's entry for a tensor, or None."""
    if not isinstance(entry, dict):
        return f"{_short(entry)}, expected dtype, shape and data_offsets"
    kind, shape, offsets = (entry.get(name) for name in ("dtype", "shape", "data_offsets"))
    if not isinstance(kind, str):
        return f"dtype {_short(kind)}, expected one such as F32"
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 2**48 for n in shape) or len(shape) > 32:
        return f"shape {_short(shape)}, expected whole numbers"
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(type(n) is int for n in offsets)
        or not 0 <= offsets[0] <= offsets[1]
    ):
        return f"data_offsets {_short(offsets)}, expected where it begins and ends"
    return None


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def json_object(text: bytes) -> dict[str, Any] | None:
    """Parse a JSON object without repeated names; None where the text is not one."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name stands twice")
        return found

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _index(path: Path) -> dict[str, str] | None:
    """Return the file of each tensor by the index; None where the index cannot be read."""
    try:
        where = (json_object(path.read_bytes()) or {}).get("weight_map")
    except OSError:
        return None
    if not isinstance(where, dict) or not where:
        return None
    # a path instead of a file name might lead out of the directory
    names = [name for name in where.values() if not (isinstance(name, str) and name.endswith(".safetensors"))]
    return None if names or any(Path(name).name != name for name in where.values()) else where


def scan(directory: Path) -> tuple[list[tuple[str, Tensor]], list[str]]:
    """Return all tensors of a directory, read from the headers alone, and what is wrong with its files."""
    index, problems, found = directory / INDEX, [], []
    where: dict[str, str] | None = None
    if index.is_file() and not (directory / WEIGHTS).is_file():
        where = _index(index)
        if where is None:
            return [], [f"{INDEX} has no weight_map that names a file such as {WEIGHTS} for each tensor"]
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
                message = f"says {where[name]}" if name in where else "does not name it"
                problems.append(f"{name} is in {tensor.file.name}, but {INDEX} {message}")
        here = {name for name, _ in found}
        problems += [
            f"{name} is not in {file}, where {INDEX} says it is" for name, file in where.items() if name not in here
        ]
    return found, problems


def write(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[np.ndarray],
    counters: Mapping[str, int] | None = None,
    metadata: Mapping[str, str] | None = None,
    dtypes: Mapping[str, str] | None = None,
) -> Iterator[int]:
    """Write tensors in the order of `shapes`, one at a time; yield the bytes of each once it is written.

    They are float32, but for those that `dtypes` names; wider ones come first, or a reader could not map them.
    `counters` are scalar int64 tensors, which are written first, as the format puts wider types first; `said` is more
    that the file says of itself.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    counted, end = counters or {}, 0
    for name in counted:
        start, end = end, end + 8
        entries[name] = {"dtype": "I64", "shape": [], "data_offsets": [start, end]}
    for name, shape in shapes.items():
        kind = (dtypes or {}).get(name, "F32")
        start, end = end, end + BITS[kind] // 8 * math.prod(shape)
        entries[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.write(np.array([*counted.values()], "<i8").tobytes())
        for tensor, (name, shape) in zip(tensors, shapes.items(), strict=True):
            if tensor.shape != shape:
                raise ValueError(f"got a tensor of shape {tensor.shape}, expected {shape}")
            data = np.ascontiguousarray(tensor, _WRITTEN[entries[name]["dtype"]])
            file.write(data.reshape(-1).view(np.uint8).data)
            yield data.nbytes
        file.flush()
        os.fsync(file.fileno())


def sharded(shapes: Mapping[str, tuple[int, ...]], limit: int) -> dict[str, dict[str, tuple[int, ...]]]:
    """Assign tensors to files, each of at most `limit` bytes unless it holds a single tensor."""
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
