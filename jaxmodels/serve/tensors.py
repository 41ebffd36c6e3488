"""Tensors of the Open Inference Protocol, in JSON or behind it as bytes."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from jaxmodels.fields import shown
from jaxmodels.serve.errors import Refused
from jaxmodels.serve.forms import Schema, fits

TYPES: Mapping[str, Any] = {
    "BOOL": np.bool_,
    **{f"{sign}INT{bits}": np.dtype(f"{sign.lower()}int{bits}") for sign in ("", "U") for bits in (8, 16, 32, 64)},
    "FP16": np.float16,
    "FP32": np.float32,
    "FP64": np.float64,
    "BYTES": np.object_,
}
"""The datatypes of the protocol."""
LARGEST = 1 << 28
FORM: Schema = {
    "shape": {"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": 1, "maxItems": 8},
    "datatype": {"enum": list(TYPES)},
}
"""What a tensor of a request says of itself."""


def read(told: Mapping[str, Any], rest: memoryview) -> tuple[np.ndarray, int]:
    """Read a tensor of a request; `rest` are the bytes behind the JSON. Returns it, and how many of them it took.

    Raises:
        Refused: it is not what its shape and datatype say.
    """
    name, shape, datatype = told["name"], told.get("shape"), told.get("datatype")
    if not isinstance(datatype, str) or not fits(FORM["datatype"], datatype):
        raise Refused(400, f"got datatype {shown(datatype)} of input {name}, expected one of {', '.join(TYPES)}")
    if not isinstance(shape, list) or not fits(FORM["shape"], shape):
        raise Refused(400, f"got shape {shown(shape)} of input {name}, expected a list of numbers above 0")
    count = math.prod(shape)
    if count > LARGEST:
        raise Refused(413, f"got input {name} with {count} values, expected fewer")
    size = (told.get("parameters") or {}).get("binary_data_size")
    if size is None:
        return _from_json(name, told.get("data"), shape, datatype), 0
    if type(size) is not int or not 0 <= size <= len(rest):
        raise Refused(400, f"got binary_data_size {shown(size)} of input {name}, expected at most {len(rest)}")
    return _from_bytes(name, rest[:size], shape, datatype), size


def _from_json(name: str, data: Any, shape: list[int], datatype: str) -> np.ndarray:
    try:
        if datatype == "BYTES":
            values = np.empty(math.prod(shape), object)
            flat = list(_flat(data))
            if len(flat) != len(values) or not all(isinstance(text, str) for text in flat):
                raise ValueError
            values[:] = [text.encode("utf-8", "surrogatepass") for text in flat]
            return values.reshape(shape)
        found = np.asarray(data)
        if found.dtype.kind not in "biuf" or (found.dtype.kind == "f" and np.dtype(TYPES[datatype]).kind in "iub"):
            raise ValueError
        with np.errstate(over="raise"):
            cast = found.astype(TYPES[datatype])
        if found.dtype.kind in "biu" and np.dtype(TYPES[datatype]).kind in "iub" and (cast != found).any():
            raise ValueError
        return cast.reshape(shape)
    except (ValueError, TypeError, OverflowError, FloatingPointError, RecursionError):
        raise Refused(400, f"got data of input {name} that is no {datatype} of shape {shape}, expected it") from None


def _flat(data: Any) -> Iterator[Any]:
    if isinstance(data, list):
        for each in data:
            yield from _flat(each)
    else:
        yield data


def _from_bytes(name: str, data: memoryview, shape: list[int], datatype: str) -> np.ndarray:
    count = math.prod(shape)
    if datatype == "BYTES":
        found, at = [], 0
        while at + 4 <= len(data) and len(found) < count:
            (size,) = struct.unpack_from("<I", data, at)
            found.append(bytes(data[at + 4 : at + 4 + size]))
            at += 4 + size
        if at == len(data) and len(found) == count:
            values = np.empty(count, object)
            values[:] = found
            return values.reshape(shape)
    elif len(data) == count * np.dtype(TYPES[datatype]).itemsize:
        return np.frombuffer(data, TYPES[datatype]).reshape(shape)
    raise Refused(400, f"got {len(data)} bytes for input {name}, expected those of {datatype} of shape {shape}")


def write(name: str, value: np.ndarray, binary: bool) -> tuple[dict[str, Any], bytes]:
    """An output as JSON, and the bytes behind it if it is `binary`."""
    text = value.dtype == object
    datatype = "BYTES" if text else next(key for key, kind in TYPES.items() if np.dtype(kind) == value.dtype)
    told: dict[str, Any] = {"name": name, "datatype": datatype, "shape": list(value.shape)}
    if not binary:
        return {**told, "data": value.reshape(-1).tolist()}, b""
    parts = (text.encode() for text in value.reshape(-1)) if text else ()
    raw = b"".join(struct.pack("<I", len(part)) + part for part in parts) if text else value.tobytes()
    return {**told, "parameters": {"binary_data_size": len(raw)}}, raw
