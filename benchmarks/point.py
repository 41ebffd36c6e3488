"""One point of a scaling curve: a training step on some of the devices, timed, traced, and planned beside it."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import collectives
from benchmarks.collectives import Collective, Groups, Key
from jaxmodels.config import Config
from jaxmodels.errors import UserError
from jaxmodels.parallel import distributed, hardware, progress
from jaxmodels.plan import compile as compiling
from jaxmodels.plan import program as programs
from jaxmodels.plan import topology as topologies
from jaxmodels.plan.figures import figures
from jaxmodels.plan.groups import groups_of
from jaxmodels.plan.roofline import Places
from jaxmodels.plan.topology import Topology
from jaxmodels.train import beginning
from jaxmodels.train.job import Job, assemble

WARM, TRACED = 2, 3
"""Steps before those that are timed, and steps in the trace after them."""
TOLD_SECONDS = 600.0
"""How long the first process waits for what the others have seen."""


def measure(name: str, cfg: Config, devices: Sequence[Any], hosts: Sequence[str], steps: int) -> dict[str, Any]:
    """Run a config's step on these devices; return what was measured and what was planned, as JSON values.

    All processes call it, those too that have none of the devices; the first one gets the answer, the others get {}.
    The answer is a `failure` where the devices have too little memory.
    `name` is another one at each call; `hosts` says on which machine each process runs.

    Raises:
        UserError: the config does not fit the devices.
    """
    job = assemble(cfg, devices)
    mine = [device for device in devices if device.process_index == jax.process_index()]
    report: dict[str, Any] = {}
    lowered = compiled = None
    progress.phase("compile")
    begun = time.perf_counter()
    try:
        if mine:
            lowered = job.lower()
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        report = _exhausted(error)
    took = time.perf_counter() - begun
    distributed.barrier("scaling: compiled")  # the first collective fails if processes reach it far apart
    try:
        if compiled is not None:
            report = {"program": _hash(lowered), "compile_seconds": took, **_run(job, compiled, mine, steps)}
    except jax.errors.JaxRuntimeError as error:
        report = _exhausted(error)
    distributed.publish(f"scaling: {name}", json.dumps(report))
    if not distributed.is_main():
        distributed.barrier("scaling: measured")
        return {}
    everyone = [json.loads(text) for text in distributed.collect(f"scaling: {name}", TOLD_SECONDS).values()]
    found = next(({"failure": one["failure"]} for one in everyone if "failure" in one), None)
    if found is None:
        found = join([one for one in everyone if one], job)
        program, held = found.pop("program"), found.pop("held")
        found["plan"] = _waiting(lambda: plan(job, hosts, program, held))
    distributed.barrier("scaling: measured")
    return found


def _exhausted(error: Exception) -> dict[str, str]:
    """Return the failure of a step that devices have no memory for; raise any other error."""
    if "RESOURCE_EXHAUSTED" not in str(error):
        raise error
    return {"failure": f"out of memory: {' '.join(str(error).split())[:160]}"}


def _run(job: Job, compiled: Any, mine: Sequence[Any], steps: int) -> dict[str, Any]:
    """Run the compiled step, and return what this process saw of it."""
    before = _peak(mine[0])
    state, batch = beginning.initial(job), job.loader("train").batch(0)
    progress.phase("step", 0)
    # a CPU's devices share its threads, and two steps at a time could wait for each other for good
    ahead = mine[0].platform != "cpu"
    state, _ = _steps(compiled, state, batch, WARM, ahead)
    state, times = _steps(compiled, state, batch, steps, ahead)
    program = programs.parse(compiled.as_text())
    own = collectives.held(program, dict(job.mesh.shape), _groups(job))
    with tempfile.TemporaryDirectory() as folder:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # it would slow the steps
        jax.profiler.start_trace(folder, profiler_options=options)
        try:
            state, _ = _steps(compiled, state, batch, TRACED, ahead)
        finally:
            jax.profiler.stop_trace()
        seen = collectives.read(Path(folder), program, own)
    analysis = compiled.memory_analysis()
    return {
        "times": times,
        "memory": _memory(mine[0], before, hardware.needed(analysis, mine[0].platform)),
        "arguments": _bytes((state, batch)),
        "seen": [{"counts": each.counts, **collectives.times(each, TRACED)} for each in seen.values()],
        "held": {each: vars(one) for each, one in own.items()},
    }


def _steps(compiled: Any, state: Any, batch: Any, steps: int, ahead: bool) -> tuple[Any, list[float]]:
    """Run so many steps; return the state and the seconds from the end of each step to that of the next.

    With `ahead` a step is dispatched before the one before it has ended, as in training, so that devices need not wait
    for the host.
    """
    ends, pending = [time.perf_counter()], []
    for _ in range(steps):
        state, metrics = compiled(state, batch)
        pending.append(metrics)
        if len(pending) > ahead:
            jax.block_until_ready(pending.pop(0))
            ends.append(time.perf_counter())
        progress.poll()
    for metrics in pending:
        jax.block_until_ready(metrics)
        ends.append(time.perf_counter())
    return state, [after - before for before, after in itertools.pairwise(ends)]


def join(everyone: Sequence[Mapping[str, Any]], job: Job) -> dict[str, Any]:
    """Put together what the processes saw; times are those of the first one, and seconds are means over devices."""
    first, seen = everyone[0], [each for one in everyone for each in one["seen"]]
    held = {name: Collective(**each) for name, each in first["held"].items()}
    low, median, high = statistics.quantiles(first["times"], n=4, method="inclusive")
    sent: dict[str, float] = {}
    for each in seen:
        for axes, spent in each["collectives"].items():
            sent[axes] = sent.get(axes, 0.0) + spent / len(seen)
    mean = {name: statistics.fmean(each[name] for each in seen) if seen else 0.0 for name in ("alone", "work")}
    counts: Counter[str] = Counter()
    for each in seen:
        counts.update(each["counts"])
    ran = collectives.ran(held, {name: count / len(seen) for name, count in counts.items()}, TRACED)
    memory = max((one["memory"] for one in everyone), key=lambda memory: memory["peak"])
    return {
        "unit": job.task.unit,
        "units": job.units,
        "times": first["times"],
        "seconds": {"low": low, "median": median, "high": high},
        "per_second": job.units / median,
        "compile_seconds": first["compile_seconds"],
        "memory": memory,
        "arguments": max(one["arguments"] for one in everyone),
        "collectives": rows(ran),
        "step": {
            "collectives": dict(sorted(sent.items())),
            **mean,
            "idle": max(0.0, median - mean["alone"] - mean["work"]),
        },
        "untold": untold(held, seen, job.mesh.size),
        "program": first["program"],
        "held": held,
    }


def untold(held: Mapping[str, Collective], seen: Sequence[Mapping[str, Any]], devices: int) -> str:
    """What the trace cannot tell, as a sentence; empty where it tells all."""
    if len(seen) < devices:
        return f"the trace shows {len(seen)} of {devices} devices"
    if any(each["counts"] != seen[0]["counts"] for each in seen):
        return "the trace shows other collectives on one device than on another"
    if fused := sum(each.fused for each in held.values()):
        return f"{fused} collectives run inside fusions, and their time is among that of other work"
    missing = [name for name in held if name not in seen[0]["counts"]]
    return f"the trace does not name {len(missing)} of {len(held)} collectives" if missing else ""


def rows(found: Mapping[Key, Mapping[str, float]]) -> list[dict[str, Any]]:
    """Return collectives by kind and axes as JSON values."""
    return [{"kind": kind, "axes": axes, **each} for (kind, axes), each in found.items()]


def plan(job: Job, hosts: Sequence[str], program: str, held: Mapping[str, Collective]) -> dict[str, Any]:
    """Return what was to be expected of the step before it ran; `program` is the hash of what ran, `held` what it has.

    Where the hardware is known, it is the answer of `jaxmodels plan` for as many devices of it. Otherwise it has no
    seconds, and its collectives are those of the program that the config alone leads to, without data.
    """
    devices = list(job.mesh.devices.flat)
    if hardware.of_device(devices[0].device_kind) is None:
        expected = assemble(job.config, devices, opened=False)
        lowered = expected.lower()
        if _hash(lowered) != program:
            read = programs.parse(lowered.compile().as_text())
            held = collectives.held(read, dict(expected.mesh.shape), _groups(expected))
        return {"collectives": rows(collectives.planned(held)), "arguments": _bytes((expected.layout, expected.batch))}
    try:
        on = topologies.parse(topology(devices, hosts))
        made = compiling.compiled(job.config, on)
        found = figures(job.config, made)
    except (UserError, RuntimeError) as error:
        return {"failure": " ".join(str(error).split())[:300].partition(", try ")[0]}
    sent: dict[Key, dict[str, float]] = {}
    for each in found.get("transfers", ()):
        if each["kind"] != programs.hlo.HOST:
            row = sent.setdefault((each["kind"], "*".join(each["axes"]) or "-"), {"count": 0, "bytes": 0, "seconds": 0})
            for name in row:
                row[name] += each[name]
    failure = "" if "step_seconds" in found else "it does not fit" if not found["fits"] else "kernels are not counted"
    return {
        "on": on.name,
        "failure": failure,
        "memory": found["memory"]["peak"],
        **{name: found[name] for name in ("step_seconds", "seconds", "binds", "per_second") if name in found},
        "collectives": rows(sent),
    }


def _waiting(call: Any) -> Any:
    """Call something that takes long, and let a supervisor know meanwhile that this process is alive."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(call)
        while not wait([future], timeout=1.0).done:
            progress.phase("compile")
        return future.result()


