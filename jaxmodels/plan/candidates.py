"""Candidates for a search: meshes, microbatches, and the fields of a model that decide how it is computed."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

from jaxmodels import config as configs
from jaxmodels.config import Config, Mesh
from jaxmodels.errors import UserError
from jaxmodels.plan.arithmetic import KNOBS, Arithmetic, Guess
from jaxmodels.plan.topology import Topology

PIECE = 4096
"""The fewest tokens that a device should hold of a sequence that is sharded over `context`."""
WIDEST = 16
"""The largest `tensor` axis where no switch sets the limit."""
SHORT = 4096
"""The longest sequence for which attention that writes its scores to memory may be faster."""
STAGES = (1, 2, 4)
DEEPEST = 48
"""The most layers for which a search tries an unrolled step; deeper ones take long to compile."""


@dataclass(frozen=True)
class Candidate:
    """A way to run an experiment, with a guess of its cost."""

    cfg: Config
    mesh: Mesh
    """The config's mesh with all axes fixed."""
    origin: str
    """'as configured', 'usual' (what an expert would try), or empty."""
    guess: Guess


def overrides(base: Config, cfg: Config) -> dict[str, Any]:
    """The fields in which a config differs from another, by dotted name."""
    return {name: value for name, (_, value) in configs.differences(base, cfg).items()}


