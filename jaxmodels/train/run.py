"""One run: from a config to its final state and a run directory."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxmodels
from jaxmodels import config as configs
from jaxmodels.config import Config
from jaxmodels.errors import UserError
from jaxmodels.hf import beside
from jaxmodels.parallel import distributed, hardware, progress
from jaxmodels.train import bases, beginning, directory, loggers, loop, saved, teachers
from jaxmodels.train.checkpoint import Checkpointer, CheckpointError
from jaxmodels.train.display import Display
from jaxmodels.train.job import Job, assemble, on_fewer
from jaxmodels.train.manifest import atomic_write
from jaxmodels.train.metrics import Clock, Record
from jaxmodels.train.phases import Phases
from jaxmodels.train.state import State
from jaxmodels.train.step import Step

log = logging.getLogger("jaxmodels")

Watch = Callable[[int, dict[str, float]], bool]
"""`watch(step, metrics)` is called with the metrics of each evaluation, such as eval/loss; True ends the run."""


def train(
    cfg: Config,
    run: Path,
    resume: directory.Resume = "auto",
    origin: Mapping[str, Any] | None = None,
    watch: Watch | None = None,
    phases: Phases | None = None,
) -> tuple[Job, loop.Result]:
    """Train as configured, leaving config, metrics, checkpoints and log in `run`; resume the run that is there.

    A run that `watch` ends saves its state, as on SIGTERM. `phases` is a clock that the caller has already started.

    Raises:
        UserError: the config does not fit the hardware, the data, or the run in the directory; or another process
            writes there.
        NotFinite: a loss was not finite.
        CheckpointError: the last checkpoint could not be written.
    """
    if phases is None:
        with Phases(tell=progress.phase).watched() as own:
            return train(cfg, run, resume, origin, watch, own)
    main = distributed.is_main()
    if main:
        directory.check_writable(run)
    chosen = loggers.find_loggers(cfg.metrics)
    job = on_fewer(assemble(cfg), jax.process_count(), distributed.planned())
    cfg = job.config
    job.check_outside()
    job.check_metric()
    checkpointer = Checkpointer(run / "checkpoints", keep=cfg.checkpoint.keep)
    with contextlib.ExitStack() as stack:
        if main:
            came_from = {**(origin or {}), "versions": versions(), "commit": commit(), **launched()}
            stack.enter_context(directory.prepared(cfg, run, resume, came_from))
            progress.run(run)
            phases.record(run, **place(job))
        distributed.barrier("run directory")
        display = stack.enter_context(Display(cfg.metrics.progress if main else "none", cfg.train.steps, job.task.unit))
        stack.enter_context(directory.logging_to(run / "log.txt" if main else None, display))
        # a second SIGTERM must not interrupt the save that the first one asked for
        preemption = stack.enter_context(distributed.Preemption())
        # after an error too, so that a save finishes
        stack.callback(lambda: waited(checkpointer, phases))
        describe(job, run)
        step = job.step()  # compiles in the background while the state is made or read
        start, lines, names = begin(job, run, resume, checkpointer, phases)
        report = loggers.Report(None, display)
        if main:
            saved.keep_facts(run, job.sources["train"], job.sources["eval"])
            if cfg.init.source is not None and not start.step:
                beside.carry(Path(cfg.init.source), run, cfg.init.fresh)
            report = loggers.Report(Record(run, start.step, lines), display, loggers.opened(chosen))
        stack.callback(report.close)  # after an error too: its last line explains the error
        report.start(run, cfg, start.step)
        result = loop.run(cfg, start, hooks(job, step, run, report, checkpointer, preemption, phases, watch, names))
    phases.ended = result.ended
    return job, result


def waited(checkpointer: Checkpointer, phases: Phases) -> None:
    """Wait until the current save has finished."""
    with phases.during("save"):
        try:
            checkpointer.wait()
        finally:
            phases.saved = newest(checkpointer, phases.step)


def newest(checkpointer: Checkpointer, step: int) -> int | None:
    """Return the step of the newest complete checkpoint up to `step`; the run skipped newer ones as damaged."""
    return max((saved for saved in checkpointer.steps() if saved <= step), default=None)


def place(job: Job) -> dict[str, Any]:
    """Describe where an attempt runs, with a hash of the config's fields that decide what is computed."""
    fields = {
        name: value
        for name, value in configs.flatten(job.config).items()
        if not name.startswith((*directory.NEUTRAL, "train.accumulate"))
    }
    mesh = " ".join(f"{axis}={size}" for axis, size in job.mesh.shape.items() if size > 1)
    return {
        "processes": jax.process_count(),
        "devices": jax.device_count(),
        "mesh": mesh,
        "config": hashlib.sha256(json.dumps(fields, default=str, sort_keys=True).encode()).hexdigest()[:12],
    }


