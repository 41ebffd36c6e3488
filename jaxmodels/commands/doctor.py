"""`jaxmodels doctor [PLACE]`: examine machines before a job, and report faults."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from jaxmodels import commands
from jaxmodels.parallel.mesh import Mesh


def doctor(place: str = "", /, run_dir: Path = Path("runs"), mesh: Mesh = Mesh()) -> int:
    """Examine this machine, or those of a place: versions, devices, memory, disk, clocks, ports and collectives.

    Args:
        place: examine all machines of this place, as `jaxmodels launch PLACE -- doctor` does; default: this machine.
        run_dir: directory of runs, whose disk is examined.
        mesh: mesh whose collectives are examined.
    """
    if place:
        given = [f"--run-dir={run_dir}"]
        for field in dataclasses.fields(mesh):
            if (value := getattr(mesh, field.name)) != field.default:
                given.append(f"--mesh.{field.name.replace('_', '-')}" + ("" if value is True else f"={value}"))
        return commands.run("launch", [place, "--restarts", "0", "--", "doctor", *given])
    from jaxmodels.launch.doctor import examine
    from jaxmodels.parallel import distributed

    distributed.initialize()
    return examine(run_dir, mesh)
