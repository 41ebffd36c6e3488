"""A training step compiled for devices that are not there, in a process of its own, once.

The compilers of TPUs and GPUs register themselves in the process that loads them and write to its stderr; so a child
compiles, and leaves what it found in a cache: facts.json and the compiled program's text.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import jaxmodels
from jaxmodels import config as configs
from jaxmodels.config import Config
from jaxmodels.errors import UserError
from jaxmodels.plan import topology as topologies
from jaxmodels.plan.roofline import Places
from jaxmodels.plan.topology import Topology

COMPILING = ("compile.py", "topology.py", "hardware.py", "flops.py")
"""Files of plan/ that decide what is compiled; the others read it."""


@dataclass(frozen=True)
class Compiled:
    """What the compiler of a topology made of a step. Bytes are those of one device."""

    topology: Topology
    mesh: dict[str, int]
    places: Places
    text: str
    """The compiled program; empty where it does not fit."""
    held: dict[str, int]
    """Bytes of parameters, optimizer, average, statistics, batch and the rest, by arithmetic."""
    hosted: int
    """Bytes of the optimizer that lie in the host's memory and not in the device's."""
    gradients: int
    """Bytes of the gradients, which are temporaries."""
    arguments: int
    """Bytes of all arguments, by the compiler."""
    temporaries: int
    shortage: str
    """What the compiler says where the step does not fit; else empty."""
    largest: list[list[Any]]
    """Bytes and names of the largest temporaries that the compiler names, where it does not fit."""
    flops: dict[str, int]
    """Model FLOPs of a step on all devices, those of them that masks show (see `flops.Step`), and parameters."""
    unit: str
    """What throughput counts, as in training: tokens or examples."""
    units: int
    """How many of them a step has."""
    seconds: float
    """What compiling took."""
    memory: int
    """Peak memory of the child."""

    @property
    def peak(self) -> int:
        """Bytes that a device must have."""
        return self.arguments + self.temporaries


def compiled(cfg: Config, topology: Topology, cache: Path | None = None) -> Compiled:
    """The step of a config for a topology, from the cache if it was compiled before.

    Raises:
        UserError: the config does not fit the topology's mesh, or its compiler is not installed.
    """
    if cfg.optim.offload and not topology.hardware.host:
        raise UserError(
            f"got optim.offload on {topology.hardware.name}, expected hardware whose link to its host is known, "
            "try --optim.offload False"
        )
    asked = {"config": configs.to_json(cfg), "on": topology.name, "versions": _versions(), "source": _source()}
    key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:24]
    base = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxmodels" / "plan"
    folder = base / key
    if not (folder / "facts.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "asked.json").write_text(json.dumps(asked))
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
        environment["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # nobody drives a TPU here: several may compile at once
        environment.pop("XLA_FLAGS", None)  # those of this process are for its own devices
        # a folder named as the package, where the command was given, must not take its place
        package = str(Path(jaxmodels.__file__).parents[1])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (package, environment.get("PYTHONPATH"))))
        done = subprocess.run(
            [sys.executable, "-P", "-m", "jaxmodels.plan.compile", str(folder)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
            if said:
                raise UserError(said[-1].removeprefix("error: "))
            raise RuntimeError(f"compiling for {topology.name} failed:\n{done.stderr[-3000:]}")
    facts = json.loads((folder / "facts.json").read_text())
    places = Places(topology, facts["mesh"], np.array(facts.pop("coordinates")))
    program = folder / "program.hlo.gz"
    text = gzip.decompress(program.read_bytes()).decode() if program.is_file() else ""
    return Compiled(topology=topology, places=places, text=text, **facts)


def _versions() -> dict[str, str]:
    from jaxmodels.train.run import versions

    found = versions()
    for name in ("libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-cudnn-cu12"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _source() -> str:
    """A hash of the package's code, so that a cached result is of this code."""
    found = hashlib.sha256()
    root = Path(jaxmodels.__file__).parent
    for path in sorted(root.rglob("*.py")):
        if "report" not in path.parts and not (path.parent.name == "plan" and path.name not in COMPILING):
            found.update(path.read_bytes())
    return found.hexdigest()[:16]


