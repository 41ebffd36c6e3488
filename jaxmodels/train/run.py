"""One run, from a config to its final state and a run directory."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import platform
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

import jaxmodels
from jaxmodels import config as configs
from jaxmodels import data, tasks
from jaxmodels.config import Config
from jaxmodels.data.contract import check_batch, check_lengths
from jaxmodels.errors import UserError
from jaxmodels.hf import beside
from jaxmodels.parallel import distributed, hardware, mesh
from jaxmodels.tasks import flops
from jaxmodels.tasks.task import Task
from jaxmodels.train import beginning, directory, evaluate, loop, optim, saved, step
from jaxmodels.train import state as states
from jaxmodels.train.checkpoint import Checkpointer, CheckpointError
from jaxmodels.train.manifest import whole
from jaxmodels.train.metrics import Clock, Display, Writer
from jaxmodels.train.state import State

log = logging.getLogger("jaxmodels")


@dataclass(frozen=True)
class Experiment:
    """A config made real on this hardware; built before anything is compiled."""

    cfg: Config
    mesh: Mesh
    task: Task
    optimizers: states.Optimizers
    layout: State
    train_data: data.Source
    eval_data: data.Source

    def loader(self, split: Literal["train", "eval"]) -> data.Loader:
        """Batches of a split, placed on the mesh."""
        source = self.train_data if split == "train" else self.eval_data
        size = self.cfg.data.batch_size if split == "train" else self.cfg.eval.batch_size or self.cfg.data.batch_size
        shardings = self.task.shardings(self.mesh, data.spec(source, size))
        order = data.Order(len(source), size, self.cfg.train.seed)
        return data.Loader(source, order, shardings, prefetch=self.cfg.data.prefetch)

    def check_metric(self) -> None:
        """Refuse an `eval.metric` that evaluations will not give."""
        source, batch = self.eval_data, self.loader("eval").abstract
        evaluate.check(self.cfg.eval, self.task, self.mesh, batch, classes=source.class_names, groups=source.groups)

    def measure(self, stop: Callable[[], bool] = lambda: False) -> evaluate.Evaluate:
        """What evaluates this experiment's task, with the data's names for classes and groups."""
        source = self.eval_data
        return evaluate.build(self.task, self.mesh, stop, classes=source.class_names, groups=source.groups)


def setup(cfg: Config) -> Experiment:
    """Everything that can be refused, refused before anything is compiled.

    Raises:
        UserError: mesh, batch, model, task and data do not fit together.
    """
    sizes = mesh.sizes(cfg.mesh, jax.device_count())
    task = tasks.build(cfg.task, cfg.model, cfg.data, cfg.train)
    step.check(sizes, cfg.data.batch_size, cfg.train.accumulate, cfg.train.strategy, updates=task.updates)
    if cfg.optim.offload and cfg.train.strategy == "pmap":
        raise UserError("got optim.offload with train.strategy pmap, expected jit, try --train.strategy jit")
    if cfg.train.xla and cfg.train.strategy == "pmap":
        raise UserError("got train.xla with train.strategy pmap, expected jit, try --train.strategy jit")
    if cfg.eval.batch_size:
        step.check(sizes, cfg.eval.batch_size, 1, cfg.train.strategy, "eval.batch_size")
    loop.profile_steps(cfg.profile.steps, cfg.train.steps)
    check_lengths(task.fields, sizes)
    train_data, eval_data = data.open_for(cfg, "train"), data.open_for(cfg, "eval")
    check_batch(task.fields, data.spec(train_data, cfg.data.batch_size))
    where = mesh.make_mesh(cfg.mesh)
    optimizers, layout = states.compose(cfg, task, where)
    return Experiment(cfg, where, task, optimizers, layout, train_data, eval_data)


def train(
    cfg: Config,
    run: Path,
    resume: directory.Resume = "auto",
    origin: Mapping[str, Any] | None = None,
    watch: Callable[[int, dict[str, float]], bool] | None = None,
) -> tuple[Experiment, loop.Result]:
    """Train as configured, leaving config, metrics, checkpoints and log in `run`; resumes what is there.

    `watch(step, metrics)` is shown each evaluation, with names such as eval/loss; it may end the run by True, as if it
    had been told to stop.

    Raises:
        UserError: the config does not fit the hardware, the data, or the run that is in the directory; another process
            writes there.
        NotFinite: a loss stopped being a number.
        CheckpointError: the last checkpoint could not be written.
    """
    main = distributed.is_main()
    if main:
        directory.check(run)
    experiment = setup(cfg)
    experiment.check_metric()
    checkpointer = Checkpointer(run / "checkpoints", keep=cfg.checkpoint.keep)
    with contextlib.ExitStack() as stack:
        if main:
            came_from = {**(origin or {}), "versions": versions(), "commit": commit()}
            stack.enter_context(directory.prepared(cfg, run, resume, came_from))
        distributed.barrier("run directory")
        display = stack.enter_context(
            Display(cfg.metrics.progress if main else "none", cfg.train.steps, experiment.task.unit)
        )
        stack.enter_context(directory.logging_to(run / "log.txt" if main else None, display))
        # a second SIGTERM must not end what the first one made us save
        preemption = stack.enter_context(distributed.Preemption())
        stack.callback(checkpointer.wait)  # also after an error: what is being saved is saved
        describe(experiment, run)
        take = compiled(experiment)  # in the background, while the state is made or read
        restored = None if resume == "never" else checkpointer.restore(experiment.layout)
        lines = None
        if restored is None:
            state, start, progress = (
                beginning.initial(cfg, experiment.task, experiment.optimizers, experiment.layout),
                0,
                loop.Progress(),
            )
            checkpointer.warm()
        else:
            state, meta, start = restored
            try:
                progress, lines = loop.Progress(**meta["progress"]), meta.get("lines")
            except (KeyError, TypeError):
                raise UserError(
                    f"got a checkpoint in {run} without the progress of a training, expected one that train has saved, "
                    f"try another --run-dir with --init.source {run}"
                ) from None
            if meta.get("data") != experiment.train_data.fingerprint and resume != "must":
                raise UserError(
                    f"got data with fingerprint {experiment.train_data.fingerprint}, expected that of the "
                    f"run in {run}, {meta.get('data')}, try --resume must to go on with other data"
                )
            if start > cfg.train.steps:
                raise UserError(
                    f"got train.steps {cfg.train.steps} for {run}, which is at step {start}, expected at "
                    f"least {start}, try --train.steps {2 * start}"
                )
            log.info("resumed at step %d of %d from %s", start, cfg.train.steps, run)
            if start == progress.evaluated and (start == cfg.train.steps or loop.exhausted(cfg, progress)):
                log.info(
                    "nothing is left to do: this run ended there; another --run-dir starts another, "
                    "--resume never starts this one anew"
                )
        if main:
            saved.keep(run, experiment.train_data, experiment.eval_data)
            if cfg.init.source is not None and restored is None:
                beside.carry(Path(cfg.init.source), run, cfg.init.fresh)
        writer = Writer(run, cfg.metrics, start, lines) if main else None
        if writer is not None:
            stack.callback(writer.close)  # also after an error: its last line explains it
        result = run_loop(
            experiment, take, state, start, progress, checkpointer, preemption, writer, display, run, watch
        )
    return experiment, result


def compiled(experiment: Experiment) -> step.Step:
    """The experiment's training step."""
    cfg, loader = experiment.cfg, experiment.loader("train")
    return step.build(
        experiment.task,
        experiment.optimizers,
        experiment.mesh,
        experiment.layout,
        loader.abstract(),
        strategy=cfg.train.strategy,
        accumulate=cfg.train.accumulate,
        offload=cfg.optim.offload,
        ema=cfg.train.ema,
        xla=cfg.train.xla,
    )


