"""The mesh: how devices are divided."""

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
    """How devices are divided. One axis may be -1: the devices that are left.

    The first axes go across the slow network, between slices of TPUs or nodes of GPUs. So with data = slices or nodes,
    fsdp = -1 the state is cut inside each and replicated over all (HSDP); with data = 1, fsdp = -1 it is cut over all.
    """

    data: Devices = -1
    """Replicas, each with its own share of the batch."""
    stage: Devices = 1
    """Stages of a pipeline, each with its share of the layers; outside the layers, shards of the batch."""
    fsdp: Devices = 1
    """Shards of parameters and optimizer state, and of the batch (ZeRO-3)."""
    expert: Devices = 1
    """Shards of the experts of a mixture, and of the batch."""
    context: Devices = 1
    """Shards of the tokens of each sequence, joined by ring attention (or by --model.attention ulysses)."""
    tensor: Devices = 1
    """Shards of heads, hidden units and vocabulary (Megatron)."""
    sequence: bool = False
    """Whether between a block's products tokens are split over `tensor` too (Megatron's sequence parallelism)."""
    microbatches: Natural = 0
    """Parts of a batch that follow each other through the stages, a multiple of them; 0: up to four times as many, as
    the batch divides. The first and last wait for (stage - 1) / (microbatches * rounds + stage - 1) of the time."""
    rounds: Annotated[int, Range(1, 1024)] = 1
    """How often a microbatch goes round all stages, each time through another slice of a stage's layers: the wait is
    shorter, and more is sent."""


def sizes(cfg: Mesh, devices: int) -> dict[str, int]:
    """Size of each mesh axis for so many devices, and axes of one for what else the mesh says (`rules.SEQUENCE`).

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
        asked = ", ".join(stages.axes())
        raise UserError(f"got {asked} on a mesh with stage=1, expected more stages, try --mesh.stage 2")
    if stages.microbatches % stages.stages:
        better = -(-stages.microbatches // stages.stages) * stages.stages
        raise UserError(
            f"got mesh.microbatches {stages.microbatches}, expected a multiple of mesh.stage {stages.stages}, "
            f"try --mesh.microbatches {better}"
        )
    return got | ({rules.SEQUENCE: 1} if cfg.sequence else {}) | stages.axes()


def make_mesh(cfg: Mesh, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """The mesh of an experiment over these devices (all, when not given); axes are Auto.

    The outermost axes go across what the slow network joins, slices of TPUs or nodes of GPUs, the others stay inside.

    Raises:
        UserError: as `sizes` and `across`.
    """
    devices = jax.devices() if devices is None else devices
    shape = sizes(cfg, len(devices))
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    outer = across(shape, slices)
    inner = [size // outer[axis] for axis, size in shape.items()]
    # an axis may take a part of a torus' dimension, which jax.make_mesh refuses
    if slices > 1:
        places = mesh_utils.create_hybrid_device_mesh(
            inner, list(outer.values()), devices, allow_split_physical_axes=True
        )
    else:  # GPUs are taken in their order, node by node
        places = mesh_utils.create_device_mesh(inner, devices, allow_split_physical_axes=True)
    return jax.sharding.Mesh(places, tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


def across(shape: Mapping[str, int], slices: int) -> dict[str, int]:
    """The part of each axis that goes across so many slices: as much of the outermost as can, then of the next.

    Raises:
        UserError: the sizes do not divide so.
    """
    left, found = slices, {}
    for axis, size in shape.items():
        found[axis] = math.gcd(left, size)
        left //= found[axis]
    if left > 1:
        shown = " ".join(f"{axis}={size}" for axis, size in shape.items())
        raise UserError(
            f"got mesh {shown} for {slices} slices, expected sizes that go across them, "
            f"try --mesh.data {slices}, which keeps the other axes inside a slice"
        )
    return found
