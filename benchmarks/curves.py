"""What scaling curves say: efficiency, where a point is not as planned and why, and how all of it is shown."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import record

Row = Mapping[str, Any]
"""A point as it stands in a record."""
NEAR = 0.15
"""How far a step's measured seconds may be from the plan's, relative to these, without a reason being looked for."""
SAME = 1e-6
"""The same for counts and bytes."""
_MIB, _GIB = 2**20, 2**30


def judged(rows: Sequence[Row]) -> list[Row]:
    """Return the rows in the order of their curves, with efficiency, the plan's, and what there is to say."""
    found: list[Row] = []
    order = list(dict.fromkeys(row["curve"] for row in rows))
    for row in sorted(rows, key=lambda row: (order.index(row["curve"]), row["devices"])):
        more: dict[str, Any] = {
            "efficiency": None,
            "planned_efficiency": None,
            "difference": "",
            "said": row["failure"],
        }
        if not row["failure"]:
            first = next((each for each in found if each["curve"] == row["curve"] and not each["failure"]), row)
            more["efficiency"] = efficiency(first, row)
            more["planned_efficiency"] = efficiency(*map(as_planned, (first, row)))
            more["difference"] = difference(row)
            more["said"] = verdict(row, more["difference"])
        found.append({**row, **more})
    return found


def efficiency(first: Mapping[str, Any] | None, row: Mapping[str, Any] | None) -> float | None:
    """Return the throughput of a device relative to that at the smallest point of the curve."""
    if first is None or row is None:
        return None
    return (row["per_second"] / row["devices"]) / (first["per_second"] / first["devices"])


def as_planned(row: Row) -> Row | None:
    """Return devices and throughput of a row as planned; None: the plan has no seconds."""
    rate = row["plan"].get("per_second")
    return None if rate is None else {"devices": row["devices"], "per_second": rate}


def difference(row: Row) -> str:
    """Say what ran that was not planned, by count or by bytes; empty: all was as planned, or there is no plan."""
    plan = row["plan"]
    if "collectives" not in plan:
        return ""
    ran, planned = ({(each["kind"], each["axes"]): each for each in of["collectives"]} for of in (row, plan))
    none = {"count": 0.0, "bytes": 0.0}
    differences = []
    for key in dict.fromkeys([*planned, *ran]):
        was, now = planned.get(key, none), ran.get(key, none)
        if any(abs(was[name] - now[name]) > SAME * max(was[name], now[name]) for name in none):
            one, other = (f"{each['count']:.6g} of {_size(each['bytes'])}" for each in (now, was))
            differences.append(f"{' '.join(key)}: {one} ran, {other} were planned")
    if "arguments" in plan and plan["arguments"] != row["arguments"]:
        differences.append(
            f"state and batch have {_size(row['arguments'])} a device, planned were {_size(plan['arguments'])}"
        )
    return "; ".join(differences)


def verdict(row: Row, differs: str) -> str:
    """Say in a line how a point is against its plan, and what the trace could not tell."""
    plan = row["plan"]
    if "step_seconds" in plan:
        against = _against(row, plan)
    elif plan.get("failure"):
        against = f"no plan: {plan['failure']}"
    else:
        against = "" if differs else "counts and bytes as planned"
    return "; ".join(filter(None, (against, differs, row["untold"])))


def _against(row: Row, plan: Mapping[str, Any]) -> str:
    step, planned = row["seconds"]["median"], plan["step_seconds"]
    gap = step / planned - 1
    if abs(gap) <= NEAR:
        return f"{gap:+.0%} to the plan"
    parts, expected = row["step"], plan["seconds"]
    pairs = {
        "work on devices": (parts["work"], expected["compute"] + expected["memory"]),
        "collectives beside which nothing runs": (parts["alone"], expected["waiting for links"]),
        "devices that wait for the host": (parts["idle"], expected["launches"]),
    }
    gaps = {name: (now - was) * (1 if gap > 0 else -1) for name, (now, was) in pairs.items()}
    most = max(gaps, key=lambda name: gaps[name])
    if gaps[most] <= 0:
        return f"{gap:+.0%} to the plan, and no part of the trace is"
    now, was = pairs[most]
    return f"{gap:+.0%} to the plan, most by {most}: {_ms(now)}, planned {_ms(was)} ms"