def run_loop(
    experiment: Experiment,
    take: step.Step,
    state: State,
    start: int,
    progress: loop.Progress,
    checkpointer: Checkpointer,
    preemption: distributed.Preemption,
    writer: Writer | None,
    display: Display,
    run: Path,
    watch: Callable[[int, dict[str, float]], bool] | None,
) -> loop.Result:
    """The loop with its hooks joined to data, evaluation and checkpoints."""
    cfg, task = experiment.cfg, experiment.task
    loaders = {"train": experiment.loader("train"), "eval": experiment.loader("eval")}
    measure = experiment.measure(stop=lambda: preemption.requested(-1))

    def save(now: int, state: State, progress: loop.Progress, best: bool) -> None:
        meta = {
            "progress": dataclasses.asdict(progress),
            "data": experiment.train_data.fingerprint,
            "lines": writer.count if writer is not None else None,
            "config": configs.to_json(cfg),
            "versions": versions(),
            "metric": {cfg.eval.metric: progress.best} if best else None,
        }
        checkpointer.save(now, state, meta, best=best)

    def last_good(step: int) -> int | None:
        with contextlib.suppress(CheckpointError):  # said already, by the log
            checkpointer.wait()
        # newer ones are damaged: the run went on from before them
        return max((saved for saved in checkpointer.steps() if saved < step), default=None)

    def look(state: State) -> dict[str, float] | None:
        if task.samples is not None and writer is not None and jax.process_count() == 1:
            keep_samples(run, int(state.step), task.samples(averaged(state), state.stats))
        found = measure(averaged(state), state.stats, loaders["eval"].once(cfg.eval.batches))
        if found is not None and watch is not None:
            enough.append(watch(int(state.step), {f"eval/{name}": value for name, value in found.items()}))
        return found

    enough: list[bool] = []
    hooks = loop.Hooks(
        batches=loaders["train"].iterate,
        evaluate=look,
        save=save,
        stop=lambda now: preemption.requested(now) or any(enough),
        examples=loaders["train"].order.indices,
        last_good=last_good,
        needs=task.needs,
    )
    clock = Clock(task.units(cfg.data.batch_size), task.unit, *speed(experiment))
    schedule: Any = optim.schedule(cfg.optim, cfg.train.steps)
    return loop.run(
        cfg, take, state, start, progress, hooks, writer, display, clock, lambda now: float(schedule(now)), run
    )


