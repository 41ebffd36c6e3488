"""What hardware can do, as data: peak rates, memory and links of one device, from the vendors' documents."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from jaxmodels.errors import UserError, nearest

GIB = 2**30


@dataclass(frozen=True)
class Hardware:
    """One device: a GPU, or a TPU chip (half a chip of v7). Units are bytes and seconds."""

    name: str
    """The name that users ask for: h100, v5e."""
    kinds: tuple[str, ...]
    """Prefixes of `device_kind` as JAX reports it."""
    platform: Literal["cuda", "tpu"]
    flops: dict[str, float]
    """Peak dense FLOP/s by compute dtype (float32 on GPUs: TF32)."""
    memory: float
    """Bytes available to programs."""
    bandwidth: float
    """Bytes per second between memory and compute units."""
    link: float
    """Bytes per second one way: from a GPU to its node's switch, or over one link of a TPU's torus."""
    network: float
    """Bytes per second one way from a device to other nodes or slices."""
    host: float
    """Bytes per second one way between a device and host memory; 0: not published."""
    source: str
    node: int = 8
    """Devices joined by the fast switch (GPUs), or driven by one host (TPUs)."""
    dimensions: int = 0
    """Dimensions of the torus (TPUs)."""
    wraps: int = 0
    """Smallest number of chips along a dimension, in whole multiples of 4 or 16, whose ends are joined (TPUs)."""
    per_chip: int = 1
    """Devices that JAX sees per chip (TPUs)."""
    compiler: tuple[str, str] = ("", "default")
    """The compiler's name for the chip, if it differs, and how its cores are used (TPUs)."""
    host_memory: float = 0.0
    """Bytes of host memory for each device; 0: not published."""
    cores: int = 0
    """Streaming multiprocessors (GPUs)."""
    target: str = ""
    """The part of XLA's target config that differs between GPUs, by which it compiles without one."""

    @property
    def capability(self) -> tuple[int, ...]:
        """The compute capability of a GPU; () for a TPU."""
        return tuple(map(int, re.findall(r"(?:major|minor): (\d+)", self.target)))


_CLOUD = "docs.cloud.google.com/tpu/docs"
_XLA = "XLA's target_config/specs"
_VM = "host memory: docs.cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus"
_HOST = "host: How to Scale Your Model (Austin et al. 2025), chapter 2"

HOPPER = (
    "shared_memory_per_core: 233472 fpus_per_core: 128 l2_cache_size: 52428800 clock_rate_ghz: 1.98 "
    "shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 minor: 0 }"
)
BLACKWELL = (
    "shared_memory_per_core: 233472 fpus_per_core: 128 l2_cache_size: 132644864 clock_rate_ghz: 1.965 "
    "shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 10 minor: 0 }"
)
AMPERE = (
    "shared_memory_per_core: 167936 fpus_per_core: 64 l2_cache_size: 41943040 clock_rate_ghz: 1.41 "
    "shared_memory_per_block_optin: 166912 cuda_compute_capability { major: 8 minor: 0 }"
)

