"""Calls of attention compiled for hardware that is not here: the compiler's memory and cycles, and the plan's time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax

from benchmarks.cells import Cell, blocked, row
from jaxmodels.models.attention import choose
from jaxmodels.parallel import hardware
from jaxmodels.parallel.mesh import Mesh, make_mesh
from jaxmodels.parallel.platform import platform
from jaxmodels.plan import program as programs
from jaxmodels.plan import roofline
from jaxmodels.plan import topology as topologies


def compiled(name: str, cells: Sequence[Cell], kernels: Sequence[str]) -> list[dict[str, Any]]:
    """Compile cells for one device of hardware that is not here; it runs in a process of its own.

    A row has the plan's milliseconds, the compiler's memory and, on TPUs, the cycles that it states for instructions
    that are no product.

    Raises:
        UserError: there is no such hardware, or its compiler is not installed.
    """
    kind = hardware.find(name)
    where = topologies.parse(f"{name}:{'x'.join(['1'] * (kind.dimensions or 2))}")
    topologies.check_compiler(where)
    mesh = make_mesh(Mesh(), topologies.describe(where).devices[:1])
    rows = []
    with jax.set_mesh(mesh):
        for cell in cells:
            call = cell.call()
            taken = choose(platform(), call)[0]
            for kernel in kernels:
                why, before = blocked(kernel, call), 0.0
                for part in cell.passes:
                    found = row(cell, part, kernel, call, taken)
                    rows.append(found)
                    if why is None:
                        found |= _estimate(cell, kernel, part, where, mesh)
                    else:
                        found["why"] = why
                    if "planned_ms" in found:
                        found["planned_ms"], before = found["planned_ms"] - before, found["planned_ms"]
    return rows


def _estimate(cell: Cell, kernel: str, part: str, where: Any, mesh: Any) -> dict[str, Any]:
    """What the compiler and the plan say of one program; its forward pass is in the one of the gradients."""
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    at = {n: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole) for n, x in cell.shapes().items()}
    try:
        traced = jax.jit(cell.program(kernel, part)).trace(at)
        made = traced.lower(lowering_platforms=(where.hardware.platform,)).compile()
    except Exception as failure:
        return {"why": f"does not compile: {' '.join(str(failure).split())[:160]}"}
    text = made.as_text() or ""
    memory: Any = made.memory_analysis()
    read = programs.parse(text)
    held = hardware.needed(memory, where.hardware.platform) - memory.argument_size_in_bytes
    found: dict[str, Any] = {"memory_mib": max(held, 0) / 2**20}
    if cycles := [int(each) for each in re.findall(r'"estimated_cycles":"?(\d+)', text)]:
        found["cycles"] = sum(cycles)
    if uncounted := read.uncounted():
        return {**found, "why": f"compiles; no time: {', '.join(uncounted)} not counted"}
    dtype = cell.dtype if cell.dtype in where.hardware.flops else "bfloat16"
    places = roofline.Places(where, dict(mesh.shape), where.coordinates()[:1])
    estimate = roofline.estimate(read, places, dtype)
    return {**found, "planned_ms": estimate.seconds * 1e3, "binds": estimate.binds}