def hooks(
    job: Job,
    step: Step,
    run: Path,
    report: loggers.Report,
    checkpointer: Checkpointer,
    preemption: distributed.Preemption,
    phases: Phases,
    watch: Watch | None,
    names: Mapping[str, bases.Base] | None = None,
) -> loop.Hooks:
    """Connect the loop to the job's data and evaluation, and to the run's checkpoints."""
    cfg, task, enough = job.config, job.task, []
    train, held_out = job.loader("train"), job.loader("eval")
    measure = job.evaluation(stop=lambda: preemption.requested(-1))
    schedule: Any = cfg.optim.rate(cfg.train.steps)

    def evaluate(state: State) -> dict[str, float] | None:
        now = int(state.step)
        if task.samples is not None and report.record is not None and jax.process_count() == 1:
            images = task.samples(state.averaged, state.stats)
            images = np.asarray(jax.numpy.round(255 * images)).astype(np.uint8)
            keep_samples(run, now, images)
            report.images(now, "samples", images)
        found = measure(state.averaged, state.stats, held_out.once(cfg.eval.batches))
        if found is not None and watch is not None:
            enough.append(watch(now, {f"eval/{name}": value for name, value in found.items()}))
        return found

    def save(now: int, state: State, progress: loop.Progress, best: bool) -> None:
        meta = {
            "progress": dataclasses.asdict(progress),
            "data": job.sources["train"].fingerprint,
            "lines": report.record.count if report.record is not None else None,
            "config": configs.to_json(cfg),
            "versions": versions(),
            "metric": {cfg.eval.metric: progress.best} if best else None,
        }
        meta |= {what: dataclasses.asdict(named) for what, named in (names or {}).items()}
        checkpointer.save(now, state.saved, meta, best=best)
        phases.saved = newest(checkpointer, now)

    def last_good(step: int) -> int | None:
        with contextlib.suppress(CheckpointError):  # already in the log
            checkpointer.wait()
        return newest(checkpointer, step - 1)

    return loop.Hooks(
        step=step,
        batches=train.iterate,
        evaluate=evaluate,
        save=save,
        stop=lambda now: preemption.requested(now) or any(enough),
        examples=train.order.indices,
        last_good=last_good,
        learning_rate=lambda now: float(schedule(now)),
        report=report,
        clock=Clock(job.units, task.unit, *speed(job)),
        traces=run / "profile",
        phases=phases,
        needs=task.needs,
    )


def begin(
    job: Job, run: Path, resume: directory.Resume, checkpointer: Checkpointer, phases: Phases
) -> tuple[loop.Start, int | None, dict[str, bases.Base]]:
    """Return where the run begins (at its newest checkpoint, if it has one), how many metrics lines precede that, and
    the names of what checkpoints do not hold: the base of an adapter, and a teacher.

    Raises:
        UserError: the checkpoint does not belong to this training.
    """
    cfg, names = job.config, {}
    with phases.during("restore"):
        restored = None if resume == "never" else checkpointer.restore(job.layout.saved)
    if restored is None:
        state = beginning.initial(job)
        checkpointer.warm()
        if job.adapter is not None:
            names["base"] = bases.Base.of(cfg, state.frozen)
            if not names["base"].source:
                bases.keep(run, state.frozen)
        if job.teaching is not None:
            names["teacher"] = teachers.named(cfg, state.teacher)
        return loop.Start(state), None, names
    state, meta, start = restored
    phases.saved = start
    try:
        progress = loop.Progress(**meta["progress"])
    except (KeyError, TypeError):
        raise UserError(
            f"got a checkpoint in {run} without the progress of a training, expected one that train has saved, "
            f"try another --run-dir with --init.source {run}"
        ) from None
    fingerprint = job.sources["train"].fingerprint
    if meta.get("data") != fingerprint and resume != "must":
        raise UserError(
            f"got data with fingerprint {fingerprint}, expected that of the run in {run}, {meta.get('data')}, "
            "try --resume must to continue with other data"
        )
    if resume != "must":
        check_classes(run, job.sources["train"].class_names)
    if start > cfg.train.steps:
        raise UserError(
            f"got train.steps {cfg.train.steps} for {run}, which is at step {start}, expected at least {start}, "
            f"try --train.steps {2 * start}"
        )
    if job.teaching is not None:
        state = beginning.with_teacher(job, state)
        names["teacher"] = teachers.named(cfg, state.teacher)
    teachers.check(names.get("teacher"), meta, run)
    if job.adapter is not None:
        base = bases.Base.read(meta, run)
        state = dataclasses.replace(state, frozen=bases.frozen(run, cfg, base, job.layout.frozen))
        if base.source and cfg.init.source is not None:
            base = dataclasses.replace(base, source=str(Path(cfg.init.source).absolute()))
        names["base"] = base
    log.info("resumed at step %d of %d from %s", start, cfg.train.steps, run)
    if start == progress.evaluated and (start == cfg.train.steps or loop.exhausted(cfg, progress)):
        log.info(
            "nothing is left to do: this run has reached its last step; another --run-dir starts another run, "
            "--resume never starts this one anew"
        )
    return loop.Start(state, start, progress), meta.get("lines"), names


