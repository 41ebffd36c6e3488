"""`jaxmodels plan --search`: the fastest way to run an experiment on given hardware, and the one of least memory.

Arithmetic ranks the candidates and rules most of them out; the compiler judges the rest. Compiled steps are cached
(`compile.compiled`), so a search that was interrupted continues where it stopped.
"""

from __future__ import annotations

import dataclasses
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
from jaxmodels.plan.figures import figures
from jaxmodels.plan.topology import Topology

RIDGE = 0.3
"""Weight of the ridge penalty on corrections; one compiled candidate is enough to outweigh it."""
LANES = 128
"""A matrix unit works on tiles whose last dimension is a multiple of this."""
GAIN = 0.995
"""A padded vocabulary is suggested if the step takes at most this share of the time."""
_GIB = 2**30


@dataclass(frozen=True)
class Tried:
    """A candidate and its compiled plan."""

    candidate: Candidate
    plan: dict[str, Any] | None
    """The plan of `figures`; None if the candidate did not compile."""
    failure: str = ""
    seconds: float = 0.0
    """Seconds that compiling took on this machine."""

    @property
    def fits(self) -> bool:
        return self.plan is not None and self.plan["fits"] and "step_seconds" in self.plan

    @property
    def cached(self) -> bool:
        """Whether the compiled step came from the cache."""
        return self.plan is not None and self.seconds < self.plan["compile_seconds"]

    @property
    def cost(self) -> tuple[float, float]:
        """Seconds of a step and bytes of a device."""
        assert self.plan is not None
        return self.plan["step_seconds"], self.plan["memory"]["peak"]


