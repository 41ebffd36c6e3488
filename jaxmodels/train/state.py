"""What a run carries from step to step, and where each of its arrays resides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxmodels.compress.adapters import Adaptation, adaptation
from jaxmodels.compress.coding import Coding, coding
from jaxmodels.compress.distillation import Teaching
from jaxmodels.config import Config
from jaxmodels.errors import UserError
from jaxmodels.models.adapted import join
from jaxmodels.models.model import Model
from jaxmodels.parallel import rules
from jaxmodels.tasks.task import Task
from jaxmodels.train import groups


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """Everything that changes during training."""

    step: jax.Array
    """Steps taken, int32."""
    params: dict[str, Any]
    """Parameters by network; with an adapter those that are trained."""
    stats: dict[str, Any]
    """Batch statistics by network."""
    opt_state: dict[str, Any]
    """Optimizer state by loss."""
    ema: dict[str, Any] | None
    """Moving average of the parameters, or None."""
    rng: jax.Array
    """The key from which dropout keys are derived; it never changes."""
    frozen: dict[str, Any] = field(default_factory=dict)
    """Parameters beside which an adapter is trained, by network. They never change, and are in no checkpoint."""
    teacher: dict[str, Any] = field(default_factory=dict)
    """{"teacher": {"params": …, "stats": …}} of what is distilled. It never changes, and is in no checkpoint."""

    @property
    def whole(self) -> dict[str, Any]:
        """The parameters as losses take them: frozen and trained ones, and a teacher's."""
        return {**join(self.frozen, self.params), **self.teacher}

    @property
    def averaged(self) -> dict[str, Any]:
        """The parameters to evaluate: those of their moving average, if there is one."""
        return self.whole if self.ema is None else join(self.frozen, self.ema)

    @property
    def saved(self) -> State:
        """What checkpoints hold."""
        return replace(self, frozen={}, teacher={})


HOST = "pinned_host"
"""Kind of the host memory that devices copy from and to."""
Optimizers = dict[str, optax.GradientTransformation]
"""Optimizers by the name of their loss."""


def init(
    task: Task,
    optimizers: Optimizers,
    key: jax.Array,
    ema: bool = False,
    adapter: Adaptation | None = None,
    teaching: Teaching | None = None,
) -> State:
    """Initialize the state before the first step, a teacher's parameters too."""
    init_key, rng = jax.random.split(key)
    params, frozen = task.init(init_key), {}
    if adapter is not None:
        params = params if adapter.coding is None else adapter.coding.encode(params)
        frozen, params = adapter.divide(params, jax.random.fold_in(init_key, 1))
    opt_state = {loss.name: optimizers[loss.name].init(params[loss.trains]) for loss in task.losses}
    teacher = {} if teaching is None else {"teacher": teaching.init(jax.random.fold_in(init_key, 2))}
    ema_params = params if ema else None
    return State(jnp.zeros((), jnp.int32), params, task.stats(), opt_state, ema_params, rng, frozen, teacher)


def compose(
    cfg: Config, task: Task, where: Mesh, teaching: Teaching | None = None
) -> tuple[Optimizers, State, Adaptation | None]:
    """Build a task's optimizers, the layout of the state that they and its networks need on a mesh, and its adapter.

    Raises:
        UserError: a parameter does not divide by the mesh, `optim.freeze` matches no parameter or all of them, the
            adapter does not fit the networks, or codes would be trained.
    """
    adapter = adapted(cfg, task)
    if adapter is None and coded(cfg, task.networks) is not None:
        raise UserError(
            "got a section compress and no adapter, expected one, since codes are not trained, "
            "try --adapter lora, or --compress none"
        )
    made = optimizers(cfg, task, adapter)
    return made, layout(task, made, where, cfg.train.ema is not None, cfg.optim.offload, adapter, teaching), adapter


def adapted(cfg: Config, task: Task) -> Adaptation | None:
    """Return a config's adapter of a task's networks, None if all parameters are trained.

    Raises:
        UserError: it does not fit them.
    """
    if cfg.adapter is None:
        return None
    found = adaptation(cfg.adapter, task.networks, list(dict.fromkeys(loss.trains for loss in task.losses)))
    return replace(found, coding=coded(cfg, task.networks, found))


