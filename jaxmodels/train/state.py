"""What a run carries from step to step, and where each of its arrays resides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxmodels.config import Config
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
    """Parameters by network."""
    stats: dict[str, Any]
    """Batch statistics by network."""
    opt_state: dict[str, Any]
    """Optimizer state by loss."""
    ema: dict[str, Any] | None
    """Moving average of the parameters, or None."""
    rng: jax.Array
    """The key from which dropout keys are derived; it never changes."""

    @property
    def averaged(self) -> dict[str, Any]:
        """The parameters to evaluate: their moving average if there is one."""
        return self.params if self.ema is None else self.ema


HOST = "pinned_host"
"""Kind of the host memory that devices copy from and to."""
Optimizers = dict[str, optax.GradientTransformation]
"""Optimizers by the name of their loss."""


def init(task: Task, optimizers: Optimizers, key: jax.Array, ema: bool = False) -> State:
    """Initialize the state before the first step."""
    init_key, rng = jax.random.split(key)
    params = task.init(init_key)
    opt_state = {loss.name: optimizers[loss.name].init(params[loss.trains]) for loss in task.losses}
    return State(jnp.zeros((), jnp.int32), params, task.stats(), opt_state, params if ema else None, rng)


def compose(cfg: Config, task: Task, where: Mesh) -> tuple[Optimizers, State]:
    """Build a task's optimizers, and the layout of the state that they and its networks need on a mesh.

    Raises:
        UserError: a parameter does not divide by the mesh, or `optim.freeze` matches no parameter or all of them.
    """
    made = optimizers(cfg, task)
    return made, layout(task, made, where, cfg.train.ema is not None, cfg.optim.offload)


def optimizers(cfg: Config, task: Task) -> Optimizers:
    """Build the optimizer of each loss of a task.

    Raises:
        UserError: `optim.freeze` matches no parameter or all of them.
    """
    axes = task.axes()  # before a mesh is set
    if cfg.optim.freeze:
        groups.check_freeze(cfg.optim.freeze, {name: model.shapes() for name, model in task.networks.items()})
    return {
        loss.name: cfg.optim.build(
            cfg.train.steps, axes[loss.trains], task.networks[loss.trains].shapes(), loss.updates
        )
        for loss in task.losses
    }


def layout(task: Task, optimizers: Optimizers, mesh: Mesh, ema: bool = False, offload: bool = False) -> State:
    """Lay out the state on a mesh: `jax.ShapeDtypeStruct`s with shardings, from shapes alone.

    Optimizer arrays with a parameter's shape are sharded as that parameter; all others are replicated. With `offload`
    the optimizer's arrays reside in host memory.

    Raises:
        UserError: a parameter does not divide by the mesh.
    """
    shapes = jax.eval_shape(lambda: init(task, optimizers, jax.random.key(0), ema))
    params = rules.shardings_of(mesh, task.axes(), shapes.params)
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
    )
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, shardings
    )


def move(opt_state: Any, space: jax.memory.Space) -> Any:  # pyright: ignore[reportInvalidTypeForm]
    """Move an optimizer's arrays to device or host memory, except its few scalars. For use under `jit`."""
    return jax.tree.map(lambda x: jax.device_put(x, space) if x.ndim else x, opt_state)