def lost(first: Row, row: Row) -> str:
    """Say where the time goes by which a point is behind the first one of its curve."""
    ideal = 1.0 if row["mode"] == "weak" else first["devices"] / row["devices"]
    more = {name: row["step"][name] - ideal * first["step"][name] for name in ("work", "alone", "idle")}
    most = max(more, key=lambda name: more[name])
    behind = row["seconds"]["median"] - ideal * first["seconds"]["median"]
    along = max(row["step"]["collectives"].items(), key=lambda each: each[1], default=("", 0.0))[0]
    what = {"work": "work on devices", "alone": f"collectives, most along {along}", "idle": "waits for the host"}[most]
    return (
        f"{row['curve']}: efficiency {row['efficiency']:.2f} at {row['devices']} devices, a step takes {_ms(behind)} "
        f"ms more than ideal; {_ms(more[most])} ms more are {what}"
    )


def write(folder: Path, stem: str, title: str, rows: Sequence[Row], override: str, *, draw: bool = False) -> Path:
    """Write the record of these points, and their picture if asked to."""
    rows, cpu = judged(rows), rows[0]["platform"] == "cpu"
    whole = [row for row in rows if not row["failure"]]
    unit = whole[0]["unit"] if whole else "tokens"
    columns = {
        "curve": "curve", "devices": "devices", "on": "processes, nodes", "mesh_said": "mesh", "batch_size": "batch",
        "per_second": f"{unit}/s", "step_ms": "step, ms (quartiles)", "efficiency": "efficiency",
        **({} if cpu else {"planned_ms": "planned, ms", "planned_efficiency": "planned efficiency"}),
        "sent": "collectives a device and step", "time_ms": "ms in them",
        "memory_said": "peak of a device", "planned_memory": "planned peak", "said": "against the plan",
    }  # fmt: skip
    if cpu:
        del columns["planned_memory"]
    shown = [{**row, **cells(row)} for row in rows]
    return record.write(
        stem,
        title,
        shown,
        out=folder,
        notes=notes(rows, whole, cpu, override),
        columns=columns,
        plot=(plot_bytes if cpu else plot_speed) if draw and whole else None,
    )


def cells(row: Row) -> dict[str, Any]:
    """Return what is shown of a row beside its numbers."""
    found: dict[str, Any] = {
        "on": f"{row['processes']}, {row['nodes']}",
        "mesh_said": " ".join(f"{axis}={size}" for axis, size in row["mesh"].items()) or "1",
    }
    if row["failure"]:
        return found
    low, median, high = (_ms(row["seconds"][name]) for name in ("low", "median", "high"))
    plan, memory = row["plan"], row["memory"]
    sent = [f"{each['count']:.4g} {each['kind']} {each['axes']}, {_size(each['bytes'])}" for each in row["collectives"]]
    spent: dict[str, float] = {}
    for each in plan.get("collectives", ()):
        if "seconds" in each:
            spent[each["axes"]] = spent.get(each["axes"], 0.0) + each["seconds"]
    times = [
        f"{axes} {_ms(took)}" + (f" (planned {_ms(spent[axes])})" if axes in spent else "")
        for axes, took in row["step"]["collectives"].items()
    ]
    return found | {
        "step_ms": f"{median} ({low} to {high})",
        "planned_ms": _ms(plan["step_seconds"]) if "step_seconds" in plan else None,
        "sent": "; ".join(sent) or None,
        "time_ms": "; ".join(times) or None,
        "memory_said": _size(memory["peak"]) + (" (compiler)" if memory["by"] == "compiler" else ""),
        "planned_memory": _size(plan["memory"]) if "memory" in plan else None,
    }


def notes(rows: Sequence[Row], whole: Sequence[Row], cpu: bool, override: str) -> list[str]:
    """Return what there is to know of a record, and what it comes to."""
    found = [f"the config with {override}"] if override else []
    found += [
        f"{len(whole)} of {len(rows)} points ran; efficiency is the throughput of a device against that at the "
        "smallest point of the curve; quartiles are over the steps that were timed",
        "collectives are those that the profiler's trace shows, by the mesh axes of their groups of devices, with the "
        "bytes of their whole results; seconds in them are means over devices, and include waits for other devices",
    ]
    if cpu:
        right = sum(not row["difference"] for row in whole)
        return [
            "devices of a CPU are virtual and share its cores: SECONDS, THROUGHPUT AND EFFICIENCY MEAN NOTHING HERE",
            "what counts: collectives by kind, axis, count and bytes, and bytes of state and batch, were as planned "
            f"at {right} of {len(whole)} points",
            *found,
        ]
    found.append(
        "a device's peak is the allocator's, or, where an earlier point of the process had more, the compiler's; "
        "the plan is that of `jaxmodels plan` for the same devices"
    )
    curves = ([*own] for _, own in itertools.groupby(whole, key=lambda row: row["curve"]))
    return found + [lost(own[0], own[-1]) for own in curves if len(own) > 1]


