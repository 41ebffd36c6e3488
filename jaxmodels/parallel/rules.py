"""The one table that maps logical axis names, which models use, to mesh axes, which hardware has.

No other module names a mesh axis in a sharding.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxmodels.errors import UserError, nearest

DATA, STAGE = "data", "stage"
AXES = (DATA, STAGE, "fsdp", "expert", "context", "tensor")
"""Mesh axes, outermost (slowest network) first."""
OF_PARAMETERS = (STAGE, "fsdp", "expert", "tensor")
"""Mesh axes that split parameters; along the others each device holds the same ones."""
SEQUENCE = "sequence"
"""An axis of size one, by which a mesh says that it also splits the residual stream's tokens over `tensor`.

This way the choice goes wherever the mesh goes, and caches keyed by mesh keep such programs apart. Likewise, axes of
size one named microbatches=8 or rounds=2 configure the stages (`Stages`).
"""

RULES: Mapping[str, tuple[str, ...]] = {
    # activations
    "batch": (DATA, "fsdp", "expert"),
    "replicas": (DATA,),
    "seq": ("context",),
    "residual": ("context",),
    "expert_batch": (DATA, "fsdp"),
    # parameters; heads, mlp and vocab also name dimensions of activations
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "expert": ("expert",),
    "gates": (),
    "layers": (STAGE,),
    "positions": (),
    "features": (),
    "classes": (),
    "window": (),
    "channels_in": ("fsdp",),
    "channels_out": ("tensor",),
    "norm": (),
}
"""Logical axis -> mesh axes that it is split over; () is replicated. `residual`: tokens between a block's products."""
SEQUENCE_RULES: Mapping[str, tuple[str, ...]] = {**RULES, "residual": ("context", "tensor")}
"""The table of a mesh that has the axis `SEQUENCE`."""

REPLICAS = "replicas"
"""The axis that replicas bind, under pmap or in a step that sums gradients once; statistics cover all replicas."""

Names = tuple[str | None, ...]

_inside: contextvars.ContextVar[frozenset[str]] = contextvars.ContextVar("mapped mesh axes", default=frozenset())


class Stages(NamedTuple):
    """How a mesh sends microbatches through a stack of layers that is split over its stages."""

    stages: int = 1
    rounds: int = 1
    """How often a microbatch passes through all stages; a stage's layers are split into as many slices."""
    microbatches: int = 0
    """Number of microbatches. 0: as many as fit, up to four times the stages."""

    @staticmethod
    def of(sizes: Mapping[str, int]) -> Stages:
        """Read them from the axes of a mesh."""
        marked = dict(name.split("=") for name in sizes if "=" in name)
        return Stages(sizes.get(STAGE, 1), **{name: int(value) for name, value in marked.items()})

    def axes(self) -> dict[str, int]:
        """The axes of size one by which a mesh states what differs from the defaults."""
        given = {"rounds": self.rounds, "microbatches": self.microbatches}
        return {f"{name}={value}": 1 for name, value in given.items() if value != Stages._field_defaults[name]}


def rules_of(sizes: Mapping[str, int]) -> Mapping[str, tuple[str, ...]]:
    """Return the rules for a mesh with these axes.

    Outside the pipeline, all stages would repeat the same work, so rows are split over them too; outermost, so that the
    rows of a microbatch are on one stage.
    """
    rows, inside = SEQUENCE_RULES if SEQUENCE in sizes else RULES, _inside.get()
    if sizes.get(STAGE, 1) > 1 and STAGE not in inside:
        rows = {**rows, "batch": (STAGE, *rows["batch"])}
    if DATA in inside:
        rows = {name: tuple(axis for axis in axes if axis != DATA) for name, axes in rows.items()}
    return rows


@contextlib.contextmanager
def inside(axis: str) -> Iterator[None]:
    """Context while tracing the work of a stage or replica, to be mapped over that mesh axis: it does not split
    rows."""
    token = _inside.set(_inside.get() | {axis})
    try:
        yield
    finally:
        _inside.reset(token)


def ambient() -> AbstractMesh | None:
    """Return the mesh that is set, if it is ours, has more than one device, and is not mapped over already."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or not set(AXES) <= set(mesh.axis_names):
        return None
    return mesh if all(kind == AxisType.Auto for kind in mesh.axis_types) else None


def pieces(name: str) -> int:
    """Return how many pieces the current mesh splits a dimension with this logical name into; 1 without a mesh."""
    mesh = ambient()
    return 1 if mesh is None else shards(mesh.shape, rules_of(mesh.shape)[name])


def spec(names: Sequence[str | None], table: Mapping[str, tuple[str, ...]] = RULES) -> PartitionSpec:
    """Return the partition of an array whose dimensions have these logical names (None: replicated).

    Raises:
        ValueError: a name is not in the table, or two dimensions ask for the same mesh axis.
    """
    parts: list[tuple[str, ...] | None] = []
    taken: dict[str, str] = {}
    for name in names:
        if name is None:
            parts.append(None)
            continue
        if name not in table:
            raise ValueError(f"got logical axis {name!r}, expected one of {', '.join(table)}{nearest(name, table)}")
        for axis in table[name]:
            if axis in taken:
                raise ValueError(
                    f"got logical axes {taken[axis]!r} and {name!r} in {tuple(names)}, "
                    f"expected them on different mesh axes, both are on {axis!r}"
                )
            taken[axis] = name
        parts.append(table[name] or None)
    return PartitionSpec(*parts)


def sharding(mesh: Mesh, names: Sequence[str | None]) -> NamedSharding:
    """Return `spec(names)` on a mesh."""
    return NamedSharding(mesh, spec(names, rules_of(mesh.shape)))


def constrain(x: jax.Array, names: Sequence[str | None]) -> jax.Array:
    """Constrain an activation to the table, if a mesh is set; a dimension that does not divide stays free."""
    mesh = ambient()
    if mesh is None:
        return x
    rows = rules_of(mesh.shape)
    fits = [name and size % shards(mesh.shape, rows[name]) == 0 for name, size in zip(names, x.shape, strict=True)]
    kept = [name if fit else None for name, fit in zip(names, fits, strict=True)]
    return jax.lax.with_sharding_constraint(x, spec(kept, rows))


def pin(x: jax.Array, name: str) -> jax.Array:
    """Constrain an array's first dimension to the table, if a mesh is set; the compiler chooses the others."""
    mesh = ambient()
    if mesh is None:
        return x
    free = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(rules_of(mesh.shape)[name], *free))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gather(x: jax.Array, names: Names) -> jax.Array:
    """Gather a parameter along what fsdp splits, as its layer needs it; its gradient is scattered at once (ZeRO-3).

    Left to itself, XLA's partitioner may sum over fsdp instead, and got some gradients wrong on meshes of three axes.
    """
    return constrain(x, without_fsdp(names))


