"""`jaxmodels plan CONFIG.py --on HARDWARE`: memory and time of a job on hardware you don't have."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxmodels.commands.options import Configured
from jaxmodels.config import Config
from jaxmodels.errors import UserError, check_place
from jaxmodels.fields import Count, Positive, Section, Workers

if TYPE_CHECKING:
    from jaxmodels.plan.topology import Topology


USED_BY = {
    **dict.fromkeys(("node_hours", "save_rate", "restart"), ("failures",)),
    "candidates": ("search",),
    **dict.fromkeys(("workers", "out"), ("search", "scaling")),
}
"""Options of some kinds of plan alone, and the options that ask for these."""
PICTURE = Path("scaling.png")
"""Where the picture of a scaling goes when no file is named."""


@dataclass(frozen=True)
class PlanOptions(Section):
    """The hardware to plan for, and the fields of the experiment."""

    on: str = ""
    """Hardware and topology, or several separated by commas: h100:4x8 (4 nodes of 8 GPUs), v5p:4x4x4,8x8x8."""
    search: bool = False
    """Search meshes, microbatches, remat and attention kernels."""
    scaling: bool = False
    """Show how the step scales over the topologies of --on."""
    failures: bool = False
    """Forecast goodput and the end of the job under failures."""
    node_hours: Positive | None = None
    """Mean hours between failures of a node. Default: 6300."""
    save_rate: Positive | None = None
    """GB/s at which a node writes checkpoints. Default: 1."""
    restart: Positive | None = None
    """Seconds from a failure to the next step. Default: 300."""
    candidates: Count | None = None
    """How many candidates a search compiles. Default: 40."""
    workers: Workers | None = None
    """How many are compiled at a time. Default: half the cores."""
    out: Path | None = None
    """File for the options found (h100-4x8.args) or the picture (scaling.png)."""
    json: Path | None = None
    """Write the plans to this file too."""


def plan(given: Configured, options: PlanOptions) -> None:
    """Plan a config on each requested topology."""
    import jax

    jax.config.update("jax_platforms", "cpu")  # only shapes are needed: leave accelerators alone
    planned(given.config, options, given.file)


def planned(cfg: Config, options: PlanOptions, file: str = "") -> None:
    """Plan a config on each requested topology and print the results; `file` is the config's.

    Raises:
        UserError: there is no topology or an unknown one, or the config does not fit it.
    """
    if not options.on:
        raise UserError("got no --on, expected a topology, try --on h100:1x8 or --on v5e:4x4")
    if options.search and options.scaling:
        raise UserError(
            "got --search and --scaling, expected one of them, try --search first and --scaling with its winner"
        )
    given = {name: value for name in USED_BY if (value := getattr(options, name)) is not None}
    for name, value in given.items():
        if not any(getattr(options, kind) for kind in USED_BY[name]):
            shown = f"--{name.replace('_', '-')} {value:g}" if isinstance(value, float) else f"--{name} {value}"
            kinds = " or ".join(f"--{kind}" for kind in USED_BY[name])
            raise UserError(f"got {shown} without {kinds}, expected both, try {kinds.partition(' ')[0]}")
    rates = {name: value for name, value in given.items() if USED_BY[name] == ("failures",)}
    if options.failures and (options.search or options.scaling):
        raise UserError(
            "got --failures with --search or --scaling, expected one of them, try --failures with the winner's options"
        )
    on = topologies_of(options.on)
    made = [args_of(each) for each in on] if options.search else [PICTURE] if options.scaling else []
    places = [("--json", [options.json]), ("--out", [options.out] if options.out else made)]
    for option, paths in places:
        for path in filter(None, paths):
            check_place(path, option)
    if options.search:
        plans = search(cfg, on, options, file)
    elif options.scaling:
        plans = scale(cfg, on, options)
    else:
        plans = plan_each(cfg, on, rates if options.failures else None)
    if options.json is not None:
        options.json.write_text(json.dumps(plans, indent=2) + "\n")


def args_of(topology: Topology) -> Path:
    """Where a search leaves its options when no file is named."""
    return Path(f"{topology.name.replace(':', '-')}.args")


def topologies_of(on: str) -> list[Topology]:
    """Parse topologies by their names; a topology without hardware uses that of the one before it."""
    from jaxmodels.plan import topology

    names: list[str] = []
    for name in on.split(","):
        known = names[-1].partition(":")[0] + ":" if names and ":" not in name else ""
        names.append(known + name.strip())
    return [topology.parse(name) for name in names]


def plan_each(cfg: Config, on: list[Topology], rates: dict[str, float] | None = None) -> list[dict[str, Any]]:
    """Plan the config unchanged on each topology; with failures at these `rates`, if given."""
    from jaxmodels.plan import compile as compiling
    from jaxmodels.plan import failures
    from jaxmodels.plan.figures import figures, figures_table

    plans = []
    for each in on:
        print(f"compiling for {each.name} ({each.devices:,} device(s)) ...", flush=True)
        plans.append(figures(cfg, compiling.compiled(cfg, each)))
        print(figures_table(cfg, plans[-1]), flush=True)
        if rates is None:
            continue
        if "step_seconds" not in plans[-1]:
            print("no forecast of failures: the plan gives no time")
            continue
        found = failures.forecast(plans[-1], each.hardware, each.nodes, cfg.train.steps, cfg.checkpoint.every, **rates)
        plans[-1]["failures"] = found
        print(failures.forecast_table(found), flush=True)
    return plans


def search(cfg: Config, on: list[Topology], options: PlanOptions, file: str) -> list[dict[str, Any]]:
    """Search for the best ways to run the config on each topology; write the fastest one's options of `train` to a
    file."""
    from jaxmodels import config as configs
    from jaxmodels.plan import search as searching
    from jaxmodels.plan.candidates import arguments, overrides

    if options.out is not None and len(on) > 1:
        raise UserError(f"got --out {options.out} for {len(on)} topologies, expected one of them, try without --out")
    base = configs.load(file) if file else cfg
    plans = []
    for each in on:
        say = functools.partial(print, flush=True)
        found = searching.search(cfg, each, options.candidates or 40, options.workers or 0, say)
        options_of_train = arguments(overrides(base, found.winner.candidate.cfg))
        print(searching.report(found, cfg))
        print("\n" + " ".join(["jaxmodels train", file or "CONFIG", *options_of_train]))
        out = options.out or args_of(each)
        out.write_text(" ".join(options_of_train) + "\n")
        print(f"(these options are in {out}: jaxmodels train {file or 'CONFIG'} $(cat {out}))")
        plans.append(searching.written(found, base))
    return plans


def scale(cfg: Config, on: list[Topology], options: PlanOptions) -> list[dict[str, Any]]:
    """Compute the scaling curves of the config over topologies, with a picture."""
    from jaxmodels.plan import scaling
    from jaxmodels.report import scaling as pictures

    first, points = scaling.curves(cfg, on, options.workers or 0, functools.partial(print, flush=True))
    verdicts = [
        scaling.verdict(first, points, mode, axis) for mode in scaling.MODES for axis in scaling.axes_of(points)
    ]
    print(scaling.curves_table(first, points))
    print("\n" + "\n".join(verdicts))
    assert first.plan is not None
    mesh = " ".join(f"{axis}={size}" for axis, size in first.plan["mesh"].items() if size > 1) or "one device"
    title = f"{type(cfg.model).__name__.removesuffix('Config')}, {first.plan['parameters'] / 1e9:.3g} B parameters, "
    title += f"predicted from {first.topology.name} with mesh {mesh}"
    shown = [
        {**scaling.written(each), "per_second": each.plan["per_second"]} for each in points if each.runs and each.plan
    ]
    out, start = options.out or PICTURE, (first.topology.devices, first.plan["per_second"])
    pictures.draw(out, title, first.plan["unit"], start, scaling.PAYS, shown)
    print(f"\npicture: {out}")
    return [scaling.written(first), *map(scaling.written, points), {"verdicts": verdicts}]