def plot_speed(figure: Any, rows: Sequence[Row]) -> None:
    """Draw throughput and efficiency over devices, measured and planned."""
    speed, share = figure.subplots(1, 2)
    for color, own in _curves(rows):
        devices, mark = [row["devices"] for row in own], "o-" if own[0]["mode"] == "weak" else "s-"
        rates = [row["per_second"] for row in own]
        spread = [
            [rate - row["units"] / row["seconds"]["high"] for rate, row in zip(rates, own, strict=True)],
            [row["units"] / row["seconds"]["low"] - rate for rate, row in zip(rates, own, strict=True)],
        ]
        speed.errorbar(devices, rates, spread, fmt=mark, color=color, capsize=3, label=own[0]["curve"])
        share.plot(devices, [row["efficiency"] for row in own], mark, color=color, label=own[0]["curve"])
        plans = [row for row in own if row["planned_efficiency"] is not None]
        if plans:
            at = [row["devices"] for row in plans]
            speed.plot(at, [row["plan"]["per_second"] for row in plans], "--", color=color)
            share.plot(at, [row["planned_efficiency"] for row in plans], "--", color=color)
        ideal = [rates[0] * count / devices[0] for count in devices]
        speed.plot(devices, ideal, ":", color="0.6")
    speed.set_yscale("log")
    speed.set_ylabel(f"{_whole(rows)[0]['unit']}/s")
    speed.set_title("dashed: as planned; dotted: ideal", fontsize=10)
    share.set_ylabel("efficiency")
    share.set_ylim(bottom=0)
    _finish(rows, speed, share)


def plot_bytes(figure: Any, rows: Sequence[Row]) -> None:
    """Draw what a device sends in a step and what it holds over devices, as it ran and as planned."""
    sent, held = figure.subplots(1, 2)
    for color, own in _curves(rows):
        devices, weak = [row["devices"] for row in own], own[0]["mode"] == "weak"
        mark, size = ("o", 7) if weak else ("s", 12)  # where both are the same, both are seen
        for axes, name in ((sent, "collectives"), (held, "arguments")):
            ran, planned = ([_mib(of[name]) for of in each] for each in (own, [row["plan"] for row in own]))
            axes.plot(devices, planned, "-" if weak else "--", color=color)
            axes.plot(devices, ran, mark, color=color, label=own[0]["curve"], fillstyle="none", markersize=size)
    sent.set_ylabel("MiB in collectives, a device and step")
    held.set_ylabel("MiB of state and batch, a device")
    held.set_ylim(bottom=0)
    held.set_title("marks: as it ran; lines: as planned", fontsize=10)
    _finish(rows, sent, held)


def _curves(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """The points of each curve that ran, with a color for its axes."""
    whole = _whole(rows)
    grown = list(dict.fromkeys(tuple(row["axes"]) for row in whole))
    return [
        (f"C{grown.index(tuple(own[0]['axes']))}", own)
        for own in ([row for row in whole if row["curve"] == name] for name in dict.fromkeys(r["curve"] for r in whole))
    ]


def _whole(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if not row["failure"]]


def _finish(rows: Sequence[Row], *plots: Any) -> None:
    from matplotlib.ticker import NullLocator

    counts = sorted({row["devices"] for row in _whole(rows)})
    for axes in plots:
        axes.set_xscale("log", base=2)
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("devices")
    plots[0].legend(fontsize=9)


def _mib(found: Any) -> float:
    total = sum(each["bytes"] for each in found) if isinstance(found, list) else found
    return total / _MIB


def _size(count: float) -> str:
    for unit, name in ((_GIB, "GiB"), (_MIB, "MiB")):
        if count >= unit / 10:
            return f"{count / unit:.4g} {name}"
    return f"{count / 1024:.4g} KiB"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.3g}" if abs(seconds) < 1 else f"{1e3 * seconds:,.0f}"
