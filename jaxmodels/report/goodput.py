"""Where the wall-clock time of a run went, over all of its attempts, from its directory alone."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxmodels.errors import UserError
from jaxmodels.launch import events
from jaxmodels.train import phases
from jaxmodels.train.checkpoint import Checkpointer

BUCKETS = {
    "productive": "steps whose result the run has kept",
    "data wait": "devices had nothing to do, for want of a batch",
    "straggler": "steps took longer, since a rank was slower than the others",
    "start": "from the start of the process to the first step, but for what follows",
    "restore": "reading a checkpoint",
    "compile": "tracing and compiling, or waiting for it",
    "evaluation": "measuring the held-out set",
    "save": "waiting for a checkpoint to be written",
    "lost work": "steps that were not saved and were computed again, or have to be",
    "restart": "from a failure to the start of the next attempt",
    "idle": "nothing ran, or nothing moved: after a stop that was asked for, in a hang, or at the end of a process",
}
"""What a run spends time on; each of its seconds is in exactly one of these."""

_ENDS = ("start", "failed", "preempted", "mistake", "done", "cancelled")
_LIVE_SECONDS = 5.0  # a record older than that is of no process that runs
_OWN = {"start": "start", "restore": "restore", "compile": "compile", "evaluation": "evaluation", "save": "save",
        "idle": "idle"}  # fmt: skip


@dataclass(frozen=True)
class Attempt:
    """One process that worked on a run. Unix seconds, and seconds by bucket."""

    began: float
    until: float
    first: int | None
    """Steps done when its loop began; None: it did not come so far."""
    step: int
    ended: str
    """done, early, preempted, failed: …, killed, or running."""
    devices: int | None
    mesh: str
    config: str | None
    saved: int | None
    points: tuple[tuple[int, float, float], ...]
    """(steps done, seconds of steps, seconds of waits for data) at each save and at the end, ascending."""
    open: float
    """Seconds of a step that was never known to be done."""
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def clean(self) -> bool:
        """Whether it ended with everything saved, or goes on."""
        return self.ended in ("done", "early", "preempted", "running")


def account(run: Path, now: float | None = None) -> dict[str, Any]:
    """Where the time went, as JSON values: `seconds` by bucket, `wall_seconds`, `goodput`, and all `attempts`.

    Where the directory's name was used for another run before, that one is left out: its attempts are counted as
    `left_out`.

    Raises:
        UserError: no run there, or one that has no record of its time.
    """
    now = time.time() if now is None else now
    rows = phases.read(run)
    if not rows:
        if not (run / "config.json").is_file():
            raise UserError(f"got run {str(run)!r}, expected a directory with config.json")
        raise UserError(
            f"got run {str(run)!r} without times in {phases.FILE}, expected one trained since they are kept, "
            "try going on with it: they are kept from there on"
        )
    every = attempts(rows, now)
    chosen = newest_run(every)
    kept = settle(chosen, newest_checkpoint(run))
    total, happened = dict.fromkeys(BUCKETS, 0.0), events.read(run)
    shown = []
    for attempt in kept:
        for bucket, seconds in held_up(happened, attempt).items():
            moved = min(seconds, attempt.seconds["productive"])
            attempt.seconds["productive"] -= moved
            attempt.seconds[bucket] += moved
    for attempt, after in itertools.zip_longest(kept, kept[1:]):
        gap = max(0.0, after.began - attempt.until) if after else 0.0
        attempt.seconds["idle" if attempt.clean or "KeyboardInterrupt" in attempt.ended else "restart"] += gap
        for name, seconds in attempt.seconds.items():
            total[name] += seconds
        row = dataclasses.asdict(attempt) | {"cause": cause(happened, attempt, after)}
        shown.append({name: value for name, value in row.items() if name not in ("points", "open")})
    wall = kept[-1].until - kept[0].began
    overlap = sum(max(0.0, a.until - b.began) for a, b in itertools.pairwise(kept))
    return {
        "run": str(run),
        "began": kept[0].began,
        "until": kept[-1].until,
        "wall_seconds": wall,
        "goodput": total["productive"] / wall if wall > 0 else 0.0,
        "steps": kept[-1].step if kept[-1].first is not None else max((a.step for a in kept), default=0),
        "seconds": total,
        "overlap_seconds": overlap,
        "attempts": shown,
        "left_out": len(every) - len(chosen),
    }


def attempts(rows: Iterable[dict[str, Any]], now: float) -> list[Attempt]:
    """The attempts of a record, in the order in which they began."""
    found: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["began"], str(row.get("host"))), []).append(row)
    every = sorted(found.values(), key=lambda lines: lines[-1]["began"])
    return [_attempt(lines, now if lines is every[-1] else math.inf) for lines in every]


def _attempt(lines: Sequence[dict[str, Any]], now: float) -> Attempt:
    last = lines[-1]
    points = [(row["step"], row["seconds"]["step"] - row["open"], row["seconds"]["data"]) for row in lines]
    ended = last.get("ended") or ("running" if abs(now - last["time"]) < _LIVE_SECONDS else "killed")
    return Attempt(
        began=last["began"],
        until=last["time"],
        first=last.get("first"),
        step=last["step"],
        ended=str(ended),
        devices=last.get("devices"),
        mesh=str(last.get("mesh") or ""),
        config=last.get("config"),
        saved=last.get("saved"),
        points=tuple(points),
        open=last["open"],
        seconds={**dict.fromkeys(BUCKETS, 0.0), **{bucket: last["seconds"][name] for name, bucket in _OWN.items()}},
    )


def newest_run(every: Sequence[Attempt]) -> list[Attempt]:
    """The attempts of the run that is in the directory now.

    One that begins at step 0 begins another run where the one before had saved a state, had come to its end, or was of
    another config; else it is the same one's, which had failed before its first checkpoint.
    """
    found: list[Attempt] = []
    early: list[Attempt] = []  # ended before their first step
    for attempt in every:
        if attempt.first is None:
            early.append(attempt)
            continue
        another = attempt.first == 0 and any(
            a.saved is not None or a.ended in ("done", "early") or a.config != attempt.config for a in found
        )
        found = [*([] if another else found), *early, attempt]
        early = []
    return [*found, *early]


def newest_checkpoint(run: Path) -> int:
    """Steps of the newest complete checkpoint; 0: there is none."""
    return max(Checkpointer(run / "checkpoints").steps(), default=0)


def settle(chosen: Sequence[Attempt], checkpoint: int) -> list[Attempt]:
    """The attempts with their steps told apart: kept, or lost because a later one had to begin before them."""
    found: list[Attempt] = []
    limit = math.inf if chosen[-1].clean else float(checkpoint)
    for attempt in reversed(chosen):
        steps, waits = attempt.points[-1][1:]
        good, awaited = kept(attempt, limit)
        lost = (steps - good) + (waits - awaited)
        if attempt.clean:
            good += attempt.open
        else:
            done = attempt.step - (attempt.first or 0)
            partly = min(attempt.open, steps / done if done > 0 else attempt.open)
            lost += partly
            attempt.seconds["idle"] += attempt.open - partly
        attempt.seconds.update({"productive": good, "data wait": awaited, "lost work": lost})
        if attempt.first is not None:
            limit = min(limit, attempt.first)
        found.append(attempt)
    return found[::-1]


def kept(attempt: Attempt, limit: float) -> tuple[float, float]:
    """Seconds of the steps up to a limit, and of their waits for data; between two saves in proportion to the steps."""
    points = [(attempt.first or 0, 0.0, 0.0), *attempt.points]
    if limit >= points[-1][0]:
        return points[-1][1:]
    if limit <= points[0][0]:
        return 0.0, 0.0
    at = bisect.bisect_right([step for step, *_ in points], limit)
    (a, steps_a, waits_a), (b, steps_b, waits_b) = points[at - 1 : at + 1]
    share = (limit - a) / (b - a)
    return steps_a + share * (steps_b - steps_a), waits_a + share * (waits_b - waits_a)


def held_up(happened: Sequence[dict[str, Any]], attempt: Attempt) -> dict[str, float]:
    """Seconds by which an attempt's steps took longer because of a single rank, as its supervisor saw it.

    A rank that waits for its data is left out if it is rank 0, whose own record has that wait already.
    """
    spans: list[tuple[dict[str, Any], float]] = []
    current, processes = None, 0
    for row in happened:
        slow = row["event"] == "slow" and isinstance(row.get("factor"), int | float) and row["factor"] > 1
        if current is not None and (slow or row["event"] in _ENDS):
            spans.append((current, row.get("until") or row.get("since") or row["time"]))
            current = None
        if row["event"] == "start":
            processes = row.get("processes", 0)
        # a single process waits for no other, and is compared with its own past
        if slow and row.get("until") is None and row.get("rank") is not None and processes > 1:
            current = row
    if current is not None:
        spans.append((current, math.inf))
    loop = [attempt.points[-1][1], *(attempt.seconds[name] for name in ("data wait", "evaluation", "save"))]
    steps = loop[0] / sum(loop) if sum(loop) > 0 else 0.0
    found = {"data wait": 0.0, "straggler": 0.0}
    for row, until in spans:
        if (row.get("kind"), row["rank"]) == ("starved", 0):
            continue
        lasted = max(0.0, min(until, attempt.until) - max(row.get("since", row["time"]), attempt.began))
        bucket = "data wait" if row.get("kind") == "starved" else "straggler"
        found[bucket] += lasted * steps * (1 - 1 / row["factor"])
    return found


def cause(happened: Sequence[dict[str, Any]], attempt: Attempt, after: Attempt | None) -> str:
    """What a supervisor reported about an attempt's failure; empty without a failure or a supervisor."""
    until = after.began if after else math.inf
    for event in happened:
        if event["event"] == "failed" and attempt.began <= event["time"] <= until:
            where = "" if event.get("rank") is None else f" (rank {event['rank']} on {event.get('host')})"
            return f"{event.get('kind', 'failed')}{where}"
    return ""