gather.defvjp(lambda x, names: (gather(x, names), None), lambda names, _, dx: (constrain(dx, names),))


def without_fsdp(names: Sequence[str | None]) -> list[str | None]:
    """Return the logical axes of a parameter that is whole along what fsdp splits."""
    return [None if name and "fsdp" in RULES[name] else name for name in names]


def apart(x: jax.Array, rows: int, along: int) -> jax.Array:
    """Reshape (B, T, …) to separate what each piece of the mesh holds: (rows, along, B / rows, T / along, …)."""
    return jnp.swapaxes(x.reshape(rows, x.shape[0] // rows, along, -1, *x.shape[2:]), 1, 2)


def add_up(parts: jax.Array, over: Sequence[str], names: Names) -> jax.Array:
    """Sum the first dimensions of `parts`, one for each logical axis in `over`, sharded as `names` says.

    Axes that shard the sum scatter it during the addition, and only pieces are added over the other mesh axes. Left to
    itself, XLA's partitioner sums the whole over all of them.
    """
    mesh, count = ambient(), len(over)
    if mesh is None or parts.shape[:count] != tuple(map(pieces, over)):
        return constrain(parts.sum(range(count)), names)
    rows = rules_of(mesh.shape)
    axes = [axis for name in over for axis in rows[name]]
    cutting = {axis for name in names if name for axis in rows[name]} & set(axes)
    whole = [rows[name] if name and not cutting & set(rows[name]) else None for name in names]
    parts = parts.reshape(*(mesh.shape[axis] for axis in axes), *parts.shape[count:])
    parts = jax.lax.with_sharding_constraint(parts, PartitionSpec(*axes, *whole))
    parts = parts.sum([i for i, axis in enumerate(axes) if axis in cutting])
    rest = [axis for axis in axes if axis not in cutting]
    cut = [rows[name] if name else None for name in names]
    parts = jax.lax.with_sharding_constraint(parts, PartitionSpec(*rest, *cut))
    return constrain(parts.sum(range(len(rest))), names)


def add_replicas(sums: Any) -> Any:
    """Sum a tree over all replicas, if there are any."""
    try:
        return jax.lax.psum(sums, REPLICAS)
    except NameError:
        return sums


def shards(sizes: Mapping[str, int], axes: Sequence[str]) -> int:
    """Return how many pieces these mesh axes split a dimension into."""
    return math.prod(sizes[axis] for axis in axes)


def shardings_of(mesh: Mesh, axes: Any, shapes: Any) -> Any:
    """Build the shardings of a tree of arrays, from the tree of their logical axes.

    Raises:
        UserError: a dimension does not divide by its mesh axes (the message names parameter, dimension, size and axis),
        or the mesh has stages and the model has no stacked layers to split.
    """
    stages = Stages.of(mesh.shape)
    leaves = jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple))
    if stages.stages > 1 and not any("layers" in names for names in leaves):
        raise UserError(
            f"got mesh.stage {stages.stages} for a model without stacked layers, expected one with them, "
            "try --mesh.stage 1"
        )

    def one(path: tuple[Any, ...], leaf: Any, names: Names) -> NamedSharding | None:
        if leaf is None:
            return None
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if len(names) != len(leaf.shape):
            raise ValueError(f"got {len(names)} logical axes {names} for {name}, expected {len(leaf.shape)}")
        placed = sharding(mesh, names)
        for logical, size in zip(names, leaf.shape, strict=True):
            part: tuple[str, ...] = RULES[logical] if logical else ()
            if size % (count := shards(mesh.shape, part)):
                raise UserError(
                    f"got parameter {name} with dimension {logical}={size}, expected a multiple of "
                    f"mesh axis {'*'.join(part)}={count}, try another size or --mesh.{''.join(part[-1:])} 1"
                )
            if logical == "layers" and size % (count * stages.rounds):
                raise UserError(
                    f"got parameter {name} with dimension layers={size}, expected a multiple of mesh.stage {count} x "
                    f"mesh.rounds {stages.rounds}, try another size or --mesh.rounds 1"
                )
        return placed

    return jax.tree_util.tree_map_with_path(one, shapes, axes, is_leaf=lambda x: x is None)