def keep_samples(run: Path, now: int, images: jax.Array) -> None:
    """What a generative model makes after so many steps, as `samples/<step>.npy` of bytes (N, H, W, C)."""
    path = run / "samples" / f"{now:08d}.npy"
    try:
        path.parent.mkdir(exist_ok=True)
        with whole(path) as part, part.open("wb") as file:
            np.save(file, np.asarray(jax.numpy.round(255 * images)).astype(np.uint8))
    except OSError as error:  # the run is worth more than its pictures
        log.error("samples NOT written to %s: %s", path, error.strerror)


def averaged(state: State) -> Any:
    """The parameters to evaluate: the moving average where there is one."""
    return state.params if state.ema is None else state.ema


def speed(experiment: Experiment) -> tuple[float | None, float | None]:
    """Model FLOPs a step and peak FLOP/s of all devices; None where the hardware is not known."""
    cfg = experiment.cfg
    peak = hardware.peak(jax.devices()[0], getattr(cfg.model, "dtype", "float32"))
    if peak is None:
        return None, None
    return flops.per_step(cfg.task, cfg.model, cfg.data).model, peak * jax.device_count()


def describe(experiment: Experiment, run: Path) -> None:
    """Say what is about to run."""
    count = sum(model.count() for model in experiment.task.networks.values())
    sizes = " ".join(f"{axis}={size}" for axis, size in experiment.mesh.shape.items() if size > 1)
    kind = jax.devices()[0].device_kind
    log.info(
        "%s, %s parameters, on %d %s device(s) %s",
        type(experiment.cfg.model).__name__.removesuffix("Config"),
        f"{count:,}",
        jax.device_count(),
        kind,
        sizes,
    )
    log.info("train: %s", experiment.train_data.describe())
    log.info("eval:  %s", experiment.eval_data.describe())
    log.info("run:   %s", run)


@functools.cache
def versions() -> dict[str, str]:
    """Versions of what computes."""
    found = {"python": platform.python_version(), "jaxmodels": jaxmodels.__version__}
    for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def commit() -> str | None:
    """The commit of the working directory, with + if it has changes; None outside git."""
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


def compilation_cache() -> None:
    """Keep compiled programs between runs, unless the user has chosen a place (JAX_COMPILATION_CACHE_DIR) already."""
    if not jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(Path(base) / "jaxmodels" / "xla"))
