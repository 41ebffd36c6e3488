"""Run a kernel that XLA cannot partition on each device's own rows and heads, and some on its own tokens too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxmodels.parallel import rules

Array = jax.Array


def run_sharded(attend: Callable[..., Array], inputs: dict[str, Any], tokens: bool = False) -> Array:
    """Call `attend(**inputs)` under the ambient mesh, with rows and heads sharded as the rules say.

    With `tokens`, tokens are sharded too, and `attend` is given their mesh axes as `axis`, if there are any.
    """
    mesh = rules.ambient()
    if mesh is None:
        return attend(**inputs)
    (B, _, H, _), G = inputs["q"].shape, inputs["k"].shape[2]
    batch, heads = rules.rules_of(mesh.shape)["batch"], rules.RULES["heads"]
    pieces = rules.shards(mesh.shape, heads)
    if G % pieces and pieces % G == 0 and H % pieces == 0:
        inputs = {**inputs, **{name: jnp.repeat(inputs[name], pieces // G, axis=2) for name in ("k", "v")}}
        G = pieces
    rows = batch if B % rules.shards(mesh.shape, batch) == 0 else None
    split = heads if G % pieces == 0 else None
    along = rules.RULES["seq"] if tokens and rules.pieces("seq") > 1 else None
    options = {} if along is None else {"axis": along}

    def spec(name: str, x: Array) -> PartitionSpec:
        first = rows if x.shape[0] > 1 else None
        if name == "bias":
            return PartitionSpec(first, split if x.shape[1] > 1 else None)
        if name in ("q", "k", "v"):
            return PartitionSpec(first, along, split)
        return PartitionSpec(first, along) if name in ("q_segments", "kv_segments") else PartitionSpec(first)

    segments = inputs["segments"]
    alike = segments is not None and segments[0] is segments[1]  # told by identity, which the mapping would lose
    arrays = {name: x for name, x in inputs.items() if isinstance(x, jax.Array)}
    if segments is not None:
        arrays |= {"q_segments": segments[0]} if alike else {"q_segments": segments[0], "kv_segments": segments[1]}
    fixed = {name: x for name, x in inputs.items() if name not in arrays and name != "segments"}

    def local(arrays: dict[str, Array]) -> Array:
        arrays = dict(arrays)
        ids = arrays.pop("q_segments", None)
        pair = None if ids is None else (ids, arrays.pop("kv_segments", ids))
        return attend(**arrays, **fixed, **options, segments=pair)

    specs = {name: spec(name, x) for name, x in arrays.items()}
    out = PartitionSpec(rows, along, split)
    return jax.shard_map(local, in_specs=(specs,), out_specs=out, check_vma=False)(arrays)
