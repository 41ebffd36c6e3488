"""Topologies of devices that are not present, described precisely enough for XLA to compile for them."""

from __future__ import annotations

import importlib.util
import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxmodels.errors import UserError
from jaxmodels.parallel import hardware
from jaxmodels.parallel.hardware import Hardware

# properties that XLA asks for and that all GPUs in the table share
_COMMON = (
    "threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 threads_per_core_limit: 2048 "
    "block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 registers_per_core_limit: 65536 "
    "registers_per_block_limit: 65536"
)

MOST = 2**17
"""The most devices that a topology may have; no larger machine has been built for a single program."""
POD = {"v3": 1024, "v4": 4096, "v5e": 256, "v5p": 8960, "v6e": 256, "v7": 9216}
"""The most chips in one torus. Source: docs.cloud.google.com/tpu/docs."""


@dataclass(frozen=True)
class Topology:
    """A number of devices of one kind, and how they are connected."""

    hardware: Hardware
    shape: tuple[int, ...]
    """Nodes and GPUs per node, or chips along each dimension of a torus."""
    slices: int = 1
    """Number of tori of that shape, connected by the network (TPUs)."""

    @property
    def devices(self) -> int:
        return self.slices * math.prod(self.shape) * self.hardware.per_chip

    @property
    def nodes(self) -> int:
        """Machines that drive the devices."""
        return self.shape[0] if self.hardware.platform == "cuda" else math.ceil(self.devices / self.hardware.node)

    def coordinates(self) -> np.ndarray:
        """Coordinates of each device, (devices, numbers): node and GPU, or chip in the torus, core and slice."""
        if self.hardware.platform == "cuda":
            return np.indices(self.shape).reshape(2, -1).T
        numbers = np.indices((self.slices, *self.shape, self.hardware.per_chip))
        return np.roll(numbers.reshape(len(numbers), -1).T, -1, 1)

    @property
    def name(self) -> str:
        """The name that `parse` reads: h100:4x8."""
        sizes = self.shape if self.slices == 1 else (self.slices, *self.shape)
        return f"{self.hardware.name}:{'x'.join(map(str, sizes))}"


def parse(text: str) -> Topology:
    """Parse a topology: h100:4x8 (4 nodes of 8 GPUs), v5e:16x16, v5p:8x8x8, v5e:2x16x16 (2 slices of 16x16).

    Raises:
        UserError: the hardware is not in the table, or does not come in that shape.
    """
    name, _, shape = text.partition(":")
    found = hardware.find(name)
    example = {"cuda": f"{name}:4x{found.node}", "tpu": f"{name}:{'x'.join(['4'] * found.dimensions)}"}[found.platform]
    if not re.fullmatch(r"[0-9]{1,9}(x[0-9]{1,9})*", shape):
        raise UserError(f"got topology {text[:60]!r}, expected hardware and shape, try {example}")
    sizes = tuple(int(size) for size in shape.split("x"))
    wanted = 2 if found.platform == "cuda" else found.dimensions
    several = found.platform == "tpu" and len(sizes) == wanted + 1
    slices, sizes = (sizes[0], sizes[1:]) if several else (1, sizes)
    if 0 in (slices, *sizes):
        raise UserError(f"got topology {text!r}, expected sizes of at least 1, and not 0, try {example}")
    if len(sizes) != wanted:
        torus = f"chips along {wanted} dimensions, with slices in front of them where there are several"
        meaning = "nodes x GPUs of each" if found.platform == "cuda" else torus
        raise UserError(f"got topology {text!r}, expected {meaning}, try {example}")
    if found.platform == "cuda" and sizes[1] > found.node:
        raise UserError(
            f"got topology {text!r}, expected at most {found.node} {name} GPUs a node, "
            f"try {name}:{math.ceil(math.prod(sizes) / found.node)}x{found.node}"
        )
    made = Topology(found, sizes, slices)
    if made.devices > MOST:
        raise UserError(f"got topology {text!r}, expected at most {MOST:,} devices, try {example}")
    if found.platform == "tpu":
        whole = all(size % 2 == 0 for size in sizes[:2]) or max(sizes) == 1
        if not whole or math.prod(sizes) > POD[name]:
            raise UserError(
                f"got topology {text!r}, expected a slice that exists: {', '.join(shapes(found))}, or others of whole "
                f"hosts of 2x2 chips up to the {POD[name]:,} chips of a pod, try {example}"
            )
    return made


def shapes(row: Hardware) -> list[str]:
    """The usual shapes of a slice, from the smallest; each doubles the smallest dimension of the previous one."""
    sizes = [2] * min(2, row.dimensions) + [1] * (row.dimensions - 2)
    found = ["x".join(["1"] * row.dimensions)]
    while math.prod(sizes) <= POD[row.name]:
        found.append("x".join(map(str, sorted(sizes) if row.dimensions == 2 or sizes[2] > 1 else sizes)))
        sizes[sizes[::-1].index(min(sizes)) * -1 - 1] *= 2
    return found


def check_compiler(topology: Topology) -> None:
    """Check that the compiler for the topology's hardware is installed.

    Raises:
        UserError: it is not installed.
    """
    platform = topology.hardware.platform
    known = {"tpu": ("libtpu",), "cuda": ("jax_cuda12_plugin", "jax_cuda13_plugin")}[platform]
    if not any(importlib.util.find_spec(name) for name in known):
        raise UserError(
            f"got {topology.name}, expected its compiler, which {' or '.join(known)} brings, "
            "try pip install 'jaxmodels[aot]'"
        )


def describe(topology: Topology) -> Any:
    """JAX's description of the devices. Call it in a separate process: a compiler cannot be unregistered.

    Raises:
        UserError: the compiler is not installed, or does not know the shape.
    """
    from jax.experimental import topologies

    row, shape = topology.hardware, topology.shape
    try:
        if row.platform == "tpu":
            name, cores = row.compiler
            chips = "x".join(map(str, shape))
            return topologies.get_topology_desc(
                platform="tpu",
                topology_name=f"{name or row.name}:{chips}",
                chip_config_name=cores,
                num_slices=topology.slices,
                # a single chip is smaller than the 2x2 host that XLA expects
                **({"chips_per_host_bounds": (1, 1, 1)} if math.prod(shape) == 1 else {}),
            )
        _tell_attention(row)
        return topologies.get_topology_desc(
            platform="cuda", topology=f"1x{shape[0]}x{shape[1]}", target_config=target(row)
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"got {topology.name}, expected a topology that its compiler describes ({reason}), try another shape"
        ) from None


def _tell_attention(row: Hardware) -> None:
    """Let JAX judge a call of cuDNN's attention by the GPU that is compiled for: it asks for one that is here."""
    from jax._src.cudnn import fused_attention_stablehlo as jaxs

    def reached(capability: str) -> bool:
        return row.capability >= tuple(map(int, capability.split(".")))

    jaxs.check_compute_capability = reached


def target(row: Hardware) -> str:
    """XLA's text proto for a GPU that is not present."""
    return (
        f"gpu_device_info {{ {_COMMON} {row.target} core_count: {row.cores} memory_bandwidth: {int(row.bandwidth)} "
        f'device_memory_size: {int(row.memory)} }} platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }} '
        f'device_description_str: "{row.kinds[0]}"'
    )
