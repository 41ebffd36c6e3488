"""What failures of nodes cost a job: its expected goodput, the best interval between saves, and when it ends.

Failures come at random and independently, at a constant rate (exponential times between them), while the job runs and
while it restarts. A save stops the steps for `blocked` seconds, and what it has written can be gone back to `pending`
seconds later. After a failure everything since the newest complete save is computed again. Source: Young 1974, and Daly
2006, "A higher order estimate of the optimum checkpoint interval", whose exact model is the case without `pending`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxmodels.errors import UserError
from jaxmodels.parallel.hardware import Hardware
from jaxmodels.parallel.rules import OF_PARAMETERS

NODE_HOURS = 6300.0
"""Hours between failures of a node of 8 GPUs: 419 unexpected interruptions of 2,048 nodes in 54 days.
Source: Grattafiori et al. 2024, "The Llama 3 Herd of Models", section 3.3.4."""
SAVE_RATE = 1.0
"""GB/s that a node writes to the file system of the checkpoints."""
RESTART = 300.0
"""Seconds from a failure to the first new step."""
# Up to this share of the mean time between failures Daly's approximation is exact to seven digits.
_SHORT = 1e-6
TRIALS = 1000


@dataclass(frozen=True)
class Failures:
    """How often a job fails, and what its saves and restarts cost. Seconds."""

    mean: float
    """Mean time between failures of the job, which needs all of its nodes: that of a node, divided by their number."""
    blocked: float
    """Time for which a save stops the steps."""
    pending: float
    """Time from then until the save is complete."""
    restart: float
    """From a failure to the first new step."""

    def goodput(self, interval: float) -> float:
        """Expected share of the time that goes into steps that are kept, with saves every `interval` seconds of steps.

        After a restart n saves are complete with the probability of n intervals and `pending` without a failure, so
        the work that is kept is a geometric series; a failure takes the mean time between them and the restarts.
        """
        rate = 1 / self.mean
        lost = rate * (self.pending + self.restart)
        grown = rate * (interval + self.blocked)
        if grown > 700:
            return 0.0
        return interval * rate * math.exp(-lost) / math.expm1(grown)

    def best_interval(self) -> float:
        """The interval of the highest goodput, exactly; at least as long as a save takes, for they do not overlap."""
        from scipy.special import lambertw

        if self.blocked < _SHORT * self.mean:  # there the exact form is a difference of nearly equal numbers
            return max(self.daly(), self.pending)
        exact = self.mean * (1 + float(lambertw(-math.exp(-1 - self.blocked / self.mean)).real))
        return max(exact, self.pending)

    def young(self) -> float:
        """Young's approximation of it."""
        return math.sqrt(2 * self.blocked * self.mean)

    def daly(self) -> float:
        """Daly's higher-order approximation of it."""
        if self.blocked >= 2 * self.mean:
            return self.mean
        share = math.sqrt(self.blocked / (2 * self.mean))
        return self.young() * (1 + share / 3 + share**2 / 9) - self.blocked

    def finish(self, work: float, interval: float, trials: int = TRIALS, seed: int = 0) -> np.ndarray:
        """Simulate jobs of `work` seconds of steps; return the seconds that each takes, (trials,)."""
        rng = np.random.default_rng(seed)
        left, spent, restart = np.full(trials, work), np.zeros(trials), np.zeros(trials)
        running = np.arange(trials)
        while running.size:
            until = rng.exponential(self.mean, running.size)
            up = until - restart[running]
            saves = np.ceil(left[running] / interval)
            end = left[running] + saves * self.blocked + self.pending
            ends = up >= end
            kept = np.floor((up - self.pending) / (interval + self.blocked)).clip(0, saves - 1)
            left[running] = np.where(ends, 0.0, left[running] - kept * interval)
            spent[running] += np.where(ends, restart[running] + end, until)
            restart[running] = self.restart
            running = running[~ends]
        return spent


def forecast(
    plan: dict[str, Any],
    row: Hardware,
    nodes: int,
    steps: int,
    every: int,
    node_hours: float = NODE_HOURS,
    save_rate: float = SAVE_RATE,
    restart: float = RESTART,
) -> dict[str, Any]:
    """What failures make of a plan that has a time, as JSON values; `every`: steps between saves, 0: only the last.

    Raises:
        UserError: the job would hardly come on.
    """
    memory, mesh, step = plan["memory"], plan["mesh"], plan["step_seconds"]
    device = sum(memory[name] for name in ("parameters", "optimizer", "average", "statistics", "host"))
    # each part of the state is written once, by the first of the devices that hold it
    cut = math.prod(mesh.get(axis, 1) for axis in OF_PARAMETERS)
    local = math.ceil(plan["devices"] / nodes)
    written = device * min(local, cut)
    seconds = written / (save_rate * 1e9)
    # where the way to the host is not known, the whole save is taken to stop the steps
    blocked = min(seconds, device / row.host) if row.host else seconds
    rates = Failures(node_hours * 3600 / nodes, blocked, seconds - blocked, restart)
    work = steps * step
    best = max(1, round(rates.best_interval() / step))
    found = rates.goodput(best * step)
    if found < 0.01:
        raise UserError(
            f"got a job that fails every {rates.mean:,.0f} s on average, which would spend {1 - found:.1%} of its time "
            f"on failures, expected longer times between them, try --node-hours {node_hours * 10:g}"
        )
    ends = rates.finish(work, best * step)
    return {
        "nodes": nodes,
        "node_hours": node_hours,
        "mean_seconds": rates.mean,
        "state_bytes": device * cut,
        "save_rate": save_rate,
        "save_blocks": rates.blocked,
        "save_seconds": seconds,
        "restart_seconds": restart,
        "interval_seconds": best * step,
        "interval_steps": best,
        "young_seconds": rates.young(),
        "daly_seconds": rates.daly(),
        "exact_seconds": rates.best_interval(),
        "goodput": found,
        "now_steps": every or steps,
        "now_goodput": rates.goodput(min(every or steps, steps) * step),
        "work_seconds": work,
        "expected_seconds": work / found,
        "finish_seconds": {f"{share}%": float(np.percentile(ends, share)) for share in (5, 50, 95)},
        "trials": TRIALS,
    }


def forecast_table(found: dict[str, Any]) -> str:
    """The forecast as text."""
    finish = ", ".join(f"{share} {hours(seconds)}" for share, seconds in found["finish_seconds"].items())
    return f"""\
failures of {found["nodes"]:,} node(s), of each every {found["node_hours"]:,.0f} h, of the job every \
{hours(found["mean_seconds"])}, on average
  a save: {found["state_bytes"] / 1e9:,.4g} GB, stops the steps {found["save_blocks"]:.3g} s, is complete after \
{found["save_seconds"]:.3g} s ({found["save_rate"]:g} GB/s a node); a restart: {found["restart_seconds"]:g} s
  best interval {found["interval_seconds"]:,.4g} s: --checkpoint.every {found["interval_steps"]} (exact \
{found["exact_seconds"]:,.4g} s, Young {found["young_seconds"]:,.4g} s, Daly {found["daly_seconds"]:,.4g} s)
  goodput {found["goodput"]:.1%}; saving every {found["now_steps"]:,} steps, as it is, {found["now_goodput"]:.1%}
  end after {hours(found["expected_seconds"])} on average, {hours(found["work_seconds"])} without failures; \
of {found["trials"]:,} simulated jobs: {finish}
"""


def hours(seconds: float) -> str:
    """A time in the unit that suits it."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.3g} {unit}"
    return f"{seconds:.3g} s"