def child(folder: Path) -> None:
    """Compile what `asked.json` in a folder asks for, and leave `program.hlo.gz` and `facts.json` there."""
    import resource

    import jax

    from jaxmodels import tasks
    from jaxmodels.parallel import mesh as meshes
    from jaxmodels.parallel import rules
    from jaxmodels.plan import flops
    from jaxmodels.train import run, state, step

    asked = json.loads((folder / "asked.json").read_text())
    cfg, topology = configs.from_json(asked["config"]), topologies.parse(asked["on"])
    begun = time.monotonic()
    sizes = meshes.sizes(cfg.mesh, topology.devices)
    step.check(sizes, cfg.data.batch_size, cfg.train.accumulate, cfg.train.strategy, updates=run.updates(cfg))
    task = tasks.build(cfg.task, cfg.model, cfg.data, cfg.train)
    spec = batch_shapes(cfg, task)
    step.check_lengths(sizes, spec)
    where = meshes.make_mesh(cfg.mesh, topologies.describe(topology).devices)
    optimizers, layout = state.compose(cfg, task, where)
    batch = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rules.batch_sharding(where, x.ndim))
        for name, x in spec.items()
    }
    held = {
        name: _bytes(getattr(layout, field))
        for name, field in {
            "parameters": "params",
            "optimizer": "opt_state",
            "average": "ema",
            "statistics": "stats",
        }.items()
    }
    held |= {"batch": _bytes(batch), "rest": _bytes((layout.step, layout.rng))}
    hosted = _bytes([leaf for leaf in jax.tree.leaves(layout.opt_state) if leaf.ndim]) if cfg.optim.offload else 0
    held["optimizer"] -= hosted
    facts: dict[str, Any] = {
        "mesh": {axis: size for axis, size in where.shape.items()},
        "coordinates": [_coordinates(device, topology) for device in where.devices.flat],
        "held": held,
        "hosted": hosted,
        "gradients": max(_bytes(layout.params[loss.trains]) for loss in task.losses),
        "flops": _flops(cfg, task, flops),
        "unit": task.unit,
        "units": spec["tokens"].size if task.unit == "tokens" else cfg.data.batch_size,
    }
    lowered = step.lower(
        task,
        optimizers,
        where,
        layout,
        batch,
        accumulate=cfg.train.accumulate,
        offload=cfg.optim.offload,
        ema=cfg.train.ema,
        xla=cfg.train.xla,
        platforms=(topology.hardware.platform,),
    )
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used, largest = shortage(str(error))
        facts |= {"arguments": sum(held.values()), "temporaries": max(used - sum(held.values()), 0), "largest": largest}
        facts["shortage"] = next(line for line in str(error).splitlines() if "RESOURCE_EXHAUSTED" in line)[:300]
    else:
        (folder / "program.hlo.gz").write_bytes(gzip.compress(program.as_text().encode(), 3))
        memory = program.memory_analysis()
        facts |= {
            "arguments": memory.argument_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
            + memory.generated_code_size_in_bytes,
            "shortage": "",
            "largest": [],
        }
    facts["seconds"] = round(time.monotonic() - begun, 1)
    facts["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    part = folder / "facts.json.part"
    part.write_text(json.dumps(facts))
    part.replace(folder / "facts.json")


def batch_shapes(cfg: Config, task: Any) -> dict[str, Any]:
    """Shapes of a batch, with what packed rows have beside their tokens."""
    spec = dict(task.batch_spec(cfg.data.batch_size))
    if cfg.data.pack and "tokens" in spec and "inputs" not in spec:
        spec |= {name: spec["tokens"] for name in ("targets", "segment_ids", "positions")}
    return spec


def shortage(message: str) -> tuple[int, list[list[Any]]]:
    """Bytes that a program wants of a TPU, and its largest buffers, from the compiler's message."""
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

    def size(text: str) -> int:
        number, unit = re.fullmatch(r"([\d.]+)([KMGT]?)", text).groups()  # pyright: ignore[reportOptionalMemberAccess]
        return int(float(number) * units[unit])

    used = re.search(r"Used ([\d.]+[KMGT]?) of", message) or re.search(r"temporaries \(([\d.]+[KMGT]?)\)", message)
    largest = [
        [size(found.group(1)), " ".join(found.group(2).split())[:120]]
        for found in re.finditer(r"Size: ([\d.]+[KMGT]?)\s+(?:Operator: op_name=\"([^\"]*)\")?", message)
        if found.group(2)
    ]
    return (size(used.group(1)) if used else 0), largest[:8]


def _bytes(tree: Any) -> int:
    """Bytes of a tree on one device."""
    import jax

    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape)
        # a key is two words of 32 bits
        width = 8 if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
        total += int(np.prod(shape, dtype=np.int64)) * width
    return total


def _coordinates(device: Any, topology: Topology) -> list[int]:
    if topology.hardware.platform == "tpu":
        return [*device.coords, getattr(device, "core_on_chip", 0), getattr(device, "slice_index", 0)]
    return [device.id // topology.shape[1], device.id % topology.shape[1]]


def _flops(cfg: Config, task: Any, flops: Any) -> dict[str, int]:
    """Model FLOPs of a step, in full and without what masks hide, and parameters."""
    counted = flops.per_step(cfg)
    parameters = sum(network.count() for network in task.networks.values())
    return {"model": counted.model, "visible": counted.visible, "parameters": parameters}


if __name__ == "__main__":
    try:
        child(Path(sys.argv[1]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