def table(found: dict[str, Any]) -> str:
    """What `account` found, as text."""
    wall, steps = found["wall_seconds"], found["steps"]
    lines = [
        f"{found['run']}: {steps:,} steps in {duration(wall)}, goodput {found['goodput']:.1%}",
        "",
        f"{'':14}{'seconds':>14}{'share':>9}",
    ]
    for name, meaning in BUCKETS.items():
        seconds = found["seconds"][name]
        lines.append(f"{name:14}{seconds:>14,.1f}{seconds / wall if wall else 0:>9.1%}   {meaning}")
    lines += [f"{'wall-clock':14}{wall:>14,.1f}", "", "attempts"]
    lines.append(f"  {'began':19}  {'lasted':>10}  {'devices':>7}  {'steps':>17}  {'lost':>9}  ended")
    for each in found["attempts"]:
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(each["began"]))
        steps = "none" if each["first"] is None else f"{each['first']:,} to {each['step']:,}"
        lost = duration(each["seconds"]["lost work"])
        mesh = f" (mesh {each['mesh']})" if each["mesh"] else ""
        lasted = duration(each["until"] - each["began"])
        devices = str(each["devices"] or "?")
        lines.append(
            f"  {began}  {lasted:>10}  {devices:>7}  {steps:>17}  {lost:>9}  {each['cause'] or each['ended']}{mesh}"
        )
    if found["left_out"]:
        lines.append(f"left out: {found['left_out']} attempt(s) of an earlier run of this name")
    if found["attempts"][0]["first"]:
        lines.append(f"the first {found['attempts'][0]['first']:,} steps were taken before times were kept")
    if found["overlap_seconds"] > 0.01 * wall:
        lines.append(f"clocks differ: attempts overlap by {found['overlap_seconds']:.1f} s, which are counted twice")
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """A time as people say it: 12.3 s, 4 min 5 s, 3 h 20 min, 2 d 3 h."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"
