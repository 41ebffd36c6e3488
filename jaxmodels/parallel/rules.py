"""The one table from logical axis names, which models speak, to mesh axes, which hardware has.

Nothing else in the project spells a mesh axis in a sharding.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxmodels.errors import UserError, nearest

AXES = ("data", "fsdp", "expert", "context", "tensor")
"""Mesh axes, outermost (slowest network) first."""
SEQUENCE = "sequence"
"""An axis of one, by which a mesh says that it cuts the residual stream's tokens over `tensor` too.

So the choice goes wherever the mesh goes, and programs that are kept by mesh are kept apart.
"""

RULES: Mapping[str, tuple[str, ...]] = {
    # activations
    "batch": ("data", "fsdp", "expert"),
    "seq": ("context",),
    "residual": ("context",),
    "expert_batch": ("data", "fsdp"),
    # parameters; heads, mlp and vocab name activations' dimensions too
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "expert": ("expert",),
    "gates": (),
    "layers": (),
    "positions": (),
    "features": (),
    "classes": (),
    "window": (),
    "channels_in": ("fsdp",),
    "channels_out": ("tensor",),
    "norm": (),
}
"""Logical axis -> mesh axes it is split over; () is replicated. `residual` is tokens between a block's products."""
SEQUENCE_RULES: Mapping[str, tuple[str, ...]] = {**RULES, "residual": ("context", "tensor")}
"""The table of a mesh with the axis `SEQUENCE`."""

Names = tuple[str | None, ...]


def table(sizes: Mapping[str, int]) -> Mapping[str, tuple[str, ...]]:
    """The rules of a mesh with these axes."""
    return SEQUENCE_RULES if SEQUENCE in sizes else RULES


def ambient() -> AbstractMesh | None:
    """The mesh that is set, if it is one of ours, has more than one device, and is not mapped over already."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or not set(AXES) <= set(mesh.axis_names):
        return None
    return mesh if all(kind == AxisType.Auto for kind in mesh.axis_types) else None


def pieces(name: str) -> int:
    """Into how many pieces the ambient mesh cuts a dimension of this logical name; 1 without a mesh."""
    mesh = ambient()
    return 1 if mesh is None else shards(mesh.shape, table(mesh.shape)[name])


def spec(names: Sequence[str | None], table: Mapping[str, tuple[str, ...]] = RULES) -> PartitionSpec:
    """The partition of an array whose dimensions have these logical names (None: replicated).

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
    """`spec(names)` on a mesh."""
    return NamedSharding(mesh, spec(names, table(mesh.shape)))


def constrain(x: jax.Array, names: Sequence[str | None]) -> jax.Array:
    """Pin an activation to the table, if a mesh is ambient; a dimension that does not divide stays free."""
    mesh = ambient()
    if mesh is None:
        return x
    rows = table(mesh.shape)
    fits = [name and size % shards(mesh.shape, rows[name]) == 0 for name, size in zip(names, x.shape, strict=True)]
    kept = [name if fit else None for name, fit in zip(names, fits, strict=True)]
    return jax.lax.with_sharding_constraint(x, spec(kept, rows))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gather(x: jax.Array, names: Names) -> jax.Array:
    """A parameter as its layer needs it: whole along what fsdp cuts, while its gradient is cut at once again (ZeRO-3).

    Left to choose, XLA's partitioner may sum over fsdp instead, and on meshes of three axes got some gradients wrong.
    """
    return constrain(x, [None if name and AXES[1] in RULES[name] else name for name in names])


gather.defvjp(lambda x, names: (gather(x, names), None), lambda names, _, dx: (constrain(dx, names),))


def shards(sizes: Mapping[str, int], axes: Sequence[str]) -> int:
    """Into how many pieces these mesh axes cut a dimension."""
    return math.prod(sizes[axis] for axis in axes)


def place(mesh: Mesh, axes: Any, shapes: Any) -> Any:
    """Shardings of a tree of arrays, from the tree of their logical axes.

    Raises:
        UserError: a dimension does not divide by its mesh axes; names parameter, dimension, size and mesh axis.
    """

    def one(path: tuple[Any, ...], leaf: Any, names: Names) -> NamedSharding:
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
        return placed

    return jax.tree_util.tree_map_with_path(one, shapes, axes, is_leaf=lambda x: x is None)


def batch_names(rank: int) -> Names:
    """Logical axes of a batch field: (B, T) are tokens, anything else is whole along all but its rows."""
    return ("batch", "seq") if rank == 2 else ("batch", *(None,) * (rank - 1))


def batch_sharding(mesh: Mesh, rank: int) -> NamedSharding:
    """Sharding of a batch field."""
    return sharding(mesh, batch_names(rank))