def check_classes(run: Path, names: Sequence[str]) -> None:
    """Refuse classes in another order, or of other names, than those that the run was trained on.

    Raises:
        UserError: a label would mean something else.
    """
    before, now = saved.read_kept(run).classes, tuple(map(str, names))
    if before and now != before:
        pairs = itertools.zip_longest(before, now)
        place, (was, given) = next((at, pair) for at, pair in enumerate(pairs) if pair[0] != pair[1])
        raise UserError(
            f"got data whose class {place} is {given!r}, expected {was!r} as in the run in {run}, whose labels would "
            "mean something else, try another --run-dir, or --resume must to continue with the change"
        )


def keep_samples(run: Path, now: int, images: np.ndarray) -> None:
    """Save what a generative model generates at a step, as `samples/<step>.npy` of uint8 (N, H, W, C)."""
    path = run / "samples" / f"{now:08d}.npy"
    try:
        path.parent.mkdir(exist_ok=True)
        with atomic_write(path) as part, part.open("wb") as file:
            np.save(file, images)
    except OSError as error:  # a run does not fail because of its pictures
        log.error("samples NOT written to %s: %s", path, error.strerror)


def speed(job: Job) -> tuple[float | None, float | None]:
    """Return the model FLOPs of a step and the peak FLOP/s of all devices, each None if it is unknown."""
    peak = hardware.peak(jax.devices()[0], getattr(job.config.model, "dtype", "float32"))
    return (None, None) if peak is None else (job.flops().model, peak * jax.device_count())


def describe(job: Job, run: Path) -> None:
    """Log what is about to run."""
    sizes = " ".join(f"{axis}={size}" for axis, size in job.mesh.shape.items() if size > 1)
    log.info(
        "%s, %s parameters, on %d %s device(s) %s",
        type(job.config.model).__name__.removesuffix("Config"),
        f"{job.parameters():,}",
        jax.device_count(),
        jax.devices()[0].device_kind,
        sizes,
    )
    if job.adapter is not None:
        log.info("%s", adapted(job))
    if (planned := distributed.planned()) > (here := jax.process_count()):
        how = f"{job.accumulate} microbatches" if job.accumulate > job.config.train.accumulate else "more rows a device"
        log.info("on %d of %d processes: %s keep the batch at %d", here, planned, how, job.config.data.batch_size)
    log.info("train: %s", job.sources["train"].describe())
    log.info("eval:  %s", job.sources["eval"].describe())
    log.info("run:   %s", run)


def adapted(job: Job) -> str:
    """Say what an adapter trains, and what memory that takes on all devices together, to the byte."""
    layout, whole = job.layout, job.parameters()
    trained, held = job.trained(), [sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)) for tree in (
        layout.frozen, layout.params, layout.opt_state)]  # fmt: skip
    factors = sum(bool(each.rank) for each in job.adapter.chosen.values()) if job.adapter else 0
    return (
        f"adapter {configs.kind_name(job.config.adapter)} on {factors} parameters: {trained:,} of {whole:,} trained "
        f"({trained / whole:.2%}); bytes: base {held[0]:,}, trained {held[1]:,}, optimizer {held[2]:,}"
    )


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide what is computed."""
    found = {"python": platform.python_version(), "jaxmodels": jaxmodels.__version__}
    for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def commit() -> str | None:
    """Return the commit of the working directory, with + if it has changes; None outside git."""
    try:
        here = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=5,
            cwd=Path(__file__).parent,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return here.stdout.strip() or None


def launched() -> dict[str, Any]:
    """Return the job of `jaxmodels launch` that this run is part of: name, revision, and uncommitted changes."""
    written = os.environ.get("JAXMODELS_JOB")
    try:
        return {"job": json.loads(written)} if written else {}
    except ValueError as error:
        raise UserError(
            f"got JAXMODELS_JOB={written[:60]!r}, expected JSON as jaxmodels launch sets it, try unset JAXMODELS_JOB"  # type: ignore[index]
        ) from error


def compilation_cache() -> None:
    """Keep compiled programs between runs, unless the user has chosen a cache already (JAX_COMPILATION_CACHE_DIR)."""
    if not jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(Path(base) / "jaxmodels" / "xla"))