TABLE = (
    Hardware(
        name="a100",
        kinds=("NVIDIA A100",),
        platform="cuda",
        flops={"bfloat16": 312e12, "float32": 156e12, "int8": 624e12},
        memory=85100068864,
        bandwidth=2039e9,
        link=300e9,
        network=25e9,
        host=32e9,
        host_memory=256 * GIB,
        source=f"NVIDIA A100 data sheet (SXM, 80 GB); DGX A100: 8 x 200 Gb/s, 2 TB; PCIe 4.0 x16; {_XLA}/a100_sxm_80",
        cores=108,
        target=AMPERE,
    ),
    Hardware(
        name="h100",
        kinds=("NVIDIA H100 80GB HBM3",),
        platform="cuda",
        flops={"bfloat16": 989e12, "float32": 494e12, "float8": 1979e12, "int8": 1979e12},
        memory=84942979072,
        bandwidth=3352e9,
        link=450e9,
        network=50e9,
        host=64e9,
        host_memory=256 * GIB,
        source=f"NVIDIA H100 data sheet (SXM5); DGX H100: 8 x 400 Gb/s, 2 TB; PCIe 5.0 x16; {_XLA}/h100_sxm",
        cores=132,
        target=HOPPER,
    ),
    Hardware(
        name="h100-pcie",
        kinds=("NVIDIA H100 PCIe",),
        platform="cuda",
        flops={"bfloat16": 756e12, "float32": 378e12, "float8": 1513e12, "int8": 1513e12},
        memory=85028765696,
        bandwidth=2039e9,
        link=64e9,
        network=50e9,
        host=64e9,
        source=f"NVIDIA H100 data sheet (PCIe); without NVLink bridges: PCIe 5.0 x16; {_XLA}/h100_pcie",
        cores=114,
        target=HOPPER,
    ),
    Hardware(
        name="h200",
        kinds=("NVIDIA H200",),
        platform="cuda",
        flops={"bfloat16": 989e12, "float32": 494e12, "float8": 1979e12, "int8": 1979e12},
        memory=151397597184,
        bandwidth=4800e9,
        link=450e9,
        network=50e9,
        host=64e9,
        host_memory=256 * GIB,
        source=f"NVIDIA H200 data sheet; DGX H200: 8 x 400 Gb/s, 2 TB; PCIe 5.0 x16; {_XLA}/h200",
        cores=132,
        target=HOPPER,
    ),
    Hardware(
        name="b200",
        kinds=("NVIDIA B200",),
        platform="cuda",
        flops={"bfloat16": 2250e12, "float32": 1125e12, "float8": 4500e12, "int8": 4500e12},
        memory=191514411008,
        bandwidth=7672e9,
        link=900e9,
        network=50e9,
        host=64e9,
        host_memory=256 * GIB,
        source=f"NVIDIA DGX B200 data sheet (its eighth part, dense); 8 x 400 Gb/s, 2 TB; PCIe 5.0 x16; {_XLA}/b200",
        cores=148,
        target=BLACKWELL,
    ),
    Hardware(
        name="gb200",
        kinds=("NVIDIA GB200",),
        platform="cuda",
        flops={"bfloat16": 2500e12, "float32": 1250e12, "float8": 5000e12, "int8": 5000e12},
        memory=197897748480,
        bandwidth=7928e9,
        link=900e9,
        network=50e9,
        host=225e9,
        host_memory=240e9,
        source=f"NVIDIA GB200 NVL72 data sheet (one GPU, dense); 400 Gb/s a GPU; half of C2C, of 480 GB; {_XLA}/gb200",
        node=72,
        cores=152,
        target=BLACKWELL,
    ),
    Hardware(
        name="v3",
        kinds=("TPU v3",),
        platform="tpu",
        flops={"bfloat16": 61.5e12},
        memory=16 * GIB,
        bandwidth=450e9,
        link=70e9,
        network=1.5625e9,
        host=0.0,
        host_memory=340 / 8 * GIB,
        source=f"{_CLOUD}/v3, half a chip, which is two devices; links: Jouppi et al. 2023, table 4; {_VM}",
        node=8,
        dimensions=2,
        wraps=16,
        per_chip=2,
    ),
    Hardware(
        name="v4",
        kinds=("TPU v4",),
        platform="tpu",
        flops={"bfloat16": 275e12, "int8": 275e12},
        memory=32 * GIB,
        bandwidth=1200e9,
        link=50e9,
        network=6.25e9,
        host=16e9,
        host_memory=407 / 4 * GIB,
        source=f"{_CLOUD}/v4; links: Jouppi et al. 2023, table 4; network: as v5p; {_HOST}; {_VM}",
        node=4,
        dimensions=3,
        wraps=4,
        compiler=("", "megacore"),
    ),
    Hardware(
        name="v5e",
        kinds=("TPU v5 lite", "TPU v5e"),
        platform="tpu",
        flops={"bfloat16": 197e12, "int8": 394e12},
        memory=16 * GIB,
        bandwidth=819e9,
        link=50e9,
        network=3.125e9,
        host=16e9,
        host_memory=192 / 4 * GIB,
        source=f"{_CLOUD}/v5e: 400 GB/s both ways over 4 links; 4 chips share a host's 100 Gb/s; {_HOST}; {_VM}",
        node=4,
        dimensions=2,
        wraps=16,
    ),
    Hardware(
        name="v5p",
        kinds=("TPU v5p", "TPU v5"),
        platform="tpu",
        flops={"bfloat16": 459e12, "int8": 918e12},
        memory=95 * GIB,
        bandwidth=2765e9,
        link=100e9,
        network=6.25e9,
        host=16e9,
        host_memory=448 / 4 * GIB,
        source=f"{_CLOUD}/v5p: 1200 GB/s both ways over 6 links, 50 Gb/s a chip; {_HOST}; {_VM}",
        node=4,
        dimensions=3,
        wraps=4,
    ),
    Hardware(
        name="v6e",
        kinds=("TPU v6 lite", "TPU v6e"),
        platform="tpu",
        flops={"bfloat16": 918e12, "int8": 1836e12},
        memory=32 * GIB,
        bandwidth=1638e9,
        link=100e9,
        network=12.5e9,
        host=32e9,
        host_memory=720 / 4 * GIB,
        source=f"{_CLOUD}/v6e: 800 GB/s both ways over 4 links, 100 Gb/s a chip; {_HOST}; {_VM}",
        node=4,
        dimensions=2,
        wraps=16,
    ),
    Hardware(
        name="v7",
        kinds=("TPU v7", "TPU7x"),
        platform="tpu",
        flops={"bfloat16": 1153.5e12, "float8": 2307e12},
        memory=96 * GIB,
        bandwidth=3690e9,
        link=50e9,
        network=6.25e9,
        host=0.0,
        host_memory=960 / 8 * GIB,
        source=f"{_CLOUD}/tpu7x, half a chip, which is two devices: 1200 GB/s both ways over 6 links, 100 Gb/s; {_VM}",
        node=8,
        dimensions=3,
        wraps=4,
        per_chip=2,
        compiler=("tpu7x", "default"),
    ),
)


def peak(device: Any, dtype: str) -> float | None:
    """Return a device's peak FLOP/s at a compute dtype; None if it is not in the table."""
    row = of_device(device.device_kind)
    return row and row.flops.get(dtype)


def of_device(kind: str) -> Hardware | None:
    """Return the row of a device by JAX's name of its kind; None if it is not in the table."""
    return next((row for row in TABLE if kind.startswith(row.kinds)), None)


def find(name: str) -> Hardware:
    """Return the row of this name.

    Raises:
        UserError: it is not in the table; nothing is guessed.
    """
    known = {row.name: row for row in TABLE}
    if name not in known:
        raise UserError(f"got hardware {name!r}, expected one of {', '.join(known)}{nearest(name, known)}")
    return known[name]


def needed(memory: Any, platform: str) -> int:
    """Bytes that a device must have for a program, from the compiler's `memory_analysis()` of it."""
    if platform == "tpu":  # a TPU's compiler knows which buffers are alive at the same time
        return memory.peak_memory_in_bytes
    # a GPU allocates all temporaries as one block
    fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return max(memory.peak_memory_in_bytes, memory.argument_size_in_bytes + memory.temp_size_in_bytes + fresh)