def coded(cfg: Config, networks: Mapping[str, Model], adapter: Adaptation | None = None) -> Coding | None:
    """Return which parameters a config holds as codes, None if it holds none so: not those that an adapter trains.

    Raises:
        UserError: they do not fit the networks.
    """
    found = coding(cfg.compress, networks)
    if found is None or adapter is None:
        return found
    full = {name for name, chosen in adapter.chosen.items() if not chosen.rank}
    return replace(found, chosen={name: spec for name, spec in found.chosen.items() if name not in full})


def optimizers(cfg: Config, task: Task, adapter: Adaptation | None = None) -> Optimizers:
    """Build the optimizer of each loss of a task.

    Raises:
        UserError: `optim.freeze` matches no parameter or all of them.
    """
    axes = task.axes()  # before a mesh is set
    shapes = {name: model.shapes() for name, model in task.networks.items()}
    if adapter is not None:
        axes, shapes = adapter.axes()[1], adapter.shapes()[1]
    if cfg.optim.freeze:
        groups.check_freeze(cfg.optim.freeze, shapes)
    made = {
        loss.name: cfg.optim.build(cfg.train.steps, axes[loss.trains], shapes[loss.trains], loss.updates)
        for loss in task.losses
    }
    if cfg.compress is None:
        return made
    return {
        loss.name: cfg.compress.trained(made[loss.name], cfg.train.steps, axes[loss.trains], loss.updates)
        for loss in task.losses
    }


def layout(
    task: Task,
    optimizers: Optimizers,
    mesh: Mesh,
    ema: bool = False,
    offload: bool = False,
    adapter: Adaptation | None = None,
    teaching: Teaching | None = None,
) -> State:
    """Lay out the state on a mesh: `jax.ShapeDtypeStruct`s with shardings, from shapes alone.

    Optimizer arrays with a parameter's shape are sharded as that parameter; all others are replicated. With `offload`
    the optimizer's arrays reside in host memory.

    Raises:
        UserError: a parameter does not divide by the mesh.
    """
    shapes = jax.eval_shape(lambda: init(task, optimizers, jax.random.key(0), ema, adapter, teaching))
    frozen_axes, axes = ({}, task.axes()) if adapter is None else adapter.axes()
    params = rules.shardings_of(mesh, axes, shapes.params)
    everywhere = rules.sharding(mesh, ())

    where = {
        path: (leaf.shape, place)
        for network, tree in params.items()
        for (path, place), leaf in zip(
            jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(shapes.params[network]), strict=True
        )
    }

    def beside(path: tuple[Any, ...], leaf: Any) -> Any:
        # an optimizer keeps trees shaped like the params: a leaf's path ends with its parameter's path
        for start in range(len(path)):
            shape, place = where.get(path[start:], (None, None))
            if shape == leaf.shape:
                return place
        return everywhere

    moments = jax.tree_util.tree_map_with_path(beside, shapes.opt_state)
    if offload:
        moments = jax.tree.map(
            lambda x, place: place.with_memory_kind(HOST) if x.ndim else place, shapes.opt_state, moments
        )
    replicated: Any = everywhere
    shardings = State(
        step=replicated,
        params=params,
        stats=jax.tree.map(lambda _: everywhere, shapes.stats),
        opt_state=moments,
        ema=params if ema else None,
        rng=replicated,
        frozen=rules.shardings_of(mesh, frozen_axes, shapes.frozen) if shapes.frozen else {},
        teacher={} if teaching is None else rules.shardings_of(mesh, {"teacher": teaching.axes()}, shapes.teacher),
    )
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, shardings
    )


def move(opt_state: Any, space: jax.memory.Space) -> Any:  # pyright: ignore[reportInvalidTypeForm]
    """Move an optimizer's arrays to device or host memory, except its few scalars. For use under `jit`."""
    return jax.tree.map(lambda x: jax.device_put(x, space) if x.ndim else x, opt_state)
