"""Devices that are not there: hardware in a shape, described so well that XLA compiles for it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxmodels.errors import UserError
from jaxmodels.plan import hardware
from jaxmodels.plan.hardware import Hardware

# what XLA asks of every NVIDIA GPU and is the same for all in the table
_COMMON = (
    "threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 threads_per_core_limit: 2048 "
    "block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 registers_per_core_limit: 65536 "
    "registers_per_block_limit: 65536"
)


@dataclass(frozen=True)
class Topology:
    """So many devices of one kind, and how they are joined."""

    hardware: Hardware
    shape: tuple[int, ...]
    """Nodes and GPUs of each; or chips along each dimension of a torus."""
    slices: int = 1
    """Tori of that shape, which the network joins (TPUs)."""

    @property
    def devices(self) -> int:
        return self.slices * math.prod(self.shape) * self.hardware.per_chip

    def coordinates(self) -> np.ndarray:
        """Where each device lies, (devices, numbers): node and GPU; or chip in the torus, core and slice."""
        if self.hardware.platform == "cuda":
            return np.indices(self.shape).reshape(2, -1).T
        numbers = np.indices((self.slices, *self.shape, self.hardware.per_chip))
        return np.roll(numbers.reshape(len(numbers), -1).T, -1, 1)

    @property
    def name(self) -> str:
        """As `parse` reads it: h100:4x8."""
        sizes = self.shape if self.slices == 1 else (self.slices, *self.shape)
        return f"{self.hardware.name}:{'x'.join(map(str, sizes))}"


def parse(text: str) -> Topology:
    """A topology from its name: h100:4x8 (4 nodes of 8 GPUs), v5e:16x16, v5p:8x8x8, v5e:2x16x16 (2 slices of 16x16).

    Raises:
        UserError: hardware that is not in the table, or a shape that it does not come in.
    """
    name, _, shape = text.partition(":")
    found = hardware.find(name)
    example = {"cuda": f"{name}:4x{found.node}", "tpu": f"{name}:{'x'.join(['4'] * found.dimensions)}"}[found.platform]
    if not re.fullmatch(r"\d+(x\d+)*", shape):
        raise UserError(f"got topology {text!r}, expected hardware and shape, try {example}")
    sizes = tuple(int(size) for size in shape.split("x"))
    wanted = 2 if found.platform == "cuda" else found.dimensions
    several = found.platform == "tpu" and len(sizes) == wanted + 1
    slices, sizes = (sizes[0], sizes[1:]) if several else (1, sizes)
    if len(sizes) != wanted or 0 in (slices, *sizes):
        torus = f"chips along {wanted} dimensions, with slices in front of them where there are several"
        meaning = "nodes x GPUs of each" if found.platform == "cuda" else torus
        raise UserError(f"got topology {text!r}, expected {meaning}, try {example}")
    if found.platform == "cuda" and sizes[1] > found.node:
        raise UserError(
            f"got topology {text!r}, expected at most {found.node} {name} GPUs a node, "
            f"try {name}:{math.ceil(math.prod(sizes) / found.node)}x{found.node}"
        )
    return Topology(found, sizes, slices)


def describe(topology: Topology) -> Any:
    """JAX's description of the devices, for a process of its own: the compilers register themselves for good.

    Raises:
        UserError: the compiler is not installed, or knows no such shape.
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
            )
        return topologies.get_topology_desc(
            platform="cuda", topology=f"1x{shape[0]}x{shape[1]}", target_config=target(row)
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"got {topology.name}, expected a topology that its compiler describes ({reason}), "
            "try pip install 'jaxmodels[aot]', or another shape"
        ) from None


def target(row: Hardware) -> str:
    """XLA's text proto of a GPU that is not there."""
    return (
        f"gpu_device_info {{ {_COMMON} {row.target} core_count: {row.cores} memory_bandwidth: {int(row.bandwidth)} "
        f'device_memory_size: {int(row.memory)} }} platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }} '
        f'device_description_str: "{row.kinds[0]}"'
    )
