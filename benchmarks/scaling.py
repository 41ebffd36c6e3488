"""`python -m benchmarks scaling CONFIG`: how a training step grows with devices, processes and nodes, beside its plan.

Each curve gives all growth to one mesh axis, or to several together. Weak scaling keeps the rows of a device, strong
scaling keeps the batch. It runs in one process on some of its devices, or as the command of `jaxmodels launch PLACE --
benchmarks scaling CONFIG` on any number of them. On CPUs devices are virtual and their seconds mean nothing: what the
plan says of collectives and bytes is compared with what ran, and a difference is an error.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import platform
import shlex
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
from tyro.conf import Positional

from benchmarks import curves, point, record
from jaxmodels.commands.options import NoOptions, configured
from jaxmodels.config import Config, to_json
from jaxmodels.errors import UserError, check_place
from jaxmodels.fields import Count, Range, Section
from jaxmodels.parallel import distributed, rules
from jaxmodels.plan import cache as caches
from jaxmodels.train import run as runs
from jaxmodels.train.job import assemble

MODES = ("weak", "strong")
VIRTUAL = 8
"""Devices of a CPU, where no number is asked for."""


@dataclass(frozen=True)
class Options(Section):
    """Which curves, of what."""

    config: Positional[str] = "configs/gpt_peers.py"
    """Config file; its batch is that of the smallest number of devices."""
    axes: tuple[str, ...] = (rules.DATA,)
    """Mesh axes that grow, a curve each; those of data,fsdp share the growth. The others stay as in the config."""
    devices: tuple[Count, ...] = ()
    """Numbers of devices; by default 1, 2, 4, and so on, up to all that are here, or to 8 virtual ones of a CPU."""
    modes: tuple[str, ...] = MODES
    """weak: the rows of a device stay the same; strong: the batch does."""
    override: str = ""
    """Fields of the config, as on the command line: --override='--data synthetic --model.layers 4'."""
    steps: Annotated[int, Range(2, 10**6)] = 20
    """Steps that are timed."""
    name: str = ""
    """Name of the result files; by default, scaling_<config>_<hardware>. What it has already is not run again."""
    out: Path | None = None
    """Folder for the results; by default, benchmarks/results."""


@dataclass(frozen=True)
class Point:
    """A config at one number of devices, on one or more curves."""

    mode: str
    axes: tuple[str, ...]
    devices: int
    config: Config
    failure: str = ""
    """Why it cannot be."""

    @property
    def curve(self) -> str:
        """The name of its curve: weak data*fsdp."""
        return f"{self.mode} {'*'.join(self.axes)}"


def run(options: Options) -> int:
    """Measure what the record does not have yet; return 1 if a step on CPUs was not as planned.

    Raises:
        UserError: an option is wrong, or not even the smallest point of a curve fits. Nothing has run by then.
    """
    axes = [tuple(each.split(",")) for each in options.axes]
    for each in axes:
        record.check("mesh axis", each, rules.AXES)
        if len(set(each)) < len(each):
            once = ",".join(dict.fromkeys(each))
            raise UserError(f"got --axes {','.join(each)}, expected each axis once, try --axes {once}")
    record.check("mode", options.modes, MODES)
    folder = options.out or record.RESULTS
    check_place(folder, "--out", folder=True)
    cfg, _ = configured([options.config, *shlex.split(options.override)], "python -m benchmarks scaling", NoOptions)
    if cfg.train.strategy != "jit":
        raise UserError(f"got train.strategy {cfg.train.strategy}, expected jit, try --override='--train.strategy jit'")
    cfg = dataclasses.replace(cfg, eval=dataclasses.replace(cfg.eval, batch_size=None))  # no part of a step
    distributed.initialize()
    sizes = sorted(set(options.devices))
    if not jax.distributed.is_initialized():
        virtual(sizes[-1] if sizes else VIRTUAL)
    runs.compilation_cache()
    here, hosts = jax.devices(), machines()
    sizes = sizes or powers(len(here))
    checked: dict[str, str] = {}
    points = [
        each
        for grown in dict.fromkeys(axes)
        for mode in dict.fromkeys(options.modes)
        for each in curve(cfg, mode, grown, sizes, here, checked)
    ]
    base = basis(cfg, options.steps)
    stem = options.name or f"scaling_{Path(options.config).stem}_{record.slug(base['hardware'])}"
    rows = earlier = record.kept(folder / f"{stem}.json", base, "scaling") if distributed.is_main() else []
    title = f"Scaling of {Path(options.config).stem}"
    try:
        for rows in measured(points, earlier, base, hosts):
            if distributed.is_main():
                curves.write(folder, stem, title, rows, options.override)
    except KeyboardInterrupt:
        print("interrupted: the points that are done are kept, and the same command goes on from there", flush=True)
        return 130
    if not distributed.is_main():
        return 0
    print(curves.write(folder, stem, title, rows, options.override, draw=True).read_text())
    wrong = [row for row in curves.judged(rows) if row["platform"] == "cpu" and row["difference"]]
    if wrong:
        print(f"{len(wrong)} of {len(rows)} points were not as planned; the last column says what differs")
    return 1 if wrong else 0


def virtual(count: int) -> None:
    """Let a CPU show so many devices, unless their number is given. JAX must not have looked for devices yet."""
    flags = os.environ.get("XLA_FLAGS", "")
    if "--xla_force_host_platform_device_count" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={count}".strip()
    # with fewer threads of XLA's CPU client than collectives under way, devices wait for each other for good
    os.environ.setdefault("PJRT_NPROC", str(max(os.cpu_count() or 1, 4 * count)))


def powers(count: int) -> list[int]:
    """Return 1, 2, 4, and so on, up to a number."""
    return [2**k for k in range(count.bit_length())]


def machines() -> list[str]:
    """Return the names of the machines on which the processes run."""
    distributed.publish("scaling: host", socket.gethostname())
    found = distributed.collect("scaling: host", 600.0)
    return [found[index] for index in sorted(found)]


def curve(
    cfg: Config, mode: str, axes: Sequence[str], sizes: Sequence[int], here: Sequence[Any], checked: dict[str, str]
) -> list[Point]:
    """Return the points of a curve; those that the config cannot be at say why. `checked` keeps what was found so far.

    Raises:
        UserError: the sizes are no multiples of the smallest or of the mesh, there are fewer devices, or the config
            does not even fit the smallest number of them.
    """
    start = {axis: max(1, getattr(cfg.mesh, axis)) for axis in rules.AXES}
    whole = math.prod(start.values())
    if sizes[-1] > len(here):
        raise UserError(f"got --devices {sizes[-1]}, expected at most the {len(here)} that are here, try fewer")
    found = []
    for count in sizes:
        for least, what in ((sizes[0], "the smallest number"), (whole, "the config's mesh")):
            if count % least:
                raise UserError(
                    f"got --devices {count}, expected a multiple of {least}, {what}, try {-(-count // least) * least}"
                )
        mesh, times = dict(start), count // sizes[0]
        for axis, size in dealt(count // whole, axes).items():
            mesh[axis] *= size
        now = dataclasses.replace(cfg, mesh=dataclasses.replace(cfg.mesh, **mesh))
        if mode == "weak":
            now = dataclasses.replace(now, data=dataclasses.replace(cfg.data, batch_size=cfg.data.batch_size * times))
        elif found and rules.shards(mesh, rules.RULES["batch"]) > 1:  # as `jaxmodels plan --scaling`
            shards = [rules.shards(each, rules.RULES["batch"]) for each in (mesh, vars(found[0].config.mesh))]
            fewer = max(1, cfg.train.accumulate * shards[1] // shards[0])
            now = dataclasses.replace(now, train=dataclasses.replace(cfg.train, accumulate=fewer))
        key = f"{count} {json.dumps(to_json(now), sort_keys=True)}"
        if key not in checked:
            try:
                assemble(now, here[:count], opened=False)
                checked[key] = ""
            except UserError as error:
                checked[key] = str(error)
        if checked[key] and not found:
            raise UserError(checked[key])
        found.append(Point(mode, tuple(axes), count, now, checked[key].partition(", try ")[0]))
    return found


def dealt(growth: int, axes: Sequence[str]) -> dict[str, int]:
    """Divide a growth among axes by its prime factors, as evenly as they allow, and the rest to the inner ones."""
    found = dict.fromkeys(axes, 1)
    factors = [prime for prime in range(growth, 1, -1) for _ in range(_power(growth, prime))]
    inward = sorted(axes, key=rules.AXES.index, reverse=True)
    for factor in factors:
        found[min(inward, key=lambda axis: found[axis])] *= factor
    return found


def _power(number: int, prime: int) -> int:
    """How often a prime divides a number; 0 for what is none."""
    if any(prime % each == 0 for each in range(2, math.isqrt(prime) + 1)):
        return 0
    power = 0
    while number % prime == 0:
        number, power = number // prime, power + 1
    return power


def basis(cfg: Config, steps: int) -> dict[str, Any]:
    """Return what all points of a record have in common: with another one of these, a point is another one."""
    device, own = jax.devices()[0], Path(__file__).parent
    code = hashlib.sha256(caches.source().encode())
    for name in ("point.py", "collectives.py"):
        code.update((own / name).read_bytes())
    return {
        "hardware": record.processor() if device.platform == "cpu" else device.device_kind,
        "config": record.digest(to_json(cfg)),
        "steps": steps,
        "versions": {"python": platform.python_version(), **record.versions()},
        "code": code.hexdigest()[:16],
    }


def measured(
    points: Sequence[Point], rows: Sequence[dict[str, Any]], base: Mapping[str, Any], hosts: Sequence[str]
) -> Iterator[list[dict[str, Any]]]:
    """Measure the points that are not among the rows; yield all rows whenever there is another one.

    All processes measure the same points, those that the first one lacks.
    """
    processes, here = jax.process_count(), jax.devices()
    several = f", {jax.local_device_count()} a process" if processes > 1 else ""
    keys = [record.digest([base, to_json(each.config), each.devices, processes, several]) for each in points]
    results = {row["key"]: row for row in rows}
    if distributed.is_main():
        distributed.announce("scaling: asked", json.dumps([key for key in keys if key not in results]))
    wanted = set(json.loads(distributed.heard("scaling: asked", 600.0) or "[]"))
    found = {(row["curve"], row["devices"], row["key"]): row for row in rows}
    for number, (key, each) in enumerate(zip(keys, points, strict=True), 1):
        name = f"{each.curve}{several} at {each.devices}"
        used = here[: each.devices]
        row = {
            "key": key,
            "base": dict(base),
            "curve": f"{each.curve}{several}",
            "mode": each.mode,
            "axes": list(each.axes),
            "devices": each.devices,
            "processes": len({device.process_index for device in used}),
            "nodes": len({hosts[device.process_index] for device in used}),
            "platform": used[0].platform,
            "mesh": {axis: size for axis in rules.AXES if (size := getattr(each.config.mesh, axis)) > 1},
            "batch_size": each.config.data.batch_size,
            "accumulate": each.config.train.accumulate,
            "commit": results.get(key, {}).get("commit") or record.git("rev-parse", "HEAD"),
        }
        if not each.failure and key in wanted:
            if distributed.is_main():
                print(f"[{number}/{len(points)}] {name} ...", flush=True)
            results[key] = point.measure(key, each.config, used, hosts, base["steps"])
            wanted.remove(key)
        result = results.get(key, {})
        row["failure"] = each.failure or result.get("failure", "")
        found[row["curve"], each.devices, key] = {**result, **row}
        yield list(found.values())
