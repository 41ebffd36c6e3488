"""Compile a training step for devices that are not present, in a child process, and cache the result.

The compilers of TPUs and GPUs register themselves in the process that loads them and write to its stderr, so a child
process compiles. It leaves facts.json and the text of the compiled program, which are published to the cache
atomically: two processes may plan the same step at a time, and a damaged result is compiled again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import jaxmodels
from jaxmodels import config as configs
from jaxmodels.config import Config
from jaxmodels.errors import UserError
from jaxmodels.parallel import hardware
from jaxmodels.plan import cache as caches
from jaxmodels.plan import topology as topologies
from jaxmodels.plan.roofline import Places
from jaxmodels.plan.topology import Topology

LIMIT = 3600.0
"""Seconds after which a compiler is taken to hang; the slowest step known takes minutes."""


@dataclass(frozen=True)
class Compiled:
    """A compiled step. Bytes are per device."""

    topology: Topology
    mesh: dict[str, int]
    places: Places
    text: str
    """The text of the compiled program; empty if the step does not fit."""
    held: dict[str, int]
    """Bytes of parameters, optimizer, average, statistics, batch and the rest, computed from shapes."""
    hosted: int
    """Bytes of the optimizer that are in host memory instead of device memory."""
    saved: int
    """Bytes in host memory of what the backward pass needs, as the compiler reports them."""
    gradients: int
    """Bytes of the gradients, which are among the temporaries."""
    arguments: int
    """Bytes of all arguments, as the compiler reports them."""
    peak: int
    """Bytes that a device needs, as the compiler reports them (see `peak`)."""
    shortage: str
    """The compiler's message if the step does not fit; else empty."""
    largest: list[list[Any]]
    """Bytes and names of the largest temporaries that the compiler lists if the step does not fit."""
    flops: dict[str, int]
    """Model FLOPs of a step on all devices, and the part that masks show (see `flops.Step`)."""
    parameters: dict[str, int]
    """Numbers of all parameters and of the trained ones."""
    unit: str
    """The unit of throughput, as in training: tokens or examples."""
    units: int
    """Number of those units in a step."""
    seconds: float
    """Seconds that compiling took."""
    memory: int
    """Peak memory of the child process."""

    @property
    def temporaries(self) -> int:
        """Bytes beside the arguments at the peak."""
        return max(0, self.peak - self.arguments)

    @property
    def fits(self) -> bool:
        """Whether a device can hold the step. A TPU's compiler refuses a step that does not fit; a GPU's does not."""
        return not self.shortage and (
            self.topology.hardware.platform == "tpu" or self.peak <= self.topology.hardware.memory
        )

    @property
    def fits_host(self) -> bool:
        """Whether the hosts can hold what the step keeps there; taken for granted where their memory is unknown."""
        return self.hosted + self.saved <= (self.topology.hardware.host_memory or math.inf)


def compiled(cfg: Config, topology: Topology, cache: Path | None = None, program: str = "") -> Compiled:
    """The compiled step of a config for a topology, from the cache if possible.

    With `program`, a hash of the lowered step, a cached one is taken however the package's code has changed, unless it
    has other facts than `Compiled` has now.

    Raises:
        UserError: the config does not fit the topology, or its compiler is not installed.
    """
    topologies.check_compiler(topology)
    from jaxmodels.train import teachers

    request = {
        "config": configs.to_json(cfg),
        "on": topology.name,
        "teacher": teachers.stated(cfg),
        "versions": caches.versions(),
        "source": program or caches.source(),
        "facts": sorted(field.name for field in dataclasses.fields(Compiled)),
    }
    key = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:24]
    base = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxmodels" / "plan"
    if (found := _read(base / key, topology)) is not None:
        return found
    try:
        base.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{key}.", suffix=".part", dir=base))
    except OSError as error:
        raise caches.unwritable(base, error) from None
    try:
        (folder / "asked.json").write_text(json.dumps(request))
        _compile(folder, topology)
        if (found := _read(folder, topology)) is None:
            raise RuntimeError(f"compiling for {topology.name} left no program that can be read in {folder}")
        caches.publish(folder, base / key)
    except OSError as error:
        raise caches.unwritable(base, error) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return found


def _compile(folder: Path, topology: Topology) -> None:
    """Run the child process on a folder with `asked.json`.

    Raises:
        UserError: the child failed, and the message is its own, in one line; or it took longer than `LIMIT`.
    """
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    environment["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # no process uses a TPU here, so several may compile at once
    environment.pop("XLA_FLAGS", None)  # the flags of this process are for its own devices
    # a folder named like the package in the working directory must not shadow it
    package = str(Path(jaxmodels.__file__).parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (package, environment.get("PYTHONPATH"))))
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "jaxmodels.plan.compile", str(folder)],
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=LIMIT,
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"got {topology.name}, expected its compiler to finish within {LIMIT / 60:.0f} min, but it did not and was "
            "ended, try another --model.remat or --model.attention, or a compiler of another version"
        ) from None
    if done.returncode:
        raise UserError(failure(topology, done.returncode, done.stderr))