@dataclass
class Found:
    """The result of a search."""

    topology: Topology
    drawn: Drawn
    tried: list[Tried] = field(default_factory=list)
    beaten: int = 0
    """Number of candidates that were skipped because what was compiled showed that they could not win."""
    padded: Tried | None = None
    """The winner with a padded vocabulary, where that was tried."""
    seconds: float = 0.0

    @property
    def frontier(self) -> list[Tried]:
        """Candidates that fit and that no other beats in both time and memory; the fastest comes first."""
        front: list[Tried] = []
        for each in sorted((each for each in self.tried if each.fits), key=lambda each: each.cost):
            if not front or each.cost[1] < front[-1].cost[1]:
                front.append(each)
        return front

    @property
    def winner(self) -> Tried:
        """The fastest candidate that fits.

        Raises:
            UserError: no candidate fits.
        """
        if front := self.frontier:
            return front[0]
        plans = [each.plan for each in self.tried if each.plan is not None]
        if sizes := [plan["memory"]["peak"] for plan in plans if plan["fits_host"]]:
            needed = f"the least needs {min(sizes) / _GIB:.1f} of {self.topology.hardware.memory / _GIB:.1f} GiB"
        elif plans:
            needed = plans[0]["shortage"]
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
    """Compile `number` candidates, the most promising first, and report each one.

    The config as it is and the meshes that an expert would try come first, so the winner is at least as good as they.
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
    if found.frontier and (wider := padded(found.winner.candidate)) is not None:
        found.padded = attempt(wider, topology)
    found.seconds = time.monotonic() - begun
    return found


def padded(candidate: Candidate) -> Candidate | None:
    """The candidate with its vocabulary rounded up to whole tiles on each device; None if they are whole already."""
    model = candidate.cfg.model
    if not hasattr(model, "vocab_size"):
        return None
    tile = LANES * candidate.mesh.tensor
    wider = dataclasses.replace(model, vocab_size=math.ceil(model.vocab_size / tile) * tile)
    return (
        None if wider == model else dataclasses.replace(candidate, cfg=dataclasses.replace(candidate.cfg, model=wider))
    )


def attempt(candidate: Candidate, topology: Topology) -> Tried:
    """Compile a candidate; if that fails, the reason is kept and the search goes on."""
    begun = time.monotonic()
    try:
        plan, failure = figures(candidate.cfg, compiling.compiled(candidate.cfg, topology)), ""
    except (UserError, RuntimeError) as error:
        plan, failure = None, " ".join(str(error).split())[-300:]
    return Tried(candidate, plan, failure, time.monotonic() - begun)


class Queue:
    """Orders candidates for compiling, and learns from those that were compiled.

    The configured candidate, the usual meshes and the candidate that needs least memory come first. After them comes
    whichever should be fastest, and every fifth time the one with the smallest product of time and memory. Guesses are
    corrected by a ridge regression: the logarithm of compiled over guessed, as a function of the candidates' traits.
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
        """Remove and return the next candidate."""
        if self.first:
            return self.first.pop(0)
        expected = self.guesses + self.traits @ self.corrections(tried)
        seconds, peak = expected[:, 0], expected[:, 1]
        score = seconds + (peak if len(tried) % 5 == 4 else 0) + 100 * (peak > np.log(1.05 * self.memory))
        best = int(np.argmin(score))
        self.guesses, self.traits = np.delete(self.guesses, best, 0), np.delete(self.traits, best, 0)
        return self.rest.pop(best)

    def corrections(self, tried: Sequence[Tried]) -> np.ndarray:
        """Fit what each trait adds to the logarithms of seconds and of bytes, (traits, 2)."""
        compiled = [(each.candidate, each.fits, each.plan) for each in tried if each.plan is not None]
        known = {
            # XLA rematerializes more in a step that does not fit, so its time says nothing about others
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
    """Features of a candidate for the regression."""
    cfg = candidate.cfg
    found = {"all": 1.0, "accumulate": math.log2(cfg.train.accumulate)}
    for name, value in configs.flatten(candidate.mesh).items():
        if value > 1 or value is True:
            found |= {f"{name} at all": 1.0, name: math.log2(value)}
    for name in KNOBS:
        found[f"{name} {getattr(cfg.model, name, '')}"] = 1.0
    return found


def hopeless(candidate: Candidate, tried: Sequence[Tried]) -> bool:
    """Whether compiled candidates show that this one cannot win.

    Either its products or collectives alone take longer than the fastest step, or a candidate with the same mesh and
    fewer activations did not fit on its devices.
    """
    best = min((each.cost[0] for each in tried if each.fits), default=None)
    if best is not None and candidate.guess.least >= best:
        return True
    return any(
        each.plan is not None
        and not each.plan["fits"]
        and each.plan["fits_host"]
        and each.candidate.mesh == candidate.mesh
        and getattr(each.candidate.cfg.model, "attention", "") == getattr(candidate.cfg.model, "attention", "")
        and each.candidate.guess.activations <= candidate.guess.activations
        and each.candidate.cfg.train.accumulate >= candidate.cfg.train.accumulate
        for each in tried
    )


def summary(found: Found, number: int) -> str:
    """A few lines on how many candidates there are and why some were ruled out."""
    drawn = found.drawn
    lines = [f"{found.topology.name}: {drawn.number:,} ways to run it on {found.topology.devices} devices"]
    lines += [f"  {count:>6,} out: {reason}" for reason, count in drawn.dropped.most_common()]
    lines += [f"         (so {mesh or 'the config as it is'}: {reason})" for mesh, reason in drawn.refused.items()]
    lines.append(f"  {len(drawn.kept):>6,} left, of which {number} are compiled, the most promising first")
    return "\n".join(lines)


def progress(found: Found, number: int, cfg: Config, workers: int) -> str:
    """One line on the candidate that has just been compiled."""
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
    """A candidate as command-line options of `train`."""
    return " ".join(arguments(overrides(cfg, each.candidate.cfg))) or "as configured"


def report(found: Found, cfg: Config) -> str:
    """The frontier as a table, and how the winner compares with the config as it is and with the usual meshes."""
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
    if found.padded is not None and found.padded.fits and found.padded.cost[0] <= GAIN * winner.cost[0]:
        size, wider = cfg.model.vocab_size, found.padded.candidate.cfg.model.vocab_size
        lines.append(
            f"with --model.vocab-size {wider} in place of {size} the step takes "
            f"{found.padded.cost[0] / winner.cost[0]:.3f} of that; no token has the other {wider - size} ids, but the "
            "model is another one, so it is only a suggestion"
        )
    return "\n".join(lines)


def written(found: Found, cfg: Config) -> dict[str, Any]:
    """The result of a search as JSON values."""

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
        "padded": found.padded and one(found.padded),
    }
