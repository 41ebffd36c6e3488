"""`jaxmodels plan --scaling`: predicted scaling with the number of devices, and which mesh axis is worth growing.

Strong scaling keeps the batch size; weak scaling keeps the rows of a device. Starting from the mesh of the first
topology, one axis at a time takes all of the growth. Every point is compiled by the real compiler.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, Literal

from jaxmodels.config import Config, Mesh
from jaxmodels.errors import UserError
from jaxmodels.plan import compile as compiling
from jaxmodels.plan.arithmetic import Arithmetic
from jaxmodels.plan.candidates import made_to_fit
from jaxmodels.plan.figures import figures
from jaxmodels.plan.topology import Topology

Mode = Literal["strong", "weak"]
MODES: tuple[Mode, ...] = ("weak", "strong")
PAYS = 0.8
"""The least efficiency, relative to the first size, at which an axis counts as worth growing."""
_GIB = 2**30


@dataclass(frozen=True)
class Point:
    """A step at one size, where one axis has taken all of the growth."""

    topology: Topology
    mode: Mode
    axis: str
    cfg: Config | None
    """None if the axis cannot grow to this size; `failure` says why."""
    plan: dict[str, Any] | None = None
    failure: str = ""
    efficiency: float = 0.0
    """Throughput of a device relative to the first size; 0 if the step does not run."""

    @property
    def runs(self) -> bool:
        return self.plan is not None and self.plan["fits"] and "step_seconds" in self.plan


def curves(
    cfg: Config, on: Sequence[Topology], workers: int = 0, say: Callable[[str], None] = print
) -> tuple[Point, list[Point]]:
    """The point of the first size, and the points of the other sizes for each axis and mode.

    Raises:
        UserError: the sizes are not growing multiples of the first, or the config does not run on the first.
    """
    check_sizes(on)
    start = Arithmetic(cfg, on[0])
    sizes = start.place(cfg.mesh)
    mesh = dataclasses.replace(cfg.mesh, **{axis: sizes[axis] for axis in start.rules.AXES})
    cfg = dataclasses.replace(cfg, mesh=mesh)
    first = compiled(Point(on[0], "strong", "", cfg))
    if first.failure:
        raise UserError(f"got {on[0].name}, expected a first size on which the step runs ({first.failure}), {REMEDY}")
    assert first.plan is not None
    first = dataclasses.replace(first, efficiency=1.0)
    say(f"{progress(first)}  (the first size, against which the others are held)")
    points = [
        grown(cfg, arithmetic, mode, axis, topology.devices // on[0].devices)
        for topology in on[1:]
        for arithmetic in [start.on(topology)]
        for mode in MODES
        for axis in offered(arithmetic)
    ]
    with ThreadPoolExecutor(workers or max(1, (os.cpu_count() or 1) // 2)) as pool:
        running = {pool.submit(compiled, point): i for i, point in enumerate(points) if point.cfg is not None}
        for done, each in enumerate(as_completed(running), 1):
            made = each.result()
            if made.runs and made.plan is not None and first.plan is not None:
                rate = made.plan["per_second_device"] / first.plan["per_second_device"]
                made = dataclasses.replace(made, efficiency=rate)
            points[running[each]] = made
            say(f"[{done}/{len(running)}] {progress(made)}")
    return first, points


REMEDY = "try a larger first size, or plan it without --scaling to see why"


def check_sizes(on: Sequence[Topology]) -> None:
    """Refuse topologies that do not make a curve."""
    names = ",".join(each.name for each in on)
    if len(on) < 2:
        raise UserError(f"got --scaling on {names}, expected several sizes, try --on v5p:4x4x4,8x8x8,16x16x16")
    if len({each.hardware.name for each in on}) > 1:
        raise UserError(f"got --scaling on {names}, expected one kind of hardware, try a command for each")
    for before, after in itertools.pairwise(on):
        if after.devices <= before.devices or after.devices % on[0].devices:
            raise UserError(
                f"got --scaling on {names}, expected sizes that grow, in multiples of {on[0].devices} devices, "
                f"try {on[0].name} first and twice as many next"
            )


def offered(arithmetic: Arithmetic) -> list[str]:
    """Mesh axes that shard something of this model."""
    cut = {axis for name in arithmetic.logical for axis in arithmetic.rules.RULES[name]}
    cut |= set(arithmetic.rules.RULES["batch"]) - set(arithmetic.rules.RULES["expert"])
    if arithmetic.length > 1 and "heads" in arithmetic.logical:
        cut |= set(arithmetic.rules.RULES["seq"])
    if "heads" not in arithmetic.logical:
        cut -= set(arithmetic.rules.RULES["heads"])
    return [
        axis for axis in arithmetic.rules.AXES if axis in cut or ("expert" in arithmetic.logical and axis == "expert")
    ]


def grown(cfg: Config, arithmetic: Arithmetic, mode: Mode, axis: str, times: int) -> Point:
    """The point at which one axis is `times` as large, or why it cannot be."""
    data = cfg.data
    if mode == "weak":
        data = dataclasses.replace(data, batch_size=data.batch_size * times)
    mesh: Mesh = dataclasses.replace(cfg.mesh, **{axis: getattr(cfg.mesh, axis) * times})
    train = cfg.train
    if mode == "strong" and axis in arithmetic.rules.RULES["batch"]:  # keep the microbatch where possible
        train = dataclasses.replace(train, accumulate=max(1, train.accumulate // times))
    now = dataclasses.replace(cfg, data=data, mesh=mesh, train=train)
    try:
        guess = arithmetic.guess(now)
    except UserError as error:
        return Point(arithmetic.topology, mode, axis, None, failure=str(error).partition(", try ")[0])
    memory = arithmetic.topology.hardware.memory
    if guess.arguments > memory:
        reason = f"parameters and optimizer need {guess.arguments / _GIB:.0f} of {memory / _GIB:.0f} GiB"
        return Point(arithmetic.topology, mode, axis, None, failure=reason)
    return Point(arithmetic.topology, mode, axis, made_to_fit(now, arithmetic))


def compiled(point: Point) -> Point:
    """Compile a point; it gets a plan or the reason why there is none."""
    assert point.cfg is not None
    try:
        plan = figures(point.cfg, compiling.compiled(point.cfg, point.topology))
    except (UserError, RuntimeError) as error:
        return dataclasses.replace(point, failure=" ".join(str(error).split())[-300:].partition(", try ")[0])
    memory = plan["memory"]
    reason = "" if plan["fits"] else f"needs {memory['peak'] / _GIB:.0f} of {memory['device'] / _GIB:.0f} GiB"
    if not plan["fits_host"]:
        reason = plan["shortage"]
    if plan["fits"] and "step_seconds" not in plan:
        reason = f"no time is given for {', '.join(plan['uncounted'])}"
    return dataclasses.replace(point, plan=plan, failure=reason)


def axes_of(points: Sequence[Point]) -> list[str]:
    """The axes of the points, in order."""
    return list(dict.fromkeys(each.axis for each in points))


def verdict(first: Point, points: Sequence[Point], mode: Mode, axis: str) -> str:
    """One line on the size up to which an axis is worth growing, and why not beyond it."""
    reached = first.topology
    for each in (point for point in points if (point.mode, point.axis) == (mode, axis)):
        devices = each.topology.devices
        name = f"{mode} scaling along {axis}"
        paid = f"pays up to {reached.devices:,} devices" if reached is not first.topology else "does not pay"
        if not each.runs:
            return f"{name} {paid}: at {devices:,} {each.failure}"
        if each.efficiency < PAYS:
            return f"{name} {paid}: at {devices:,} the efficiency is {each.efficiency:.2f}, {why(first, each)}"
        reached = each.topology
    last = [point for point in points if (point.mode, point.axis) == (mode, axis)][-1]
    return (
        f"{mode} scaling along {axis} pays up to {reached.devices:,} devices, the largest size: {last.efficiency:.2f}"
    )


def why(first: Point, point: Point) -> str:
    """Say what makes a step slower than ideal."""
    from jaxmodels.parallel import rules

    assert first.plan is not None and point.plan is not None
    times = point.topology.devices / first.topology.devices
    ideal = 1.0 if point.mode == "weak" else 1 / times
    before, after = first.plan["seconds"], point.plan["seconds"]
    excess = {name: after[name] - ideal * before[name] for name in after}
    most = max(excess, key=lambda name: excess[name])
    reason = f"{excess[most]:.3g} s more of a step of {point.plan['step_seconds']:.3g} s"
    if most == "compute":
        idle = "stages wait for the first and the last microbatch" if point.axis == rules.STAGE else ""
        return f"since products take {reason}: {idle or 'what the axis does not cut is computed by all its devices'}"
    if most == "memory":
        return (
            f"since bytes between memory and compute take {reason}: pieces are small, or what is not cut is read by all"
        )
    if most == "launches":
        return f"since beginning instructions takes {reason}: each has too little to do"
    known = {(t["kind"], tuple(t["axes"])): t["seconds"] for t in first.plan["transfers"]}
    sent = max(
        point.plan["transfers"], key=lambda t: t["seconds"] - ideal * known.get((t["kind"], tuple(t["axes"])), 0.0)
    )
    return (
        f"since links are waited for {reason}: {sent['kind']} along {'*'.join(sent['axes']) or 'all'} over "
        f"{sent['link']} ({sent['devices']} devices, {sent['bytes'] / _GIB:.3g} GiB, {sent['seconds']:.3g} s)"
    )


def progress(point: Point) -> str:
    """One line on a point."""
    what = f"{point.mode} along {point.axis}: " if point.axis else ""
    if not point.runs:
        return f"{point.topology.name} {what}{point.failure}"
    plan = point.plan or {}
    return f"{point.topology.name} {what}{plan['step_seconds']:.4g} s, efficiency {point.efficiency:.2f}"


def curves_table(first: Point, points: Sequence[Point]) -> str:
    """All points as a table."""
    assert first.plan is not None
    unit = first.plan["unit"]
    head = f"{'axis':<10}{'devices':>8}{'batch':>9}{'step s':>10}{unit + '/s':>15}{'a device':>10}{'efficiency':>12}"
    lines = []
    for mode in MODES:
        lines += ["", f"{mode} scaling from {first.topology.name}", f"{head}{'MFU':>8}{'GiB':>7}  bound by"]
        for each in [first, *(point for point in points if point.mode == mode)]:
            start = f"{each.axis or '(first)':<10}{each.topology.devices:>8,}"
            if not each.runs or each.plan is None or each.cfg is None:
                lines.append(f"{start}  {each.failure}")
                continue
            plan, batch = each.plan, each.cfg.data.batch_size
            extra = f", accumulate {each.cfg.train.accumulate}" if each.cfg.train.accumulate > 1 else ""
            lines.append(
                f"{start}{batch:>9,}{plan['step_seconds']:>10.4g}{plan['per_second']:>15,.0f}"
                f"{plan['per_second_device']:>10,.0f}{each.efficiency:>12.2f}{plan['mfu']:>8.1%}"
                f"{plan['memory']['peak'] / _GIB:>7.1f}  {plan['binds']}{extra}"
            )
    return "\n".join(lines)


def written(point: Point) -> dict[str, Any]:
    """A point as JSON values."""
    batch = None if point.cfg is None else point.cfg.data.batch_size
    return {
        "on": point.topology.name,
        "devices": point.topology.devices,
        "mode": point.mode if point.axis else None,
        "axis": point.axis or None,
        "batch_size": batch,
        "accumulate": None if point.cfg is None else point.cfg.train.accumulate,
        "efficiency": point.efficiency,
        "failure": point.failure,
        "plan": point.plan,
    }