def failure(topology: Topology, code: int, output: str) -> str:
    """One line on a child that failed, from its exit code and stderr."""
    lines = [line for line in output.splitlines() if line.strip()]
    if errors := [line for line in lines if line.startswith("error: ")]:
        return errors[-1].removeprefix("error: ")
    if code < 0:
        with contextlib.suppress(ValueError):
            name = signal.Signals(-code).name
            memory = ", which is how a machine short of memory ends one" if name == "SIGKILL" else ""
            return (
                f"got {topology.name}, expected its compiler to finish, but {name} ended it{memory}, "
                "try a smaller --data.batch-size, or --workers 1 in a search"
            )
    last = " ".join((lines or ["no message"])[-1].split())[:300]
    return f"got {topology.name}, expected a step that its compiler takes, but it ended with code {code}: {last}"


def _read(folder: Path, topology: Topology) -> Compiled | None:
    if (facts := caches.intact(folder)) is None:
        return None
    places = Places(topology, facts["mesh"], np.array(facts.pop("coordinates")))
    return Compiled(topology=topology, places=places, **facts)


def child(folder: Path, request: dict[str, Any]) -> None:
    """Compile what is asked for, and write `program.hlo.gz` and `facts.json` to a folder."""
    import resource

    import jax

    from jaxmodels.train.job import assemble

    cfg, topology = configs.from_json(request["config"]), topologies.parse(request["on"])
    begun = time.monotonic()
    job = assemble(cfg, topologies.describe(topology).devices, opened=False)
    layout, counted = job.layout, job.flops()
    held = {
        name: _bytes(getattr(layout, field))
        for name, field in {
            "base": "frozen",
            "teacher": "teacher",
            "parameters": "params",
            "optimizer": "opt_state",
            "average": "ema",
            "statistics": "stats",
        }.items()
    }
    held |= {"batch": _bytes(job.batch), "rest": _bytes((layout.step, layout.rng))}
    hosted = _bytes([leaf for leaf in jax.tree.leaves(layout.opt_state) if leaf.ndim]) if cfg.optim.offload else 0
    held["optimizer"] -= hosted
    facts: dict[str, Any] = {
        "mesh": {axis: size for axis, size in job.mesh.shape.items()},
        "coordinates": [_coordinates(device, topology) for device in job.mesh.devices.flat],
        "held": held,
        "hosted": hosted,
        "gradients": max(_bytes(layout.params[loss.trains]) for loss in job.task.losses),
        "flops": {"model": counted.model, "visible": counted.visible},
        "parameters": {"all": job.parameters(), "trained": job.trained()},
        "unit": job.task.unit,
        "units": job.units,
    }
    lowered, text = job.lower((topology.hardware.platform,)), ""
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used, largest = shortage(str(error))
        arguments = sum(held.values())
        facts |= {"arguments": arguments, "peak": max(used, arguments), "largest": largest, "saved": 0}
        facts["shortage"] = next(line for line in str(error).splitlines() if "RESOURCE_EXHAUSTED" in line)[:300]
    else:
        text, memory = program.as_text(), program.memory_analysis()
        needed = hardware.needed(memory, topology.hardware.platform)
        facts |= {"arguments": memory.argument_size_in_bytes, "peak": needed, "shortage": "", "largest": []}
        facts["saved"] = memory.host_temp_size_in_bytes
    facts["seconds"] = round(time.monotonic() - begun, 1)
    facts["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    try:
        caches.leave(folder, facts, text)
    except OSError as error:
        raise caches.unwritable(folder.parent, error) from None


def shortage(message: str) -> tuple[int, list[list[Any]]]:
    """Bytes that a program needs and its largest buffers, from a TPU compiler's error message."""
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
        # a random key is two words of 32 bits
        width = 8 if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
        total += int(np.prod(shape, dtype=np.int64)) * width
    return total


def _coordinates(device: Any, topology: Topology) -> list[int]:
    if topology.hardware.platform == "tpu":
        return [*device.coords, getattr(device, "core_on_chip", 0), getattr(device, "slice_index", 0)]
    return [device.id // topology.shape[1], device.id % topology.shape[1]]


def in_one_line(error: Exception, request: dict[str, Any]) -> str:
    """One line on an error in the child process."""
    message = " ".join(str(error).split())[:300] or "no message"
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    if isinstance(error, MemoryError):
        return f"the machine is out of memory ({message}), try smaller sizes"
    if unknown := re.search(r"No such compile option: '(\w+)'", message):
        return f"got train.xla {unknown[1]}, which this compiler does not know, try without it"
    return (
        f"got {request.get('on', 'a topology')}, expected a step that its compiler takes "
        f"({type(error).__name__}: {message}), try other hardware, or fields of the model nearer to its defaults"
    )


def main(folder: Path) -> int:
    """Run as the child process; returns the exit code."""
    request: dict[str, Any] = {}
    try:
        request = json.loads((folder / "asked.json").read_text())
        child(folder, request)
    except Exception as error:
        traceback.print_exc()
        print(f"error: {in_one_line(error, request)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
