"""`python -m benchmarks planning`: time and memory of plans for many devices on a machine that has none of them."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from benchmarks import record
from jaxmodels.errors import UserError

CONFIG = "configs/llama3_8b_c4.py"
SHAPES = {
    "8b": {},
    "70b": {"layers": 80, "width": 8192, "heads": 64, "mlp-width": 28672},
    "405b": {"layers": 126, "width": 16384, "heads": 128, "mlp-width": 53248},
}
"""Changes to the config's 8B model (Grattafiori et al. 2024, table 3)."""


@dataclass(frozen=True)
class Job:
    """A plan of a model on a topology."""

    shape: str
    on: str
    aim: float
    """The most seconds that the command should take."""
    batch: int
    mesh: tuple[str, ...] = ()
    """Options of the mesh; by default the config's, which shards over all devices."""

    def arguments(self) -> list[str]:
        """Of `jaxmodels`."""
        model = [word for name, value in SHAPES[self.shape].items() for word in (f"--model.{name}", str(value))]
        return ["plan", CONFIG, "--on", self.on, *model, "--data.batch-size", str(self.batch), *self.mesh]


def tensor(size: int, data: int = 1) -> tuple[str, ...]:
    """Return a mesh that cuts products and activations over some devices, and the state over the rest."""
    return ("--mesh.data", str(data), "--mesh.tensor", str(size), "--mesh.sequence", "True")


JOBS = {
    "8b-v5e": Job("8b", "v5e:16x16", 120, 512),
    "70b-v5p": Job("70b", "v5p:8x8x16", 120, 1024, tensor(4)),
    "405b-v5p": Job("405b", "v5p:16x16x32", 180, 8192, tensor(8, data=4)),
    "8b-h100": Job("8b", "h100:4x8", 60, 64),
    "70b-h100": Job("70b", "h100:128x8", 60, 1024, tensor(8)),
    "405b-h100": Job("405b", "h100:1024x8", 60, 8192, tensor(8)),
}


@dataclass(frozen=True)
class Options:
    """The jobs, and where the record goes."""

    jobs: Positional[tuple[str, ...]] = ()
    """Names of jobs; by default, all."""
    out: Path | None = None
    """Folder for the record; by default, benchmarks/results."""


def run(options: Options) -> None:
    """Plan each by the command that a user types, with nothing cached, and record its time and memory."""
    record.check("job", options.jobs, JOBS)
    rows = [measure(name) for name in options.jobs or JOBS]
    columns = {
        "name": "job", "on": "hardware", "devices": "devices", "seconds": "seconds", "aim": "aim",
        "memory": "GB held (aim 4)", "fits": "fits", "peak": "GiB of a device", "step": "step (s)", "mfu": "MFU",
        "command": "command",
    }  # fmt: skip
    notes = ["seconds from the command to its answer, nothing cached; GB of the largest of its processes"]
    out = options.out
    if options.jobs and out is None:
        print(record.markdown(rows, columns))
    else:
        print(record.write("planning", "What a plan costs", rows, out=out, columns=columns, notes=notes).read_text())


def measure(name: str) -> dict[str, Any]:
    """Return a row of the record."""
    job = JOBS[name]
    print(f"planning {name} for {job.on} ...", flush=True)
    with tempfile.TemporaryDirectory() as place:
        answer = Path(place) / "plan.json"
        begun = time.perf_counter()
        child = subprocess.Popen(
            [sys.executable, "-m", "jaxmodels", *job.arguments(), "--json", str(answer)],
            cwd=record.ROOT,
            env={**os.environ, "XDG_CACHE_HOME": place},
            stdout=subprocess.DEVNULL,
        )
        _, status, used = os.wait4(child.pid, 0)  # the largest of the command and of what it started
        seconds = time.perf_counter() - begun
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise UserError(f"got exit code {child.returncode} from planning {name}; its error is above")
        (plan,) = json.loads(answer.read_text())
    return {
        "name": name, "on": job.on, "devices": plan["devices"], "parameters": plan["parameters"], "seconds": seconds,
        "aim": job.aim, "memory": used.ru_maxrss * 1024 / 1e9, "fits": "yes" if plan["fits"] else "no",
        "peak": plan["memory"]["peak"] / 2**30, "step": plan.get("step_seconds"), "mfu": plan.get("mfu"),
        "command": shlex.join(["jaxmodels", *job.arguments()]),
    }  # fmt: skip
