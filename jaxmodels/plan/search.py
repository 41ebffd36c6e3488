"""`jaxmodels plan --search`: the fastest way to run an experiment on given hardware, and the one of least memory.

Arithmetic orders the ways there are and rules most of them out; the compiler judges the rest. What was compiled is kept
(`compile.compiled`), so a search that was stopped goes on where it was.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxmodels import config as configs
from jaxmodels.config import Config
from jaxmodels.errors import UserError
from jaxmodels.plan import compile as compiling
from jaxmodels.plan.arithmetic import KNOBS, Arithmetic
from jaxmodels.plan.candidates import Candidate, Drawn, arguments, draw, overrides
from jaxmodels.plan.topology import Topology

RIDGE = 0.3
"""How much of a correction is doubted: about as much as one compiled candidate outweighs."""
_GIB = 2**30


@dataclass(frozen=True)
class Tried:
    """A candidate, and what the compiler made of it."""

    candidate: Candidate
    plan: dict[str, Any] | None
    """As `command.plan` makes it; None where it could not be compiled."""
    failure: str = ""
    seconds: float = 0.0
    """What it took here."""

    @property
    def fits(self) -> bool:
        return self.plan is not None and self.plan["fits"] and "step_seconds" in self.plan

    @property
    def cached(self) -> bool:
        """Whether it was compiled before."""
        return self.plan is not None and self.seconds < self.plan["compile_seconds"]

    @property
    def cost(self) -> tuple[float, float]:
        """Seconds of a step, and bytes of a device."""
        assert self.plan is not None
        return self.plan["step_seconds"], self.plan["memory"]["peak"]


@dataclass
class Found:
    """What a search came to."""

    topology: Topology
    drawn: Drawn
    tried: list[Tried] = field(default_factory=list)
    beaten: int = 0
    """Candidates not compiled since by arithmetic they could not be the fastest, or not fit where less did not."""
    seconds: float = 0.0

    @property
    def frontier(self) -> list[Tried]:
        """Those that fit and of which no other is both faster and smaller; the fastest first."""
        front: list[Tried] = []
        for each in sorted((each for each in self.tried if each.fits), key=lambda each: each.cost):
            if not front or each.cost[1] < front[-1].cost[1]:
                front.append(each)
        return front

    @property
    def winner(self) -> Tried:
        """The fastest that fits.

        Raises:
            UserError: none does.
        """
        if front := self.frontier:
            return front[0]
        sizes = [each.plan["memory"]["peak"] for each in self.tried if each.plan is not None]
        if sizes:
            needed = f"the least needs {min(sizes) / _GIB:.1f} of {self.topology.hardware.memory / _GIB:.1f} GiB"
        elif self.tried:
            needed = self.tried[0].failure
        else:
            needed = ", ".join(f"{count} ways: {reason}" for reason, count in self.drawn.dropped.most_common())
        raise UserError(
            f"got {self.topology.name}, expected devices on which a step runs ({needed}), "
            "try more or fewer of them, or another --data.batch-size"
        )


def search(
    cfg: Config, topology: Topology, number: int = 40, workers: int = 0, say: Callable[[str], None] = print
) -> Found:
    """Compile so many candidates, those that promise most first, and tell of each.

    What is configured and the meshes that an expert would try come first, so the winner is not worse than they.
    """
    begun = time.monotonic()
    found = Found(topology, draw(Arithmetic(cfg, topology)))
    queue = Queue(found.drawn.kept, topology.hardware.memory)
    number = min(number, len(queue))
    say(summary(found, number))
    workers = workers or max(1, (os.cpu_count() or 1) // 2)
    pool, running = ThreadPoolExecutor(workers), {}
    try:
        while queue or running:
            while queue and len(running) < workers and len(found.tried) + len(running) < number:
                candidate = queue.take(found.tried)
                if not candidate.origin and hopeless(candidate, found.tried):
                    found.beaten += 1
                else:
                    running[pool.submit(attempt, candidate, topology)] = candidate
            if not running:
                break
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for each in done:
                del running[each]
                found.tried.append(each.result())
                say(progress(found, number, cfg, workers))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    found.seconds = time.monotonic() - begun
    return found


def attempt(candidate: Candidate, topology: Topology) -> Tried:
    """A candidate compiled; a failure of its own is noted, and ends nothing."""
    from jaxmodels.plan import command

    begun = time.monotonic()
    try:
        plan, failure = command.plan(candidate.cfg, compiling.compiled(candidate.cfg, topology)), ""
    except (UserError, RuntimeError) as error:
        plan, failure = None, " ".join(str(error).split())[-300:]
    return Tried(candidate, plan, failure, time.monotonic() - begun)


class Queue:
    """Candidates in the order in which they are compiled, which follows what the compiler has made of others.

    First what is configured and what is usual, and the one that needs least memory; then those that should be fastest,
    and each fifth time the one that should be smallest for its time. A guess is corrected by what compiled steps took
    against theirs: a ridge regression of the ratio's logarithm on what candidates have in common.
    """

    def __init__(self, kept: Sequence[Candidate], memory: float) -> None:
        self.first = [each for each in kept if each.origin]
        self.rest = [each for each in kept if not each.origin]
        self.memory = memory
        if self.rest:
            least = min(self.rest, key=lambda each: each.guess.peak)
            self.first.append(least)
            self.rest.remove(least)
        names = sorted({name for each in kept for name in traits(each)})
        self.names = {name: i for i, name in enumerate(names)}
        self.guesses = np.log([[each.guess.seconds, each.guess.peak] for each in self.rest]).reshape(-1, 2)
        self.traits = np.stack([self.vector(each) for each in self.rest]) if self.rest else np.zeros((0, len(names)))

    def __len__(self) -> int:
        return len(self.first) + len(self.rest)

    def vector(self, candidate: Candidate) -> np.ndarray:
        found = np.zeros(len(self.names))
        for name, value in traits(candidate).items():
            found[self.names[name]] = value
        return found

    def take(self, tried: Sequence[Tried]) -> Candidate:
        """The next one."""
        if self.first:
            return self.first.pop(0)
        expected = self.guesses + self.traits @ self.corrections(tried)
        seconds, peak = expected[:, 0], expected[:, 1]
        score = seconds + (peak if len(tried) % 5 == 4 else 0) + 100 * (peak > np.log(1.05 * self.memory))
        best = int(np.argmin(score))
        self.guesses, self.traits = np.delete(self.guesses, best, 0), np.delete(self.traits, best, 0)
        return self.rest.pop(best)

    def corrections(self, tried: Sequence[Tried]) -> np.ndarray:
        """(traits, 2): what each adds to the logarithms of seconds and bytes."""
        compiled = [(each.candidate, each.fits, each.plan) for each in tried if each.plan is not None]
        known = {
            # XLA recomputes more in a step that does not fit, so its time tells nothing
            0: [(one, plan["step_seconds"], one.guess.seconds) for one, fits, plan in compiled if fits],
            1: [(one, plan["memory"]["peak"], one.guess.peak) for one, _, plan in compiled],
        }
        found = np.zeros((len(self.names), 2))
        for column, rows in known.items():
            if rows:
                x = np.stack([self.vector(candidate) for candidate, _, _ in rows])
                y = np.log([measured / guessed for _, measured, guessed in rows])
                found[:, column] = np.linalg.solve(x.T @ x + RIDGE * np.eye(x.shape[1]), x.T @ y)
        return found


def traits(candidate: Candidate) -> dict[str, float]:
    """What candidates have in common, as numbers."""
    cfg = candidate.cfg
    found = {"all": 1.0, "accumulate": math.log2(cfg.train.accumulate)}
    for name, value in configs.flatten(candidate.mesh).items():
        if value > 1 or value is True:
            found |= {f"{name} at all": 1.0, name: math.log2(value)}
    for name in KNOBS:
        found[f"{name} {getattr(cfg.model, name, '')}"] = 1.0
    return found


def hopeless(candidate: Candidate, tried: Sequence[Tried]) -> bool:
    """Whether what was compiled shows that a candidate cannot win: its links or products alone take longer than the
    fastest, or it needs more memory than one like it that did not fit."""
    best = min((each.cost[0] for each in tried if each.fits), default=None)
    if best is not None and candidate.guess.least >= best:
        return True
    return any(
        each.plan is not None
        and not each.plan["fits"]
        and each.candidate.mesh == candidate.mesh
        and getattr(each.candidate.cfg.model, "attention", "") == getattr(candidate.cfg.model, "attention", "")
        and each.candidate.guess.activations <= candidate.guess.activations
        and each.candidate.cfg.train.accumulate >= candidate.cfg.train.accumulate
        for each in tried
    )


def summary(found: Found, number: int) -> str:
    """What there is to try, and what arithmetic leaves of it."""
    drawn = found.drawn
    lines = [f"{found.topology.name}: {drawn.number:,} ways to run it on {found.topology.devices} devices"]
    lines += [f"  {count:>6,} out: {reason}" for reason, count in drawn.dropped.most_common()]
    lines += [f"         (so {mesh or 'the config as it is'}: {reason})" for mesh, reason in drawn.refused.items()]
    lines.append(f"  {len(drawn.kept):>6,} left, of which {number} are compiled, the most promising first")
    return "\n".join(lines)


def progress(found: Found, number: int, cfg: Config, workers: int) -> str:
    """A line on the candidate that is done."""
    each, done = found.tried[-1], len(found.tried)
    fresh = [one.seconds for one in found.tried if not one.cached and one.seconds > 1]
    left = (number - done) * (sum(fresh) / len(fresh) if fresh else 0) / workers
    remaining = f", {left / 60:.0f} min left" if left >= 60 else ""
    origin = f"  ({each.candidate.origin})" if each.candidate.origin else ""
    if each.plan is None:
        outcome = f"failed: {each.failure[:120]}"
    else:
        verdict = "fits" if each.plan["fits"] else "too large"
        step = f"{each.plan['step_seconds']:.4g} s" if each.fits else ""
        took = "cached" if each.cached else f"{each.seconds:.0f} s to compile"
        outcome = f"{verdict:<9} {each.plan['memory']['peak'] / _GIB:6.1f} GiB  {step:>9}  {took}"
    return f"[{done}/{number}{remaining}] {outcome:<48} {shown(each, cfg)}{origin}"


def shown(each: Tried, cfg: Config) -> str:
    """A candidate as options of `train`."""
    return " ".join(arguments(overrides(cfg, each.candidate.cfg))) or "as configured"


def report(found: Found, cfg: Config) -> str:
    """The frontier, and how the winner compares, as text."""
    winner, front = found.winner, found.frontier
    assert winner.plan is not None
    failed = sum(each.plan is None for each in found.tried)
    large = sum(each.plan is not None and not each.fits for each in found.tried)
    lines = [
        "",
        f"{len(found.tried)} compiled in {found.seconds / 60:.1f} min ({sum(e.cached for e in found.tried)} cached): "
        f"{len(found.tried) - failed - large} fit, {large} do not, {failed} failed; "
        f"{found.beaten} more could not win by arithmetic",
        "",
        f"{'step s':>9}{winner.plan['unit'] + '/s':>14}{'MFU':>8}{'peak GiB':>10}  bound by",
    ]
    for each in front:
        plan = each.plan or {}
        lines.append(
            f"{plan['step_seconds']:>9.4g}{plan['per_second']:>14,.0f}{plan['mfu']:>8.1%}"
            f"{plan['memory']['peak'] / _GIB:>10.1f}  {plan['binds']:<9}{shown(each, cfg)}"
            + ("  (fastest)" if each is winner else "")
            + ("  (least memory)" if each is front[-1] and len(front) > 1 else "")
        )
    for origin in ("as configured", "usual"):
        some = [each for each in found.tried if each.candidate.origin == origin and each.fits]
        if some and (best := min(some, key=lambda each: each.cost)) is not winner:
            name = "the config as it is" if origin == "as configured" else f"the best usual mesh, {shown(best, cfg)}"
            lines.append(f"the fastest takes {winner.cost[0] / best.cost[0]:.3f} of the time of {name}")
    return "\n".join(lines)


def written(found: Found, cfg: Config) -> dict[str, Any]:
    """A search as JSON values."""

    def one(each: Tried) -> dict[str, Any]:
        guess = each.candidate.guess
        return {
            "overrides": overrides(cfg, each.candidate.cfg),
            "arguments": arguments(overrides(cfg, each.candidate.cfg)),
            "origin": each.candidate.origin,
            "guess": {"seconds": guess.seconds, "peak": guess.peak, "least": guess.least},
            "failure": each.failure,
            "plan": each.plan,
        }

    return {
        "on": found.topology.name,
        "ways": found.drawn.number,
        "out": dict(found.drawn.dropped),
        "left": len(found.drawn.kept),
        "beaten": found.beaten,
        "seconds": found.seconds,
        "tried": [one(each) for each in found.tried],
        "frontier": [one(each) for each in found.frontier],
        "winner": one(found.winner),
    }
