"""What a run carries from step to step, and where each of its arrays lives."""

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
    """All that changes while training."""

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
    """The key that dropout's keys are folded from; it never changes."""

    @property
    def averaged(self) -> dict[str, Any]:
        """The parameters to evaluate: their moving average where there is one."""
        return self.params if self.ema is None else self.ema


HOST = "pinned_host"
"""The memory of the host that devices copy from and to."""
Optimizers = dict[str, optax.GradientTransformation]
"""Loss name -> its optimizer."""


def init(task: Task, optimizers: Optimizers, key: jax.Array, ema: bool = False) -> State:
    """The state before the first step."""
    init_key, rng = jax.random.split(key)
    params = task.init(init_key)
    opt_state = {loss.name: optimizers[loss.name].init(params[loss.trains]) for loss in task.losses}
    return State(jnp.zeros((), jnp.int32), params, task.stats(), opt_state, params if ema else None, rng)


def compose(cfg: Config, task: Task, where: Mesh) -> tuple[Optimizers, State]:
    """Optimizers of a task, and the state that they and its networks make on a mesh, from shapes alone.

    Raises:
        UserError: a parameter does not divide by the mesh, or `optim.freeze` holds none of them or all.
    """
    made = optimizers(cfg, task)
    return made, layout(task, made, where, cfg.train.ema is not None, cfg.optim.offload)


def optimizers(cfg: Config, task: Task) -> Optimizers:
    """The optimizer of each loss of a task.

    Raises:
        UserError: `optim.freeze` holds no parameter or all.
    """
    axes = task.axes()  # before any mesh is ambient
    if cfg.optim.freeze:
        groups.check_freeze(cfg.optim.freeze, {name: model.shapes() for name, model in task.networks.items()})
    return {
        loss.name: cfg.optim.build(
            cfg.train.steps, axes[loss.trains], task.networks[loss.trains].shapes(), loss.updates
        )
        for loss in task.losses
    }


def layout(task: Task, optimizers: Optimizers, mesh: Mesh, ema: bool = False, offload: bool = False) -> State:
    """The state as `jax.ShapeDtypeStruct`s with shardings, from shapes alone.

    The optimizer's arrays that have a parameter's shape live where that parameter lives; all others are replicated.
    With `offload` the optimizer's arrays lie in the memory of the devices' hosts.

    Raises:
        UserError: a parameter does not divide by the mesh.
    """
    shapes = jax.eval_shape(lambda: init(task, optimizers, jax.random.key(0), ema))
    params = rules.place(mesh, task.axes(), shapes.params)
    everywhere = rules.sharding(mesh, ())

    where = {
        path: (leaf.shape, place)
        for network, tree in params.items()
        for (path, place), leaf in zip(
            jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(shapes.params[network]), strict=True
        )
    }

    def beside(path: tuple[Any, ...], leaf: Any) -> Any:
        # an optimizer keeps trees shaped like the params: a leaf's path ends with that of its parameter
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
    """An optimizer's arrays in the memory of the devices or of the hosts; its few numbers stay. For use under `jit`."""
    return jax.tree.map(lambda x: jax.device_put(x, space) if x.ndim else x, opt_state)
