"""The mesh: how devices are divided among the kinds of parallelism."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType

from jaxmodels.errors import UserError
from jaxmodels.fields import Natural, Range, Section
from jaxmodels.parallel import rules

Devices = Annotated[int, Range(1, 2**24, also=-1)]


@dataclass(frozen=True)
class Mesh(Section, section="mesh"):
    """How devices are divided among the kinds of parallelism. One axis may be -1: all remaining devices.

    The first axes span the slow network between TPU slices or GPU nodes. With data = number of slices or nodes and fsdp
    = -1, the state is sharded within each and replicated across them (HSDP); with data = 1 and fsdp = -1, it is sharded
    over all devices.
    """

    data: Devices = -1
    """Replicas, each with its own share of the batch."""
    stage: Devices = 1
    """Pipeline stages, each with its share of the layers; outside the layers, shards of the batch."""
    fsdp: Devices = 1
    """Shards of parameters and optimizer state, and of the batch (ZeRO-3)."""
    expert: Devices = 1
    """Shards of the experts of a mixture, and of the batch."""
    context: Devices = 1
    """Shards of each sequence's tokens, connected by ring attention (or by --model.attention ulysses)."""
    tensor: Devices = 1
    """Shards of heads, hidden units and vocabulary (Megatron)."""
    sequence: bool = False
    """Whether tokens are also split over `tensor` between a block's products (Megatron's sequence parallelism)."""
    microbatches: Natural = 0
    """Parts of a batch that follow each other through the stages, a multiple of `stage`. 0: up to four times as many,
    as the batch divides. Stages are idle for (stage - 1) / (microbatches * rounds + stage - 1) of the time."""
    rounds: Annotated[int, Range(1, 1024)] = 1
    """How often a microbatch passes through all stages, each time through another slice of a stage's layers. More
    rounds mean less idle time and more communication."""


def sizes(cfg: Mesh, devices: int) -> dict[str, int]:
    """Return the size of each mesh axis, and axes of size one for the mesh's other options (`rules.SEQUENCE`).

    Raises:
        UserError: the sizes do not multiply to the number of devices, or stages and microbatches do not fit.
    """
    got = {axis: getattr(cfg, axis) for axis in rules.AXES}
    free = [axis for axis, size in got.items() if size == -1]
    fixed = math.prod(size for size in got.values() if size != -1)
    shown = " ".join(f"{axis}={size}" for axis, size in got.items())
    if len(free) > 1 or any(size < 1 and size != -1 for size in got.values()):
        raise UserError(f"got mesh {shown}, expected positive sizes and at most one -1, try --mesh.data -1")
    if free:
        if devices % fixed:
            raise UserError(
                f"got mesh {shown} for {devices} device(s), expected sizes that divide {devices}, "
                f"try --mesh.{max(got, key=lambda axis: got[axis])} 1"
            )
        got[free[0]] = devices // fixed
    elif fixed != devices:
        raise UserError(f"got mesh {shown} = {fixed} device(s), expected {devices}, try --mesh.data -1")
    stages = rules.Stages(got[rules.STAGE], cfg.rounds, cfg.microbatches)
    if stages.stages == 1 and stages.axes():
        staged = ", ".join(stages.axes())
        raise UserError(f"got {staged} on a mesh with stage=1, expected more stages, try --mesh.stage 2")
    if stages.microbatches % stages.stages:
        better = -(-stages.microbatches // stages.stages) * stages.stages
        raise UserError(
            f"got mesh.microbatches {stages.microbatches}, expected a multiple of mesh.stage {stages.stages}, "
            f"try --mesh.microbatches {better}"
        )
    return got | ({rules.SEQUENCE: 1} if cfg.sequence else {}) | stages.axes()


def make_mesh(cfg: Mesh, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """Build the mesh of an experiment over these devices, or all of them by default; its axes are Auto.

    The outermost axes span what the slow network joins, TPU slices or GPU nodes; the others stay inside.

    Raises:
        UserError: as for `sizes` and `across`.
    """
    devices = jax.devices() if devices is None else devices
    shape = sizes(cfg, len(devices))
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    outer = across(shape, slices)
    inner = [size // outer[axis] for axis, size in shape.items()]
    # an axis may take part of a torus dimension, which jax.make_mesh refuses
    if slices > 1:
        places = mesh_utils.create_hybrid_device_mesh(
            inner, list(outer.values()), devices, allow_split_physical_axes=True
        )
    else:  # GPUs are taken in order, node by node
        places = mesh_utils.create_device_mesh(inner, devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(places, tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


def across(shape: Mapping[str, int], slices: int) -> dict[str, int]:
    """Return the part of each axis that spans the slices: as much of the outermost as possible, then of the next.

    Raises:
        UserError: the sizes do not divide that way.
    """
    left, found = slices, {}
    for axis, size in shape.items():
        found[axis] = math.gcd(left, size)
        left //= found[axis]
    if left > 1:
        shown = " ".join(f"{axis}={size}" for axis, size in shape.items())
        raise UserError(
            f"got mesh {shown} for {slices} slices, expected outer axes that divide evenly over them, "
            f"try --mesh.data {slices}, which keeps the other axes inside a slice"
        )
    return found