def topology(devices: Sequence[Any], hosts: Sequence[str]) -> str:
    """Return the name of the topology that devices of known hardware make: h100:2x8.

    Raises:
        UserError: they make none: nodes have different numbers of them, or chips are no box.
    """
    row = hardware.of_device(devices[0].device_kind)
    assert row is not None
    if row.platform == "cuda":
        nodes = Counter(hosts[device.process_index] for device in devices)
        if len(set(nodes.values())) > 1:
            raise UserError(f"got {len(devices)} GPUs, expected as many on each node")
        return f"{row.name}:{len(nodes)}x{max(nodes.values())}"
    places = np.array([device.coords for device in devices])
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    shape = [len(set(column.tolist())) for column in places.T][: row.dimensions]
    if slices * math.prod(shape) * row.per_chip != len(devices):
        raise UserError(f"got {len(devices)} chips that are no box, expected {'x'.join(map(str, shape))}")
    return f"{row.name}:{'x'.join(map(str, shape if slices == 1 else (slices, *shape)))}"


def _groups(job: Job) -> Groups:
    """Return what reads groups of devices from the attributes of this job's collectives."""
    devices = list(job.mesh.devices.flat)
    slices = np.array([getattr(device, "slice_index", 0) or 0 for device in devices])
    row = hardware.of_device(devices[0].device_kind)
    if row is None or row.platform == "cuda" or len(set(slices.tolist())) == 1:
        return lambda attributes: groups_of(attributes, len(devices))
    shape = tuple(len(set(column)) for column in zip(*(d.coords for d in devices), strict=True))[: row.dimensions]
    places = np.stack([np.zeros_like(slices), slices], 1)  # which slice is all that it is asked for
    return Places(Topology(row, shape, len(set(slices.tolist()))), dict(job.mesh.shape), places).groups


def _peak(device: Any) -> int:
    return (device.memory_stats() or {}).get("peak_bytes_in_use", 0)


def _memory(device: Any, before: int, needed: int) -> dict[str, Any]:
    """Return the peak of a device's memory in bytes, and who says it.

    An allocator keeps the peak of the whole process, so it says that of this point only where it is a new one.
    """
    stats = device.memory_stats() or {}
    if (now := stats.get("peak_bytes_in_use", 0)) > before:
        return {"peak": now, "by": "allocator"}
    return {"peak": needed, "by": "compiler"}


def _hash(lowered: Any) -> str:
    return hashlib.sha256(lowered.as_text().encode()).hexdigest()


def _bytes(tree: Any) -> int:
    """Return the bytes of a tree's arrays, or of their shapes, on one device; random keys are left out."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            total += math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return total
