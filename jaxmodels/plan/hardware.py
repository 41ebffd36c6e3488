"""What hardware can do at most, from its makers' data sheets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Hardware:
    """One device."""

    names: tuple[str, ...]
    """Beginnings of `device_kind` as JAX reports it."""
    flops: dict[str, float]
    """Peak dense FLOP/s by compute dtype."""
    source: str


TABLE = (
    Hardware(("NVIDIA H200",), {"bfloat16": 989e12, "float32": 494e12}, "NVIDIA H200 data sheet: bf16, TF32, dense"),
    Hardware(("NVIDIA H100 PCIe",), {"bfloat16": 756e12, "float32": 378e12}, "NVIDIA H100 data sheet, PCIe"),
    Hardware(("NVIDIA H100 80GB HBM3",), {"bfloat16": 989e12, "float32": 494e12}, "NVIDIA H100 data sheet, SXM5"),
    Hardware(("NVIDIA A100",), {"bfloat16": 312e12, "float32": 156e12}, "NVIDIA A100 data sheet: bf16, TF32"),
    Hardware(("TPU v4",), {"bfloat16": 275e12}, "Google Cloud, TPU v4"),
    Hardware(("TPU v5 lite", "TPU v5e"), {"bfloat16": 197e12}, "Google Cloud, TPU v5e"),
    Hardware(("TPU v5p", "TPU v5"), {"bfloat16": 459e12}, "Google Cloud, TPU v5p"),
    Hardware(("TPU v6 lite", "TPU v6e"), {"bfloat16": 918e12}, "Google Cloud, TPU v6e"),
)


def peak(device: Any, dtype: str) -> float | None:
    """Peak FLOP/s of a device at a compute dtype; None where it is not in the table."""
    for row in TABLE:
        if device.device_kind.startswith(row.names):
            return row.flops.get(dtype)
    return None
