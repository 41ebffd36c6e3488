"""The loop. Its order is an invariant: evaluate if due, save if due, take the batch, dispatch the step, read the
metrics of the step before (so that the device is never idle), check for preemption.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jaxmodels.config import Config
from jaxmodels.errors import UserError
from jaxmodels.parallel.progress import waited as tell_waited
from jaxmodels.tasks.task import Batch
from jaxmodels.train.loggers import Report
from jaxmodels.train.metrics import Clock
from jaxmodels.train.phases import Phases, Starved
from jaxmodels.train.state import State
from jaxmodels.train.step import Step, measured

log = logging.getLogger("jaxmodels")

EMPTY = 100
"""A run ends after this many consecutive batches with nothing to train on, which cannot be chance."""


class NotFinite(RuntimeError):
    """The loss, or another metric of a step, is not finite."""


@dataclass
class Progress:
    """What the loop must remember across a restart besides the state; saved in each checkpoint."""

    best: float | None = None
    """Best value of `eval.metric` so far."""
    best_step: int | None = None
    waited: int = 0
    """Evaluations since the best one."""
    evaluated: int = -1
    """Step of the last evaluation."""


@dataclass(frozen=True)
class Start:
    """Where the loop begins: at the initial state or at a checkpoint's."""

    state: State
    step: int = 0
    """Steps already taken."""
    progress: Progress = field(default_factory=Progress)


@dataclass(frozen=True)
class Hooks:
    """The functions and objects that the loop calls."""

    step: Step
    batches: Callable[[int, int], Generator[Batch, None, None]]
    """Batches of the steps from start to stop."""
    evaluate: Callable[[State], dict[str, float] | None]
    """Metrics of the held-out set; None if told to stop meanwhile."""
    save: Callable[[int, State, Progress, bool], None]
    """Save the state after this many steps; True if it is the best so far."""
    stop: Callable[[int], bool]
    """Whether to save and end after this many steps."""
    examples: Callable[[int], np.ndarray]
    """Ids of the examples in the batch of a step."""
    last_good: Callable[[int], int | None]
    """Step of the newest complete checkpoint before a step."""
    learning_rate: Callable[[int], float]
    """Learning rate of a step, counted from 0."""
    report: Report
    clock: Clock
    traces: Path
    """Directory for profiles."""
    phases: Phases = field(default_factory=Phases)
    """Records what the loop is doing, to account for wall time."""
    needs: str = "an example"
    """What a batch must contain for anything in it to count."""


@dataclass(frozen=True)
class Result:
    """How the loop ended."""

    state: State
    step: int
    ended: Literal["done", "preempted", "early"]
    metrics: dict[str, float]
    """The metrics of the last evaluation."""
    progress: Progress


