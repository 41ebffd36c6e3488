"""A job is a config assembled on a mesh: what training runs, what a plan compiles and what a benchmark times."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.interpreters import partial_eval
from jax.sharding import Mesh

from jaxmodels import data, tasks
from jaxmodels.compress.adapters import Adaptation
from jaxmodels.compress.distillation import Teaching
from jaxmodels.config import Config
from jaxmodels.data.contract import check_batch, check_lengths
from jaxmodels.errors import UserError
from jaxmodels.models.coded import is_coded
from jaxmodels.parallel import mesh as meshes
from jaxmodels.parallel import rules
from jaxmodels.registry import outside
from jaxmodels.tasks.flops import Step as FLOPs
from jaxmodels.tasks.flops import per_step
from jaxmodels.tasks.task import Task
from jaxmodels.train import adapters, evaluate, loop, teachers
from jaxmodels.train import state as states
from jaxmodels.train.state import Optimizers, State
from jaxmodels.train.step import Step, advance, build_step, lower


@dataclass(frozen=True)
class Job:
    """Everything that a training step is made of. Nothing in it has been compiled or computed yet."""

    config: Config
    mesh: Mesh
    task: Task
    optimizers: Optimizers
    layout: State
    """The training state, as `jax.ShapeDtypeStruct`s with shardings."""
    batch: dict[str, jax.ShapeDtypeStruct]
    """A training batch, as `jax.ShapeDtypeStruct`s with shardings."""
    sources: Mapping[data.Split, data.Source] = field(default_factory=dict)
    """The examples of each split. Empty in a job that was assembled from shapes alone."""
    accumulate: int = 1
    """Microbatches of a step: `train.accumulate`, or more on fewer processes than planned (`on_fewer`)."""
    adapter: Adaptation | None = None
    """What is trained beside frozen parameters; None: all parameters are trained."""
    teaching: Teaching | None = None
    """The teacher whose outputs are learned; None: there is none."""

    def lower(self, platforms: tuple[str, ...] | None = None) -> Any:
        """Lower the training step to what XLA compiles, for `platforms` if they are not those of this machine."""
        return lower(*self._parts, **self._options, platforms=platforms)

    def step(self) -> Step:
        """Build the training step, which compiles in the background."""
        return build_step(*self._parts, **self._options, strategy=self.config.train.strategy)

    @property
    def _parts(self) -> tuple[Any, ...]:
        return self.task, self.optimizers, self.mesh, self.layout, self.batch

    @property
    def _options(self) -> dict[str, Any]:
        train = self.config.train
        return {
            "accumulate": self.accumulate,
            "ema": train.ema,
            "offload": self.config.optim.offload,
            "xla": train.xla,
        }

    def init(self, key: jax.Array) -> State:
        """Initialize the state before the first step at random."""
        averages = self.config.train.ema is not None
        return states.init(self.task, self.optimizers, key, averages, self.adapter, self.teaching)

    def loader(self, split: data.Split) -> data.Loader:
        """Build the loader of a split's batches, placed on the mesh."""
        cfg, source = self.config, self.sources[split]
        size = cfg.data.batch_size if split == "train" else cfg.eval.batch_size or cfg.data.batch_size
        shardings = self.task.shardings(self.mesh, data.spec(source, size))
        return data.Loader(source, data.Order(len(source), size, cfg.train.seed), shardings, prefetch=cfg.data.prefetch)

    def check_metric(self) -> None:
        """Refuse an `eval.metric` that evaluations do not report, and metrics from outside that are no sums."""
        cfg, source, batch = self.config, self.sources["eval"], self.loader("eval").abstract
        own = outside(cfg.task)
        evaluate.check_metric(
            cfg.eval, self.task, self.mesh, batch, classes=source.class_names, groups=source.groups, outside=own
        )

    def check_outside(self) -> None:
        """Trace a step of what comes from outside, so that what does not fit is refused before anything is written."""
        cfg = self.config
        if any(map(outside, (cfg.model, cfg.task, cfg.optim, cfg.optim.schedule))):
            step = functools.partial(advance, self.task, self.optimizers, accumulate=self.accumulate, ema=cfg.train.ema)
            with jax.set_mesh(self.mesh):
                jax.eval_shape(step, self.layout, self.batch)

    def evaluation(self, stop: Callable[[], bool] = lambda: False) -> evaluate.Evaluate:
        """Build the function that evaluates the task on the mesh, with the data's names of classes and groups."""
        source = self.sources["eval"]
        named: dict[str, Any] = {"classes": source.class_names, "groups": source.groups, "source": source}
        return evaluate.build_evaluate(self.task, self.mesh, stop, **named)

    def flops(self) -> FLOPs:
        """Count the model FLOPs of a step."""
        # counted as of arrays: what a product costs does not depend on how its parameter is held
        adapter = self.adapter and dataclasses.replace(self.adapter, coding=None)
        cfg, taught = self.config, None if self.teaching is None else self.teaching.plain().taught
        return per_step(cfg.task, cfg.model, cfg.data, adapter, taught)

    def parameters(self) -> int:
        """Count the parameters of all networks, with those of an adapter and without a teacher's."""
        return sum(leaf.size for leaf in jax.tree.leaves((self.layout.frozen, self.layout.params), is_leaf=is_coded))

    def trained(self) -> int:
        """Count the parameters that are trained."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.layout.params))

    @property
    def units(self) -> int:
        """Tokens or examples in a step, whichever its throughput is counted in."""
        return self.task.units(self.config.data.batch_size)


def assemble(cfg: Config, devices: Sequence[Any] | None = None, *, opened: bool = True) -> Job:
    """Assemble the job of a config on these devices, or on all of them by default.

    A run opens its data. With `opened=False` the batch's shapes come from the task, so that a plan needs no data;
    everything else is the same.

    Raises:
        UserError: mesh, batch, model, task and data do not fit together. Nothing has been compiled by then.
    """
    devices = jax.devices() if devices is None else devices
    cfg = adapters.resolved(cfg)
    sizes = meshes.sizes(cfg.mesh, len(devices))
    check_options(cfg)
    task, teaching = tasks.build(cfg.task, cfg.model, cfg.data, cfg.train, cfg.eval.metrics), teachers.teaching(cfg)
    task = task if teaching is None else teaching.taught(task)
    check_batch_size(sizes, cfg.data.batch_size, cfg.train.accumulate, cfg.train.strategy, updates=task.updates)
    if cfg.eval.batch_size:
        check_batch_size(sizes, cfg.eval.batch_size, 1, cfg.train.strategy, "eval.batch_size")
    check_lengths(task.fields, sizes)
    shapes = task.stored_spec(cfg.data.batch_size, cfg.data.real)
    sources: dict[data.Split, data.Source] = {}
    if opened:
        sources = {split: data.open_for(cfg, split, task.fields) for split in ("train", "eval")}
        shapes = data.spec(sources["train"], cfg.data.batch_size)
        check_batch(task.fields, shapes)
        if teaching is not None:
            teachers.check_data(cfg, sources["train"])
    mesh = meshes.make_mesh(cfg.mesh, devices)
    optimizers, layout, adapter = states.compose(cfg, task, mesh, teaching)
    placed = task.shardings(mesh, shapes)
    batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed[name]) for name, x in shapes.items()}
    return Job(cfg, mesh, task, optimizers, layout, batch, sources, cfg.train.accumulate, adapter, teaching)


def on_fewer(job: Job, processes: int, planned: int) -> Job:
    """Return a job, planned for more processes, with enough microbatches that no device has more rows at a time.

    The batch of a step stays the same. So does the job where microbatches would change what a step computes: a device
    then has more rows at a time.
    """
    if processes >= planned or not additive(job):
        return job
    least = -(-job.accumulate * planned // processes)
    rows, sizes, updates = job.config.data.batch_size, dict(job.mesh.shape), job.task.updates
    fits = (n for n in range(least, rows + 1) if rows % smallest_batch(sizes, n, updates) == 0)
    return dataclasses.replace(job, accumulate=next(fits, job.accumulate))


def additive(job: Job) -> bool:
    """Whether microbatches give the gradient of the whole batch: nothing is random, and no example depends on others.

    Examples depend on others by batch statistics, by a loss that compares them, and by a model's auxiliary losses, such
    as the one that balances its experts.
    """
    compares = any(loss.compares for loss in job.task.losses)
    auxiliary = any(network.auxiliary for network in job.task.networks.values())
    if compares or auxiliary or jax.tree.leaves(job.layout.stats):
        return False
    key = jax.eval_shape(jax.random.key, 0)

    def random(loss: tasks.Loss) -> bool:
        def value(key: jax.Array, params: Any, batch: Any) -> Any:
            return loss.fn(params, job.layout.stats, batch, key, 0)

        traced: Any = jax.make_jaxpr(value)(key, job.layout.whole, job.batch)
        jaxpr = getattr(traced, "jaxpr", traced)
        return partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[1][0]

    with jax.set_mesh(job.mesh):
        return not any(map(random, job.task.losses))


def check_options(cfg: Config) -> None:
    """Refuse options that exclude each other, and options that have no effect because another one is missing.

    Raises:
        UserError: the config has such options.
    """
    train, evaluation = cfg.train, cfg.eval
    if train.strategy == "pmap" and (cfg.optim.offload or train.xla):
        name = "optim.offload" if cfg.optim.offload else "train.xla"
        raise UserError(f"got {name} with train.strategy pmap, expected jit, try --train.strategy jit")
    if cfg.compress is not None:
        cfg.compress.check(cfg.adapter is not None, train.ema)
    loop.profile_steps(cfg.profile.steps, train.steps)
    often = max(1, train.steps // 10)
    idle = {
        "train.quantize_axes": (
            train.quantize == "none" and train.quantize_axes != type(train)().quantize_axes,
            "train.quantize none, expected products to quantize, try --train.quantize int8",
        ),
        "eval.early_stop": (
            evaluation.early_stop is not None and not evaluation.every,
            f"eval.every 0, expected evaluations before the last step, try --eval.every {often}",
        ),
        "checkpoint.best": (
            cfg.checkpoint.best and not evaluation.every,
            f"eval.every 0, expected several evaluations to choose from, try --eval.every {often}",
        ),
        "data.eval_split": (
            getattr(cfg.data, "eval_split", None) == getattr(cfg.data, "train_split", ""),
            "the same data.train_split, expected examples that are not trained on, try --data.eval-split validation",
        ),
        "init.fresh": (
            bool(cfg.init.fresh) and cfg.init.source is None,
            "no init.source, expected one for the parameters that are not fresh, try --init.source DIR",
        ),
        f"distill.{next(iter(cfg.distill.inner), 'hidden')}": (
            bool(cfg.distill.inner) and cfg.mesh.stage > 1,
            f"mesh.stage {cfg.mesh.stage}, expected whole stacks, of whose blocks the teacher's are learned, "
            "try --mesh.stage 1",
        ),
        "init.blocks": (
            bool(cfg.init.blocks) and (cfg.init.source is None or cfg.adapter is not None or cfg.mesh.stage > 1),
            "no init.source, an adapter or stages, expected a source of which all is trained, try it without",
        ),
        "mesh.sequence": (
            cfg.mesh.sequence and cfg.mesh.tensor == 1,
            "mesh.tensor 1, expected tokens to be split over more than one device, try --mesh.tensor 2",
        ),
    }
    for name, (useless, why) in idle.items():
        if useless:
            section, _, last = name.partition(".")
            raise UserError(f"got {name} {getattr(getattr(cfg, section), last)} with {why}")


def smallest_batch(mesh_sizes: Mapping[str, int], accumulate: int, updates: int = 1) -> int:
    """Return what a batch size must be a multiple of."""
    microbatches = rules.Stages.of(mesh_sizes).microbatches
    return rules.shards(mesh_sizes, _batch_axes(mesh_sizes)) * accumulate * updates * max(1, microbatches)


def _batch_axes(mesh_sizes: Mapping[str, int]) -> tuple[str, ...]:
    staged = rules.Stages.of(mesh_sizes).microbatches
    return (rules.RULES if staged else rules.rules_of(mesh_sizes))["batch"]


def check_batch_size(
    mesh_sizes: Mapping[str, int],
    batch_size: int,
    accumulate: int,
    strategy: str,
    field: str = "data.batch_size",
    updates: int = 1,
) -> None:
    """Refuse a batch size that does not divide evenly; `updates` is how many updates of a step share the batch."""
    microbatches, axes = rules.Stages.of(mesh_sizes).microbatches, _batch_axes(mesh_sizes)
    rows, least = rules.shards(mesh_sizes, axes), smallest_batch(mesh_sizes, accumulate, updates)
    if batch_size % least:
        better = max(1, round(batch_size / least)) * least
        parts = {"train.accumulate": accumulate, "updates of one network": updates, "mesh.microbatches": microbatches}
        shares = "".join(f", {name} = {n}" for name, n in parts.items() if n > 1 or name == "train.accumulate")
        raise UserError(
            f"got {field} {batch_size}, expected a multiple of {least} (mesh {'*'.join(axes)} = {rows}{shares}), "
            f"try --{field.replace('_', '-')} {better}"
        )
    if strategy == "pmap" and any(size > 1 for axis, size in mesh_sizes.items() if axis != rules.AXES[0]):
        raise UserError(
            f"got train.strategy pmap with mesh {dict(mesh_sizes)}, expected data only, try --train.strategy jit"
        )
    if strategy == "pmap" and jax.process_count() > 1:
        raise UserError(
            f"got train.strategy pmap on {jax.process_count()} processes, expected one process, "
            "try --train.strategy jit"
        )