def arguments(overrides: dict[str, Any]) -> list[str]:
    """Fields as command-line options of `jaxmodels train CONFIG`."""
    found = []
    for name, value in overrides.items():
        found += [f"--{name.replace('_', '-')}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return found


@dataclass
class Drawn:
    """The candidates of a search, and why others were dropped."""

    kept: list[Candidate]
    """Candidates: the configured one, the usual ones, then the others by guessed time."""
    dropped: collections.Counter[str]
    """Number of candidates that were dropped, by reason."""
    refused: dict[str, str]
    """Reasons why the configured or a usual candidate was dropped, by its options."""

    @property
    def number(self) -> int:
        return len(self.kept) + self.dropped.total()


def draw(arithmetic: Arithmetic) -> Drawn:
    """All candidates that arithmetic does not rule out."""
    cfg, memory = arithmetic.cfg, arithmetic.topology.hardware.memory
    drawn = Drawn([], collections.Counter(), {})
    seen: set[Any] = set()
    for origin, each in _all(arithmetic):
        mesh = settled(each.mesh, arithmetic)
        key = mesh, each.model, each.train.accumulate  # all other fields are the same
        if key in seen:
            continue
        seen.add(key)
        reason = ""
        try:
            guess = arithmetic.guess(each)
        except UserError as error:
            reason, detail = "the mesh does not divide a parameter, the batch or its tokens", str(error)
        else:
            if guess.arguments > memory:  # how much else is in memory at a time only the compiler knows
                reason = "parameters and optimizer do not fit"
            detail = f"{reason}: {guess.arguments / 2**30:.0f} of {memory / 2**30:.0f} GiB" if reason else ""
        if not reason:
            drawn.kept.append(Candidate(each, mesh, origin, guess))
            continue
        drawn.dropped[reason] += 1
        if origin:
            drawn.refused[" ".join(arguments(overrides(cfg, each)))] = detail
    order = {"as configured": 0, "usual": 1, "": 2}
    drawn.kept.sort(key=lambda each: (order[each.origin], each.guess.seconds, each.guess.peak))
    return drawn


def settled(mesh: Mesh, arithmetic: Arithmetic) -> Mesh:
    """The mesh with its open axis, if it has one, set to the remaining devices."""
    axes, fixed = arithmetic.rules.AXES, arithmetic.topology.devices
    for axis in axes:
        fixed //= max(1, getattr(mesh, axis))
    return dataclasses.replace(mesh, **{axis: fixed for axis in axes if getattr(mesh, axis) == -1})


def _all(arithmetic: Arithmetic) -> Iterator[tuple[str, Config]]:
    cfg = arithmetic.cfg
    yield "as configured", cfg
    for mesh in usual(arithmetic):
        yield "usual", made_to_fit(dataclasses.replace(cfg, mesh=mesh), arithmetic)
    for mesh in meshes(arithmetic):
        for change in knobs(cfg, arithmetic, mesh):
            yield "", dataclasses.replace(change, mesh=mesh)


def made_to_fit(cfg: Config, arithmetic: Arithmetic) -> Config:
    """The config with enough microbatches to fit by its guess; unchanged if no number of them is enough."""
    memory, tried = arithmetic.topology.hardware.memory, cfg
    try:
        while (guess := arithmetic.guess(tried)).peak > memory:
            if guess.kept > memory:
                return cfg
            tried = dataclasses.replace(
                tried, train=dataclasses.replace(tried.train, accumulate=2 * tried.train.accumulate)
            )
    except UserError:  # the config itself is what the error should be about
        return cfg
    return tried


def inner(topology: Topology) -> int:
    """Number of devices that the fastest links connect: a node of GPUs, or the last dimension of a torus."""
    last = topology.shape[-1] * topology.hardware.per_chip
    return last if topology.hardware.platform == "cuda" else min(last, WIDEST)


def usual(arithmetic: Arithmetic) -> list[Mesh]:
    """Up to ten meshes that an expert would try first and that fit the devices and the model."""
    devices, node = arithmetic.topology.devices, inner(arithmetic.topology)
    requests: list[dict[str, Any]] = [
        dict(data=1, fsdp=devices),
        dict(data=devices),
        dict(data=devices // node, fsdp=node),
        dict(data=1, fsdp=devices // 2, tensor=2),
        dict(data=1, fsdp=devices // 4, tensor=4),
        dict(data=1, fsdp=devices // 4, tensor=4, sequence=True),
        dict(data=1, fsdp=devices // 8, tensor=8, sequence=True),
        dict(data=devices // node, tensor=node),
    ]
    if "expert" in arithmetic.logical:
        most = max(s[n.index("expert")] for s, n in arithmetic.parameters if "expert" in n)
        requests += [dict(data=1, expert=e, fsdp=devices // e) for e in (most, node) if devices % e == most % e == 0]
    requests += [
        dict(data=1, fsdp=devices // 2, context=2),
        dict(data=2, fsdp=devices // 2),
        dict(data=1, fsdp=devices // 8, tensor=8),
        dict(data=4, fsdp=devices // 4),
    ]
    found: list[Mesh] = []
    for sizes in requests:
        parts = [size for size in sizes.values() if not isinstance(size, bool)]
        mesh = Mesh(**sizes) if 0 not in parts else None
        if mesh is None or _product(mesh, arithmetic) != devices or mesh in found:
            continue
        if _sensible(mesh, arithmetic):
            found.append(mesh)
    return found[:10]


def _product(mesh: Mesh, arithmetic: Arithmetic) -> int:
    total = 1
    for axis in arithmetic.rules.AXES:
        total *= getattr(mesh, axis)
    return total


def _sensible(mesh: Mesh, arithmetic: Arithmetic) -> bool:
    """Whether the model, the data and the links can make use of every axis of a mesh."""
    limit = inner(arithmetic.topology) if arithmetic.topology.hardware.platform == "cuda" else WIDEST
    heads = "heads" in arithmetic.logical
    return (
        (mesh.tensor == 1 or (heads and mesh.tensor <= limit))
        and (mesh.context == 1 or (heads and arithmetic.length // mesh.context >= PIECE))
        and (mesh.expert == 1 or "expert" in arithmetic.logical)
        and (mesh.stage == 1 or "layers" in arithmetic.logical)
        and (not mesh.sequence or (mesh.tensor > 1 and heads))
    )


def meshes(arithmetic: Arithmetic) -> Iterator[Mesh]:
    """All sensible meshes of the devices."""
    devices, batch = arithmetic.topology.devices, arithmetic.cfg.data.batch_size
    for stage in STAGES:
        for tensor in _divisors(devices):
            for context in _divisors(devices // tensor):
                for expert in _divisors(devices // tensor // context):
                    left, rest = divmod(devices, tensor * context * expert * stage)
                    if rest:
                        continue
                    for fsdp in _divisors(left):
                        for sequence in (False, True) if tensor > 1 else (False,):
                            sizes: dict[str, Any] = dict(
                                data=left // fsdp,
                                fsdp=fsdp,
                                expert=expert,
                                context=context,
                                tensor=tensor,
                                sequence=sequence,
                                stage=stage,
                            )
                            mesh = Mesh(**sizes)
                            if _sensible(mesh, arithmetic) and batch % (left * expert) == 0:
                                yield mesh


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def knobs(cfg: Config, arithmetic: Arithmetic, mesh: Mesh) -> Iterator[Config]:
    """The config with each number of microbatches, remat, kernel and unrolling that a mesh allows.

    The batch size stays the same.
    """
    rows = cfg.data.batch_size // (mesh.data * mesh.stage * mesh.fsdp * mesh.expert)
    times = [n for n in _divisors(rows) if n & (n - 1) == 0]
    if cfg.train.accumulate not in times and rows % cfg.train.accumulate == 0:
        times.append(cfg.train.accumulate)
    options: dict[str, list[Any]] = {
        name: choices for name, choices in _choices(cfg, arithmetic, mesh).items() if hasattr(cfg.model, name)
    }
    changed = [cfg.model]
    for name, choices in options.items():
        changed = [dataclasses.replace(model, **{name: choice}) for model in changed for choice in choices]
    for model in changed:
        for accumulate in times:
            yield dataclasses.replace(cfg, model=model, train=dataclasses.replace(cfg.train, accumulate=accumulate))


def _choices(cfg: Config, arithmetic: Arithmetic, mesh: Mesh) -> dict[str, list[Any]]:
    kernels = dict.fromkeys([getattr(cfg.model, "attention", KNOBS["attention"]), KNOBS["attention"]])
    if mesh.context > 1:
        kernels["ulysses"] = None
    elif arithmetic.length <= SHORT:
        kernels["xla"] = None
    found: dict[str, list[Any]] = {"remat": remats(cfg.model), "attention": list(kernels)}
    if mesh.stage > 1 or not arithmetic.topology.hardware.host:
        found["remat"] = [kind for kind in found["remat"] if kind != "offload"]
    if hasattr(cfg.model, "remat"):  # other models unroll something else than blocks
        whole = arithmetic.layers if arithmetic.layers <= DEEPEST else 1
        found["unroll"] = list(dict.fromkeys([getattr(cfg.model, "unroll", 1), 1, whole]))
    return found


def remats(model: Any) -> list[str]:
    """The kinds of rematerialization that a model's config offers."""
    return list(get_args(get_type_hints(type(model)).get("remat")))