def run(cfg: Config, start: Start, hooks: Hooks) -> Result:
    """Train from `start` to the config's last step, or until told to stop.

    Raises:
        NotFinite: a step's loss, or another of its metrics, is not finite. The message names the step, its examples and
            the last good checkpoint.
        UserError: too many consecutive batches had nothing to train on.
    """
    steps, evaluated = cfg.train.steps, {}
    state, progress, report, clock = start.state, start.progress, hooks.report, hooks.clock
    phases, starved = hooks.phases, Starved()
    empty, trained = 0, False
    unsaved = tracing = False
    first, last = profile_steps(cfg.profile.steps, steps)
    pending: tuple[int, Any, float] | None = None

    def read() -> None:
        """Wait for the pending step and read its metrics."""
        nonlocal pending, empty, trained
        if pending is None:
            return
        done, values, waited = pending
        pending = None
        began = time.perf_counter()
        values, nothing = measured({name: float(value) for name, value in jax.device_get(values).items()})
        tell_waited(device=time.perf_counter() - began)
        empty, trained = empty + 1 if nothing else 0, trained or not nothing
        if empty >= EMPTY or (nothing and done == steps and not trained):
            raise UserError(
                f"got nothing to train on in {empty} consecutive batches, expected {hooks.needs} in each, "
                "try jaxmodels data inspect to see them"
            )
        if empty == 1:
            log.warning("nothing to train on in the batch of step %d: its loss is left out, its gradient is 0", done)
        clock.tick(waited)
        phases.done(done)
        losses = [name for name in values if name.endswith("loss")]
        if wrong := [name for name in [*losses, *values] if not math.isfinite(values[name])]:
            ids = hooks.examples(done - 1)
            shown = ", ".join(map(str, ids[:16])) + (", …" if len(ids) > 16 else "")
            good = hooks.last_good(done)
            raise NotFinite(
                f"got {wrong[0]} {values[wrong[0]]} at step {done}, on examples {shown}; last good checkpoint: "
                f"{'none' if good is None else f'step {good}'}; try a lower --optim.peak-lr or "
                "--optim.clip-norm 1.0"
            )
        if not nothing:
            report.display.progress(done, values[losses[0]] if losses else 0.0, clock.rate)
        if done % cfg.metrics.every == 0 or done == steps:
            row = {f"train/{name}": value for name, value in values.items()}
            row |= {"train/learning_rate": hooks.learning_rate(done - 1), **clock.read()}
            report.scalars(done, row)

    def save(best: bool = False) -> None:
        nonlocal unsaved
        read()
        with phases.during("save"):
            report.flush()
            phases.keep()
            hooks.save(now, state, progress, best)
        unsaved = False
        clock.pause()

    def evaluate() -> dict[str, float] | None:
        """Evaluate. If that fails, save what was trained before the error goes on."""
        try:
            return hooks.evaluate(state)
        except Exception:
            # of several processes perhaps one alone failed, and a save would wait for the others
            if unsaved and trained and jax.process_count() == 1:
                try:
                    save()
                    log.error("the evaluation failed; step %d is saved, and the same command evaluates it again", now)
                except Exception as error:  # the first error explains more
                    log.error("the evaluation failed, and step %d could NOT be saved: %s", now, error)
            raise

    batches = hooks.batches(start.step, steps)
    now, ended = start.step, "done"
    phases.begin(start.step)
    try:
        while True:
            due = now == steps or (cfg.eval.every and now % cfg.eval.every == 0 and now > 0)
            if due and progress.evaluated < now:
                read()
                with phases.during("evaluation"):
                    found = evaluate()
                clock.pause()
                if found is None:
                    ended = "preempted"
                    break
                evaluated, unsaved = {f"eval/{name}": value for name, value in found.items()}, True
                report.scalars(now, evaluated)
                better = record_evaluation(cfg, progress, now, evaluated)
                if better and cfg.checkpoint.best and now < steps:
                    save(best=True)
            if exhausted(cfg, progress):
                ended = "early"
            if now == steps or ended == "early":
                break
            if cfg.checkpoint.every and now % cfg.checkpoint.every == 0 and unsaved:
                save()
            if now == first:
                read()
                jax.profiler.start_trace(str(hooks.traces))
                tracing = True
            since = time.perf_counter()
            with phases.during("data"):
                batch = next(batches)
            waited = time.perf_counter() - since
            idle = starved.wait(since, pending and pending[1])
            phases.move(waited - idle, "data", "step")
            began = time.perf_counter()
            with phases.during("compile") if now == start.step else contextlib.nullcontext():
                state, metrics = hooks.step(state, batch)
            # what is computed in the thread that hands it over is the devices' time too
            tell_waited(device=time.perf_counter() - began + waited - idle, data=idle)
            starved.dispatched(metrics)
            now, unsaved = now + 1, True
            read()
            pending = (now, metrics, waited)
            if now == last and tracing:  # false in a run that resumed between the two
                read()
                jax.profiler.stop_trace()
                tracing = False
                log.info("profile of steps %d to %d: %s", first, last, hooks.traces)
            if hooks.stop(now):
                ended = "preempted"
                break
        read()
        if unsaved:
            save(best=cfg.checkpoint.best and progress.best_step == now)
    finally:
        if tracing:
            jax.profiler.stop_trace()
        batches.close()
        starved.close()
        phases.enter("idle")
    return Result(state, now, ended, evaluated, progress)  # type: ignore[arg-type]


def exhausted(cfg: Config, progress: Progress) -> bool:
    """Whether `eval.early_stop` evaluations have passed without a better one."""
    return cfg.eval.early_stop is not None and progress.waited >= cfg.eval.early_stop


def record_evaluation(cfg: Config, progress: Progress, now: int, values: dict[str, float]) -> bool:
    """Record an evaluation and return whether it is the best so far; one that is not finite never is."""
    progress.evaluated = now
    # a metric without anything to average is absent, and where the loss is not finite no other metric means anything
    value, best = values.get(cfg.eval.metric, math.nan), progress.best
    known = math.isfinite(value) and math.isfinite(values.get("eval/loss", value))
    better = known and (best is None or (value < best if cfg.eval.lowest else value > best))
    if better:
        progress.best, progress.best_step, progress.waited = value, now, 0
    else:
        progress.waited += 1
    return better


def profile_steps(text: str, steps: int) -> tuple[int, int]:
    """Parse FIRST:LAST; (-1, -1) if empty.

    Raises:
        UserError: the text is not of that form, or reaches beyond the run.
    """
    if not text:
        return -1, -1
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and int(first) < int(last) <= steps):
        raise UserError(
            f"got profile.steps {text!r}, expected FIRST:LAST within {steps} steps, try --profile.steps 10:15"
        )
    return int(first), int(last)
